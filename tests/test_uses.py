"""What people do with a chat model that carries a guard. Each test names the mutations that it kills."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import CHATML, KINDS, make_guard, make_model, make_rows, make_tokenizer, user, write
from tokenizers import Tokenizer, decoders, models
from torch import nn
from transformers import (
    AutoTokenizer,
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedTokenizerFast,
)

import checkpoint
from chat import checkpoint_gradients, encode, reached_layers
from checkpoint import load_guard, start_accelerator
from common import UserError
from lora import LoRALinear
from model import GuardConfig, GuardedChat
from moderate import whole_characters
from tools.export_peft import export

ROWS = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]

# ---------------------------------------------------------------------------
# Models


def test_a_chat_model_carries_one_guard():
    """Kills: a second guard inside the first one's layers, half an injection that spoils the first guard."""
    guard = make_guard()
    before, names = guard.score(ROWS), list(guard.adapter())
    with pytest.raises(ValueError, match="already carries a guard"):
        GuardedChat(guard.chat_model, guard.tokenizer, guard.config)
    assert torch.equal(guard.score(ROWS), before) and list(guard.adapter()) == names
    assert all(parameter.requires_grad for parameter in guard.adapter().values())


def test_what_is_saved_is_the_adapter_whatever_the_user_unfreezes():
    """Kills: an adapter file that holds the frozen model because its parameters require gradients."""
    guard = make_guard()
    names = list(guard.adapter())
    guard.chat_model.requires_grad_(True)
    assert list(guard.adapter()) == names and all("lora_" in n or "guard_head" in n for n in names)


def test_a_chat_model_with_a_guard_inside_is_not_saved(tmp_path):
    """Kills: a model folder whose layers have names that from_pretrained does not know."""
    with pytest.raises(UserError, match="has a guard inside"):
        make_guard().chat_model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_not_in_memory_is_refused():
    """Kills: NotImplementedError from a layer that device_map left on the disk."""
    chat_model = make_model()
    chat_model.model.layers[1].to("meta")
    with pytest.raises(UserError, match="not in memory"):
        GuardedChat(chat_model, make_tokenizer(), GuardConfig())


def with_vision():
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = text | {"image_size": 8, "patch_size": 4}
    text |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 320}
    options = {"mm_tokens_per_image": 4, "image_token_index": 319}
    config = Gemma3Config(text_config=text, vision_config=vision, **options)
    torch.manual_seed(0)
    return Gemma3ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("path", ["activated", "full"])
@pytest.mark.parametrize("kind", [*KINDS, "with vision"])
def test_every_lora_tensor_gets_a_gradient_within_two_steps(kind, path):
    """Kills: LoRA in a vision tower or a side projection that a text never reaches."""
    chat_model = with_vision() if kind == "with vision" else make_model(kind)
    chat_model.base_model.side = nn.Linear(32, 32)  # no text reaches it
    guard = GuardedChat(chat_model, make_tokenizer(), GuardConfig(["theft"], path, " harmful?", lora_r=4))
    optimizer, moved = torch.optim.SGD(guard.adapter().values(), lr=1.0), set()
    for _ in range(2):
        guard(ROWS).square().sum().backward()
        moved |= {name for name, p in guard.adapter().items() if p.grad is not None and p.grad.any()}
        optimizer.step()
        optimizer.zero_grad()
    assert moved == set(guard.adapter()) and len(moved) > 8
    assert not any("vision" in name or "lm_head" in name for name in moved)


def test_a_target_that_no_text_reaches_is_refused_by_name():
    """Kills: a target in a vision tower that is injected and never learns."""
    for target in ("fc1", "vision_tower", "lm_head"):
        with pytest.raises(ValueError, match=rf"{target}.*q_proj"):
            GuardedChat(with_vision(), make_tokenizer(), GuardConfig(lora_targets=[target]))


