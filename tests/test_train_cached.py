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


def test_kept_caches_change_no_loss_and_a_second_run_reads_nothing(model_folder, tmp_path, monkeypatch):
    """Kills: a file for every cut, rows mixed up, arguments that are lost, a second run that reads again."""
    rows = [row | {"response": "it is so " * (1 + n % 7)} for n, row in enumerate(make_rows(80))]
    options = ["--dataset", write(tmp_path / "rows.jsonl", rows), "--epochs=2", "--lora-r=4"]
    adapters, times = {}, {}
    monkeypatch.setattr(train, "load", train.load)  # undone at the end
    for name, command in (("plain", train), ("kept", train_cached), ("again", train_cached)):
        folder = [str(tmp_path / "caches")] if command is train_cached else []
        monkeypatch.setattr(sys, "argv", ["", *folder, model_folder, str(tmp_path / name), *options])
        command.main()
        adapters[name] = safetensors.torch.load_file(tmp_path / name / "adapter.safetensors")
        times[name] = {path: path.stat().st_mtime_ns for path in tmp_path.glob("caches/*/*")}
    assert all((x - adapters["plain"][key]).abs().max() < 2e-4 for key, x in adapters["kept"].items())
    assert all(torch.equal(x, adapters["kept"][key]) for key, x in adapters["again"].items())
    assert times["kept"] == times["again"] and 60 < len(times["kept"]) <= len(rows)
