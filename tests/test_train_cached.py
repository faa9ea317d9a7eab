"""Training from caches that are kept on disk."""

import sys
from unittest.mock import Mock

import pytest
import safetensors.torch
import torch
from conftest import CONTEXT, ids_of, make_guard, make_model, make_rows, make_tokenizer, score, write

import train
from errors import UserError
from model import GuardConfig, GuardedChat
from tools import train_cached
from tools.train_cached import keep_caches

TEXTS = ("how is the bread?", "hi", "the answer is harmful, and the user is safe " * 2, "ho")
IDS = [ids_of(make_tokenizer(), text, "safe") for text in TEXTS]


def test_kept_caches_give_the_same_logits(tmp_path, monkeypatch):
    """Kills: a cut at another place, padding that is seen, a text read again, another dtype's or model's."""
    guard, cuts = make_guard(), [[3, 12], [4, 9], [30, 40], [7, 8]]
    long = [[5 + n % 300 for n in range(CONTEXT + 40)]]  # read in windows
    wanted, wanted_of_long = guard(IDS, cuts), score(guard, long)
    folder = keep_caches(guard, tmp_path)
    read = Mock(wraps=guard.chat_model.base_model.forward)
    monkeypatch.setattr(guard.chat_model.base_model, "forward", read)
    assert torch.allclose(guard(IDS, cuts), wanted, atol=1e-5)
    assert torch.allclose(guard(IDS[::-1], cuts[::-1]), wanted.flip(0), atol=1e-5)
    assert read.call_count == len(IDS) + 2  # the guard prompt is read twice
    with torch.autocast("cpu", torch.bfloat16):
        guard(IDS, cuts)
    assert len(list(folder.iterdir())) == 2 * len(IDS)
    assert torch.allclose(score(guard, long), wanted_of_long, atol=1e-5)
    other = GuardedChat(make_model(seed=1), make_tokenizer(), GuardConfig())  # of other matrices alone
    assert keep_caches(other, tmp_path) != folder


def test_a_guard_whose_caches_cannot_be_kept_is_refused(tmp_path):
    """Kills: a window of the last tokens taken for the whole conversation, a folder that is made before."""
    for guard in (make_guard("mistral"), make_guard("gemma3"), make_guard(guard_path="full")):
        with pytest.raises(UserError, match=r"cannot be kept; use train\.py"):
            keep_caches(guard, tmp_path / "caches")
    assert not (tmp_path / "caches").exists()


@pytest.fixture
def trained(model_folder, tmp_path, monkeypatch):
    """A training as a function: its command, output, options and start -> the tensors that it saves."""
    rows = [row | {"response": "it is so " * (1 + n % 7)} for n, row in enumerate(make_rows(80))]
    data = write(tmp_path / "rows.jsonl", rows)

    def call(command, name, *options, adapter=None):
        start = ["--adapter", adapter] if adapter else []
        folders = [tmp_path / "caches"] * (command is train_cached) + [model_folder, tmp_path / name]
        arguments = map(str, ["", *start, *folders, "--dataset", data, "--lora-r=4", *options])
        with monkeypatch.context() as patch:
            patch.setattr(train, "load", train.load)  # undone at the end
            patch.setattr(sys, "argv", [*arguments])
            command.main()
        return safetensors.torch.load_file(tmp_path / name / "adapter.safetensors")

    return call


def test_kept_caches_change_no_loss_and_a_second_run_reads_nothing(trained, tmp_path):
    """Kills: a file for every cut, rows mixed up, arguments that are lost, a second run that reads again."""
    adapters, times = {}, {}
    for name, command in (("plain", train), ("kept", train_cached), ("again", train_cached)):
        adapters[name] = trained(command, name, "--epochs=2")
        times[name] = {path: path.stat().st_mtime_ns for path in tmp_path.glob("caches/*/*")}
    assert all((x - adapters["plain"][key]).abs().max() < 2e-4 for key, x in adapters["kept"].items())
    assert all(torch.equal(x, adapters["kept"][key]) for key, x in adapters["again"].items())
    assert times["kept"] == times["again"] and 60 < len(times["kept"]) <= 80


def test_a_training_goes_on_from_an_adapter(trained, tmp_path):
    """Kills: LoRA that is not put in, a start that config.json does not name, another guard's adapter."""
    learnt = trained(train, "first", "--epochs=1")
    first, options = tmp_path / "first/adapter.safetensors", ["--epochs=1", "--seed=1"]
    moved = trained(train_cached, "second", *options, "--learning-rate=1e-9", adapter=first)
    assert all(torch.allclose(moved[key], x, atol=1e-6) for key, x in learnt.items() if "lora" in key)
    with pytest.raises(UserError, match="differs: start"):
        trained(train_cached, "second", *options, "--learning-rate=1e-9", "--resume")
    with pytest.raises(UserError, match="another guard or chat model; what differs: lora_alpha"):
        trained(train_cached, "third", "--lora-alpha=8", adapter=first)
