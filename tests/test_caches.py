"""Caches that are kept on disk for training. Each test names the mutations that it kills."""

import pytest
import safetensors.torch
import torch
from conftest import ids_of, make_guard, make_model, make_tokenizer
from test_train import FAST, FILES, close, run, tensors, write_learnable

from common import UserError
from model import GuardConfig, GuardedChat
from tools.train_cached import keep_caches

TEXTS = ["how is the bread?", "hi", "the answer is harmful, and the user is safe " * 2, "ho"]


def conversations(guard):
    return [ids_of(guard.tokenizer, text, "safe") for text in TEXTS]


def test_kept_caches_give_the_same_logits_and_are_read_once(tmp_path, monkeypatch):
    """Kills: a cut that is not made, or made on the wrong side; padding that the guard attends to; one file
    for two texts, models or dtypes; conversations that are read again; a cache with the guard's own tokens.
    """
    guard = make_guard()
    ids = conversations(guard)
    lengths = list(map(len, ids))
    ends = [3, 9, 5, 7]
    whole = guard(ids)
    cut = guard(ids, ends)
    assert torch.allclose(cut, guard([row[:end] for row, end in zip(ids, ends, strict=True)]))
    folder = keep_caches(guard, tmp_path / "caches")
    read = []
    forward = guard.chat_model.base_model.forward

    def spy(**given):
        read.append(given)
        return forward(**given)

    monkeypatch.setattr(guard.chat_model.base_model, "forward", spy)
    assert torch.allclose(guard(ids, ends), cut, atol=1e-5)
    assert len(read) == len(ids) + 1
    kept = [safetensors.torch.load_file(path)["cache"].shape[3] for path in folder.iterdir()]
    assert sorted(kept) == sorted(lengths) and len(set(lengths)) < len(ids)  # two are of one length
    assert torch.allclose(guard(ids, lengths), whole, atol=1e-5)
    assert torch.allclose(guard(ids[::-1], lengths[::-1]), whole.flip(0), atol=1e-5)
    assert len(read) == len(ids) + 3
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            guard(ids, lengths)
    assert len(list(folder.iterdir())) == 3 * len(ids)
    guard.chat_model.double()
    assert torch.allclose(guard(ids, lengths), whole, atol=1e-5)
    assert len(list(folder.iterdir())) == 4 * len(ids)

    scaled = make_model()
    scaled.config.rope_theta = 7.0
    for other in (make_model(seed=1), scaled):  # the first differs only in its matrices
        other = GuardedChat(other, make_tokenizer(), GuardConfig(["theft", "hate"]))
        assert keep_caches(other, tmp_path / "caches") != folder


def test_a_guard_whose_caches_cannot_be_kept_is_refused(tmp_path):
    """Kills: a window of the last tokens taken for the whole conversation, a file that is written before."""
    for guard in (make_guard("mistral"), make_guard("gemma3"), make_guard(guard_path="full")):
        with pytest.raises(UserError, match=r"caches.*--cache-dir"):
            keep_caches(guard, tmp_path / "caches")
    assert not (tmp_path / "caches").exists()


def test_a_damaged_cache_file_is_named(tmp_path):
    """Kills: a traceback, and a verdict on what is left of the file."""
    guard = make_guard()
    folder = keep_caches(guard, tmp_path)
    ids = conversations(guard)[:1]
    guard(ids, [len(ids[0])])
    [path] = folder.iterdir()
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(UserError, match=f"{path.name} is damaged, delete it"):
        guard(ids, [len(ids[0])])


def test_kept_caches_change_no_loss_and_a_second_run_is_equal(model_folder, tmp_path, monkeypatch):
    """Kills: whole answers instead of cut ones, rows mixed up, a second run that does not use the caches."""
    rows = write_learnable(tmp_path / "rows.jsonl")
    folder = tmp_path / "caches"
    for name in ("plain", "kept", "again"):
        options = [] if name == "plain" else ["--cache-dir", folder]
        run(monkeypatch, model_folder, tmp_path / name, "--dataset", rows, *FAST, *options)
        times = {path: path.stat().st_mtime_ns for path in folder.glob("*/*")}
        if name == "kept":
            written = times
    assert close(tensors(tmp_path / "plain"), tensors(tmp_path / "kept"), 2e-4)
    for file in FILES:
        assert (tmp_path / "kept" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    assert times == written and all(path.suffix == ".safetensors" for path in written) and len(written) > 60
