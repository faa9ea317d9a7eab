"""What people do with a chat model that carries a guard. Each test names the mutations that it kills."""

import conftest
import pytest
import torch
from conftest import CHATML, fill_b, forward, guard_for, make_guard, make_model, make_tokenizer, score, user
from torch import nn
from transformers import Gemma3Config

from chat import encode
from model import GuardConfig, GuardedChat
from train import checkpoint_gradients

ROWS = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]


def test_a_chat_model_carries_one_guard_and_is_not_saved(tmp_path):
    """Kills: a second guard inside the first one's layers, a folder that from_pretrained does not know."""
    guard = make_guard()
    before, names = score(guard, ROWS), list(guard.adapter())
    with pytest.raises(ValueError, match="already carries a guard"):
        guard_for(guard.chat_model)
    assert torch.equal(score(guard, ROWS), before) and list(guard.adapter()) == names
    with pytest.raises(ValueError, match="carries a guard"):
        guard.chat_model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_only_layers_that_a_text_reaches_learn():
    """Kills: LoRA in a vision tower or a side projection that a text never reaches, as a target too."""
    parts = {"text_config": conftest.GROUPED | {"vocab_size": 320}}
    parts["vision_config"] = conftest.SHAPE | {"image_size": 8, "patch_size": 4}
    config = Gemma3Config(mm_tokens_per_image=4, image_token_index=319, **parts)
    chat_model = conftest.random_model(config)
    chat_model.base_model.side = nn.Linear(32, 32)  # no text reaches it
    for target in ("fc1", "vision_tower"):
        with pytest.raises(ValueError, match=rf"{target}.*q_proj"):
            guard_for(chat_model, lora_targets=[target])
    guard = guard_for(chat_model)
    fill_b(guard)
    forward(guard, ROWS).square().sum().backward()
    assert all(parameter.grad.any() for parameter in guard.adapter().values())
    assert len(guard.adapter()) == 2 * 7 * 2 + 2  # A and B of seven layers in two blocks, and the head


def gradients(guard):
    """The gradients of a guard in training, and how many numbers autograd keeps for them."""
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward(guard.train(), ROWS).square().sum()
    loss.backward()
    return {name: parameter.grad for name, parameter in guard.adapter().items()}, sum(kept)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradients_are_equal_with_and_without_checkpointing(kind):
    """Kills: a gate that is shut while layers are computed again, layers that keep all they compute."""
    plain, checkpointed = (make_guard(kind, guard_path="full", lora_dropout=0.2) for _ in range(2))
    checkpoint_gradients(checkpointed)
    wanted, much = gradients(plain)
    found, little = gradients(checkpointed)
    assert all(torch.allclose(wanted[name], found[name], atol=1e-5) for name in wanted)
    assert any(gradient.any() for gradient in wanted.values()) and little < much / 2


def test_a_template_sees_the_date_of_the_config_or_is_refused():
    """Kills: a score that changes from day to day, a first guard's date in a shared tokenizer's template."""
    tokenizer, verdicts = make_tokenizer(), []
    today = "{% if strftime_now is defined %}{{ 'Today is ' + strftime_now ( '%d %b %Y' ) }}{% endif %}"
    tokenizer.chat_template = today + CHATML
    for date, shown in (("2024-07-26", "26 Jul 2024"), ("2025-01-01", "01 Jan 2025")):
        guard = GuardedChat(make_model(), tokenizer, GuardConfig(date=date))
        assert guard.tokenizer.decode(encode(guard.tokenizer, user("hi")).ids).startswith(f"Today is {shown}")
        verdicts.append(guard.classify([{"prompt": "hi"}]))
    assert verdicts[0] != verdicts[1]
    tokenizer.chat_template = "{% set form = '%d' %}{{ strftime_now(form) }}" + CHATML
    with pytest.raises(ValueError, match="asks for the date"):
        GuardedChat(make_model(), tokenizer, GuardConfig())