def test_an_expert_that_the_trial_text_missed_is_a_target():
    """Kills: experts without LoRA because the router sent the few tokens of the trial elsewhere."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
            self.unused, self.device = nn.Linear(4, 4), torch.device("cpu")

        def forward(self, input_ids, use_cache):
            return self.experts[0](torch.ones(4))

    model = Experts()
    model.base_model = model
    assert {name.removeprefix("base_model.") for name in reached_layers(model, [1])} == {
        f"experts.{n}" for n in range(3)
    }


# ---------------------------------------------------------------------------
# Dates


DATED = "{{ '<|im_start|>system\nToday is ' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}" + CHATML


def test_a_template_sees_the_date_of_the_config():
    """Kills: a score that changes from day to day, a date that only one of the renderings has."""
    guards = []
    for date in ("2024-07-26", "2025-01-01"):
        tokenizer = make_tokenizer()
        tokenizer.chat_template = DATED
        guards.append(GuardedChat(make_model(), tokenizer, GuardConfig(date=date)))
    first, second = (encode(guard.tokenizer, user("hi"))[0] for guard in guards)
    assert "Today is 26 Jul 2024" in guards[0].tokenizer.decode(first) and first != second
    assert guards[0].classify([{"prompt": "hi"}]) != guards[1].classify([{"prompt": "hi"}])


@pytest.mark.parametrize(
    "live", ["{% set form = '%d' %}{{ strftime_now(form) }}", "{% set f = strftime_now %}"]
)
def test_a_date_that_cannot_be_fixed_is_refused(live):
    """Kills: a template that asks for today in another way, and changes every day after all."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = live + CHATML
    with pytest.raises(ValueError, match="asks for the date"):
        GuardedChat(make_model(), tokenizer, GuardConfig())


