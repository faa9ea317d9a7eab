"""A guard as an adapter of PEFT. Each test names the mutations that it kills."""

import json

import pytest
import safetensors.torch
import torch
from conftest import PATHS, make_guard, make_model, score

from errors import UserError
from tools.export_peft import export

IDS = [5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("path", PATHS)
def test_peft_opens_an_exported_guard(path, tmp_path):
    """Kills: names that PEFT does not know, another scale, other tokens, a head in the LoRA file."""
    peft = pytest.importorskip("peft")
    guard = make_guard(guard_path=path)
    export(guard, tmp_path / "new/folder")
    theirs = peft.PeftModel.from_pretrained(make_model(), tmp_path / "new/folder").eval()
    ids = torch.tensor([IDS + guard.guard_prompt_ids[0].tolist()])
    with torch.no_grad():
        hidden = theirs(ids, output_hidden_states=True).hidden_states[-1][:, -1]
    files = ("adapter_model.safetensors", "guard_head.safetensors")
    lora, head = (safetensors.torch.load_file(tmp_path / "new/folder" / file) for file in files)
    assert all("lora_" in name for name in lora)  # PEFT ignores other names in silence
    assert torch.allclose(hidden @ head["weight"].T + head["bias"], score(guard, [IDS]), atol=1e-5)
    settings = json.loads((tmp_path / "new/folder/guard.json").read_text())
    assert settings["categories"] == ["theft", "hate"]


def test_a_guard_without_lora_is_not_exported(tmp_path):
    """Kills: a folder that PEFT opens and that does nothing."""
    with pytest.raises(UserError, match="no LoRA layers"):
        export(make_guard(lora_targets=[]), tmp_path)
    assert not list(tmp_path.iterdir())