def test_two_guards_may_share_a_tokenizer():
    """Kills: a date of the first guard that stays in the second one's template."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% if strftime_now is defined %}{{ strftime_now ( '%Y' ) }}{% endif %}" + CHATML
    )
    for date in ("2024-07-26", "2025-01-01"):
        guard = GuardedChat(make_model(), tokenizer, GuardConfig(date=date))
        assert guard.tokenizer.decode(encode(guard.tokenizer, user("hi"))[0]).startswith(date[:4])


@pytest.mark.parametrize("date", ["yesterday", "", 3])
def test_a_date_that_is_none_is_refused(date):
    """Kills: a config that fails at the first conversation, with a traceback."""
    with pytest.raises(ValueError, match="date"):
        GuardConfig(date=date)


# ---------------------------------------------------------------------------
# Memory


def keep(kept, tensor):
    kept.append(tensor.numel())
    return tensor


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_equal_with_and_without_checkpointing(kind):
    """Kills: a gate that is shut while layers are computed again, dropout of the frozen model, no saving."""
    found = []
    for checkpointing in (False, True):
        guard = make_guard(kind, guard_path="full", lora_dropout=0.2)
        if checkpointing:
            checkpoint_gradients(guard.chat_model, guard.gate)
        kept = []
        hooks = torch.autograd.graph.saved_tensors_hooks(partial(keep, kept), lambda x: x)
        with hooks:
            torch.manual_seed(0)
            loss = guard.train()(ROWS).square().sum()
        loss.backward()
        found.append(({name: p.grad for name, p in guard.adapter().items()}, sum(kept)))
    (plain, much), (checkpointed, little) = found
    assert all(torch.allclose(plain[name], checkpointed[name], atol=1e-5) for name in plain)
    assert any(gradient.any() for gradient in plain.values()) and little < much / 2


# ---------------------------------------------------------------------------
# Elsewhere: other folders, other tools, other processes


@pytest.mark.parametrize("path", ["activated", "full"])
def test_peft_opens_an_exported_guard(path, tmp_path):
    """Kills: names that PEFT does not know, another scale, other tokens, a head in the LoRA file."""
    peft = pytest.importorskip("peft")
    make_model().save_pretrained(tmp_path / "base")
    guard = make_guard(guard_path=path)
    export(guard, tmp_path / "exported")
    theirs = peft.PeftModel.from_pretrained(make_model(), tmp_path / "exported").eval()
    question = guard.guard_prompt_ids[0].tolist()
    with torch.no_grad():
        output = theirs(torch.tensor([ROWS[0] + question]), output_hidden_states=True)
    files = ("adapter_model.safetensors", "guard_head.safetensors")
    lora, head = (checkpoint.safetensors.torch.load_file(tmp_path / "exported" / file) for file in files)
    assert all("lora_" in name for name in lora)  # PEFT ignores other names in silence
    logits = output.hidden_states[-1][:, -1] @ head["weight"].T + head["bias"]
    assert torch.allclose(logits, guard.score(ROWS[:1]), atol=1e-5)
    assert json.loads((tmp_path / "exported/guard.json").read_text())["categories"] == ["theft", "hate"]


def test_a_run_may_be_used_from_anywhere(tmp_path, monkeypatch):
    """Kills: a relative base path that works in one folder only, --base-model that is not heard."""
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    write(tmp_path / "train.jsonl", make_rows(60))
    command = [sys.executable, str(Path(checkpoint.__file__).with_name("train.py")), "base", "run"]
    command += ["--dataset", "train.jsonl", "--epochs=1", "--lora-r=2"]
    assert subprocess.run(command, cwd=tmp_path).returncode == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    wanted = load_guard("../run/config.json", device_id=-1).score(ROWS)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="cannot load the chat model"):
        load_guard("../run/config.json", device_id=-1)
    found = load_guard("../run/config.json", device_id=-1, base_model="../moved").score(ROWS)
    assert torch.equal(found, wanted)
    (other := make_model(seed=1)).model.norm.weight.data += 1
    other.save_pretrained("other")
    AutoTokenizer.from_pretrained("../moved").save_pretrained("other")
    with pytest.raises(UserError, match="another guard or chat model"):
        load_guard("../run/config.json", device_id=-1, base_model="other")


# Spelled out here, so a name that checkpoint.LAUNCHED loses fails.
LAUNCHERS = ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"]


@pytest.mark.parametrize("name", LAUNCHERS)
def test_processes_that_do_not_know_of_each_other_are_refused(name, monkeypatch):
    """Kills: four processes that each write every row, a launcher that is not asked."""
    monkeypatch.setattr(checkpoint, "Accelerator", lambda: SimpleNamespace(num_processes=1))
    monkeypatch.setenv(name, "4")
    with pytest.raises(UserError, match="4 processes were started, and each believes there is 1"):
        start_accelerator()
    monkeypatch.setenv(name, "1")
    assert start_accelerator().num_processes == 1


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_a_launch_without_the_cpu_flag_writes_nothing(processes, tmp_path):
    """Kills: the launch command of the README on a machine without a GPU, which wrote each row four times."""
    write(tmp_path / "in.jsonl", [{"prompt": "hi"}])
    environment = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi-gpu", "--main_process_port=0"]
    command += [f"--num-processes={processes}", str(Path(checkpoint.__file__).with_name("moderate.py"))]
    command += ["--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl"]
    environment |= {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode and "ACCELERATE_USE_CPU=true" in ended.stderr
    assert not (tmp_path / "out.jsonl").exists()


WITHOUT_SPACES = {
    "Thai": "สวัสดีครับ วันนี้อากาศดีมาก",
    "Japanese": "今日はとても良い天気ですね。散歩に行きましょう",
    "emoji": "🐈‍⬛👩‍🚀🏳️‍🌈🙂🙃" * 3,
    "address": "https://example.org/" + "a/b-c_" * 20,
}


def make_byte_fallback():
    """Like Llama 2's tokenizer: half a character makes the bytes before it unreadable too."""
    vocabulary = {f"<0x{n:02X}>": n for n in range(256)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("make", [make_tokenizer, make_byte_fallback])
@pytest.mark.parametrize("text", WITHOUT_SPACES.values(), ids=WITHOUT_SPACES)
def test_text_without_spaces_is_shown_piece_by_piece(text, make):
    """Kills: a text held back until a space or many bytes later, half a character on the screen."""
    tokenizer = make()
    ids = tokenizer(text, add_special_tokens=False).input_ids
    shown = [whole_characters(tokenizer, ids[:end]) for end in range(len(ids) + 1)]
    assert shown[-1] == text and all(text.startswith(part) and "\ufffd" not in part for part in shown)
    for end, part in enumerate(shown):
        assert len(tokenizer(text[len(part) :]).input_ids) <= len(ids) - end + 3


def test_a_literal_replacement_character_does_not_hold_the_rest_back():
    """Kills: a stream that waits for the end of a character that is whole, half a character after it."""
    tokenizer = make_tokenizer()
    ids = tokenizer("so \ufffd it is", add_special_tokens=False).input_ids
    assert whole_characters(tokenizer, ids) == "so \ufffd it is"
    assert whole_characters(tokenizer, ids[:-2]).startswith("so \ufffd ")
    text = "\ufffd\ufffd東"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert all(text.startswith(whole_characters(tokenizer, ids[:end])) for end in range(len(ids) + 1))


PRINTS = "import sys; sys.path.insert(0, sys.argv[1]); from common import run; run(lambda: print('é 東京'))"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_console_that_lacks_characters_is_no_error(encoding):
    """Kills: a traceback because a category has an accent."""
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    command = [sys.executable, "-c", PRINTS, str(Path(checkpoint.__file__).parent)]
    ended = subprocess.run(command, env=environment, capture_output=True)
    assert ended.returncode == 0 and ended.stdout.endswith(b"\n")


@pytest.mark.slow
def test_a_file_that_four_processes_share_has_every_row_once(tmp_path):
    """Kills: a row that is written twice where processes outnumber rows, a dead process that loses rows."""
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    rows = write(tmp_path / "train.jsonl", make_rows(60))
    root = Path(checkpoint.__file__).parent
    options = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "cwd": tmp_path}
    train = [
        sys.executable,
        str(root / "train.py"),
        "base",
        "run",
        "--dataset",
        rows,
        "--epochs=1",
        "--lora-r=2",
    ]
    assert subprocess.run(train, **options).returncode == 0
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi-gpu", "--main_process_port=0"]

    def command(processes, count, output):
        path = write(tmp_path / "in.jsonl", [{"prompt": f"question {n}"} for n in range(count)])
        guard = [str(root / "moderate.py"), "run/config.json", "--input", path, "--output", output]
        return [*launch, f"--num-processes={processes}", *guard]

    def numbers(output):
        return [int(json.loads(line)["prompt"].split()[1]) for line in open(tmp_path / output)]

    for count in (1, 2, 259):
        assert subprocess.run(command(4, count, f"{count}.jsonl"), **options).returncode == 0
        assert numbers(f"{count}.jsonl") == list(range(count))
    process = subprocess.Popen(command(2, 3_000, "killed.jsonl"), **options)
    while not (tmp_path / "killed.jsonl").exists() or not numbers("killed.jsonl"):
        time.sleep(0.05)
    [child, *_] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGKILL)
    assert process.wait() != 0 and len(numbers("killed.jsonl")) < 3_000
    assert subprocess.run(command(2, 3_000, "killed.jsonl"), **options).returncode == 0
    assert numbers("killed.jsonl") == list(range(3_000))


def test_a_cache_is_read_by_one_guard_only():
    """Kills: a chat path whose cache a verdict changes."""
    guard, cache = make_guard(), DynamicCache()
    with torch.no_grad():
        guard.chat_model(torch.tensor([ROWS[0]]), past_key_values=cache)
        before = copy.deepcopy(cache)
        guard.judge(cache)
    for old, new in zip(before.layers, cache.layers, strict=True):
        assert torch.equal(old.keys, new.keys) and torch.equal(old.values, new.values)
    assert sum(isinstance(module, LoRALinear) for module in guard.modules()) == 14
