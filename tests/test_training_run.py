"""The files of a run, and how it goes on after it stopped. Each test names the mutations that it kills."""

import errno
import itertools
import json
import multiprocessing
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model
from test_train import SCRIPT, read_config, run, table, tensors, write_learnable

import runs
import train
from checkpoint import load_guard
from common import UserError
from data import encode_row, load_splits
from model import GuardedChat

LONG = ("--epochs=3", "--lora-dropout=0.1", "--learning-rate=0.005", "--per-device-batch-size=4")


@pytest.fixture
def rows(tmp_path):
    return write_learnable(tmp_path / "rows.jsonl")


def same_files(one, other):
    def content(output):
        files = [path for path in output.rglob("*") if path.is_file() and path.name != "state.pt"]
        return {path.relative_to(output): path.read_bytes() for path in files}

    assert content(one) == content(other)


class Death(BaseException):
    """Ends a run as a kill does: no code of the run is called any more that could tidy up."""


# ---------------------------------------------------------------------------
# What is saved


@pytest.mark.parametrize(
    "options",
    [[], ["--no-unsafe-head", "--no-clf-head-bias"], ["--guard-path=full"]],
    ids=["default", "bare", "full"],
)
def test_a_saved_guard_gives_the_probabilities_that_were_measured(
    options, model_folder, rows, tmp_path, monkeypatch
):
    """Kills: a calibration that is not folded into the head, folded the wrong way, or that of another epoch;
    an output with another one's shift.
    """
    measured = []
    unsafe_score = train.unsafe_score

    def spy(logits, calibration, unsafe_head):
        scores = unsafe_score(logits, calibration, unsafe_head)
        measured.append((logits, calibration, scores))
        return scores

    monkeypatch.setattr(train, "unsafe_score", spy)
    monkeypatch.setattr(train, "TRAIN_SAMPLE", 1000)  # all rows
    output = tmp_path / "run"
    run(monkeypatch, model_folder, output, "--dataset", rows, "--epochs=2", "--learning-rate=0.003", *options)
    best = max(table(output, "metrics.csv"), key=lambda row: float(row["validation/auprc"]))
    guard = load_guard(output / "config.json", device_id=-1)
    splits = load_splits([rows])[0]
    of_best = measured[3 * (int(best["epoch"]) - 1) :][:3]
    for split, (logits, (shift, temperature), unsafe) in zip(train.SPLITS, of_best, strict=True):
        found = guard.score([encode_row(guard.tokenizer, row)[0] for row in splits[split]])
        found = found.double().sigmoid().numpy()
        z = (logits.astype(float) - shift) / temperature
        assert np.abs(z - logits).max() > 0.1  # so the calibration changes something
        assert np.abs(found[:, 0] - unsafe).max() < 1e-6
        assert np.abs(found[:, 1:] - 1 / (1 + np.exp(-z[:, 1:]))).max() < 1e-6
    assert guard.config.threshold == float(best["threshold"])


@pytest.mark.parametrize("unsafe_head", [True, False])
def test_a_head_learns_no_bias_and_is_saved_with_the_calibrations(
    unsafe_head, model_folder, rows, tmp_path, monkeypatch
):
    """Kills: an option that is not read, a bias that is learnt all the same, a calibration that is lost with
    the bias.
    """
    calibrations = []
    calibrate = train.calibrate
    monkeypatch.setattr(
        train, "calibrate", lambda *given: calibrations.append(calibrate(*given)) or calibrations[-1]
    )
    options = ["--epochs=1", "--no-clf-head-bias", *["--no-unsafe-head"] * (not unsafe_head)]
    output = tmp_path / "run"
    run(monkeypatch, model_folder, output, "--dataset", rows, *options)
    outputs = 2 + unsafe_head
    learnt = torch.load(output / "checkpoints/state.pt")["adapter"]
    assert learnt["guard_head.weight"].shape == (outputs, 32) and "guard_head.bias" not in learnt
    counts = json.loads((output / "parameter_counts.json").read_text())
    assert counts["guard_head"] == outputs * 32
    assert counts["trained"] == sum(tensor.numel() for tensor in learnt.values())
    [(shift, temperature)] = calibrations
    saved = tensors(output)
    config = read_config(output)
    assert saved["guard_head.bias"].numpy() == pytest.approx((-shift / temperature)[-outputs:], rel=1e-6)
    assert saved["guard_head.bias"].abs().max() > 0.1
    assert config["guard"]["clf_head_bias"] and config["guard"]["unsafe_head"] == unsafe_head
    assert not config["arguments"]["clf_head_bias"]


# ---------------------------------------------------------------------------
# Going on


def test_a_killed_run_goes_on_with_the_same_rows_cuts_and_rates(model_folder, rows, tmp_path, monkeypatch):
    """Kills: an epoch that starts anew, an order, cuts or a rate that follow from where a process began."""
    seen = []  # (update, learning rate, its rows with their ends)
    die_at = []
    forward = GuardedChat.forward
    rate = train.learning_rate

    def spy(guard, conversations, ends=None):
        if guard.training:
            seen[-1][2].extend(zip(map(tuple, conversations), ends, strict=True))
        return forward(guard, conversations, ends)

    def begin(update, updates, peak):
        if update in die_at:
            raise Death
        seen.append((update, rate(update, updates, peak), []))
        return seen[-1][1]

    def records(output, *options):
        seen.clear()
        try:
            run(monkeypatch, model_folder, output, *arguments, *options)
        except Death:
            assert die_at
        return list(seen)

    monkeypatch.setattr(GuardedChat, "forward", spy)
    monkeypatch.setattr(train, "learning_rate", begin)
    arguments = ["--dataset", rows, *LONG, "--gradient-accumulation-steps=2", "--save-steps=2"]
    whole = records(tmp_path / "whole")
    assert [update for update, _, _ in whole] == list(range(27))  # 9 in each epoch
    assert len({rate for _, rate, _ in whole}) > 20 and all(len(learnt) == 8 for _, _, learnt in whole)
    die_at[:] = [14]  # in the middle of the second epoch
    assert records(tmp_path / "killed") == whole[:14]
    die_at[:] = [16]
    assert records(tmp_path / "killed", "--resume") == whole[14:16]
    die_at[:] = [17]  # before the next state is saved
    assert records(tmp_path / "killed", "--resume") == whole[16:17]
    die_at.clear()
    assert records(tmp_path / "killed", "--resume") == whole[16:]
    same_files(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_death_at_any_write_changes_no_byte(function, model_folder, rows, tmp_path, monkeypatch):
    """Kills: files that do not fit together, a state that is written before the files that belong to it, a
    run that cannot begin anew, parts that are left behind.
    """
    some = tmp_path / "some.jsonl"
    some.write_text("".join(Path(rows).read_text().splitlines(keepends=True)[:40]))
    options = ["--per-device-batch-size=12", "--save-steps=2", "--epochs=2"]  # 3 updates in each epoch
    arguments = ["--dataset", some, *LONG, *options]
    # Every epoch counts as the best, so an adapter and its config are also written over older ones.
    monkeypatch.setattr(runs, "best_epoch", lambda state: state["metrics"][-1])
    run(monkeypatch, model_folder, tmp_path / "whole", *arguments)
    original = getattr(os, function)
    for last in itertools.count(1):
        calls, output = [], tmp_path / f"{last} writes"

        def dies(*paths, calls=calls, last=last):
            calls.append(paths)
            if len(calls) == last:
                raise Death
            return original(*paths)

        with monkeypatch.context() as patch:
            patch.setattr(os, function, dies)
            patch.setattr(os, "getpid", lambda: 7)  # the process that goes on has another id
            try:
                run(patch, model_folder, output, *arguments)
            except Death:
                pass
            else:
                break
        resume = ["--resume"] * (output / "config.json").exists()
        for part in output.glob("*.7.tmp") if not resume else ():  # a run that never began
            part.unlink()
        run(monkeypatch, model_folder, output, *arguments, *resume)
        same_files(tmp_path / "whole", output)
    assert last == 17  # 2 writes at the start, 5 after each epoch, and 4 states


def train_and_exit(*arguments):
    sys.argv = ["train.py", *map(str, arguments)]
    train.main()


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_no_byte(model_folder, rows, tmp_path):
    """Kills: what only a dead process leaves behind, and moments that the tests above do not think of."""
    processes = multiprocessing.get_context("forkserver")
    # Without this, every process spends seconds on imports.
    processes.set_forkserver_preload(["test_runs", "transformers.models.llama.modeling_llama"])

    def begin(output):
        resume = ["--resume"] * (output / "config.json").exists()
        arguments = (model_folder, output, "--dataset", rows, *LONG, "--save-steps=3", *resume)
        process = processes.Process(target=train_and_exit, args=arguments)
        process.start()
        return process

    begin(tmp_path / "warm").join()
    started = time.perf_counter()
    begin(tmp_path / "whole").join()
    duration = time.perf_counter() - started
    moments = random.Random(0)
    kills = 0
    while kills < 20:
        output = tmp_path / f"killed {kills}"
        process = begin(output)
        process.join(moments.uniform(0, duration))
        if process.is_alive():
            process.kill()
            kills += 1
        process.join()
        if not (output / "config.json").exists():  # a run that never began
            shutil.rmtree(output, ignore_errors=True)
        resumed = begin(output)
        resumed.join()
        assert resumed.exitcode == 0
        same_files(tmp_path / "whole", output)
        shutil.rmtree(output)


def test_a_full_disk_is_said_and_costs_nothing_that_was_saved(model_folder, rows, tmp_path, monkeypatch):
    """Kills: a file that is overwritten in place, a part that is left behind, a message without the file's
    name.
    """
    output = tmp_path / "run"
    arguments = ["--dataset", rows, *LONG, "--save-steps=3"]
    run(monkeypatch, model_folder, tmp_path / "whole", *arguments)
    saved = []

    def files(*left_out):
        paths = [path for path in output.rglob("*") if path.is_file() and path.suffix not in left_out]
        return {path: path.read_bytes() for path in paths}

    def fills_up(file):
        saved.append(files(".tmp"))
        if len(saved) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"No space left.*state\.pt"):
        patch.setattr(os, "fsync", fills_up)
        run(patch, model_folder, output, *arguments)
    assert files() == saved[-1]
    # The system's own limit: no file of more than 16 KB, and the state has more.
    command = [sys.executable, SCRIPT, model_folder, output, *arguments, "--resume"]
    script = f"ulimit -f 16; exec {shlex.join(map(str, command))}"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert re.search(r"train\.py: .*File too large.*state\.pt", result.stderr.splitlines()[-1])
    assert files() == saved[-1]
    run(monkeypatch, model_folder, output, *arguments, "--resume")
    same_files(tmp_path / "whole", output)


# ---------------------------------------------------------------------------
# What is refused


def test_a_resume_with_other_settings_is_refused_by_name(model_folder, rows, tmp_path, monkeypatch):
    """Kills: an argument that is not compared, caches that are kept from the middle on, a damaged state that
    torch can read, other rows under the same name, another model in the same folder.
    """
    output = tmp_path / "run"
    arguments = ["--dataset", rows, "--epochs=1"]

    def refused(match, *options):
        with pytest.raises(UserError, match=match):
            run(monkeypatch, model_folder, output, *arguments, *options, "--resume")

    run(monkeypatch, model_folder, output, *arguments)
    refused(r"arguments\.lora_dropout", "--lora-dropout=0.1")
    refused(r"arguments\.caches_kept", "--cache-dir", tmp_path / "caches")
    state = output / "checkpoints/state.pt"
    whole = state.read_bytes()
    for damaged in ({"update": 3}, [1], None):
        torch.save(damaged, state)
        refused("holds no run to go on with")
    state.write_bytes(whole[:-100])
    refused("holds no run to go on with")
    state.write_bytes(whole)
    text = Path(rows).read_text()
    Path(rows).write_text(text.replace("safe safe", "safe"))
    refused(r"rows\.train")
    Path(rows).write_text(text.replace('"hate": true', '"hate": false'))
    refused(r"rows\.train")
    Path(rows).write_text(text.replace('"hate"', '"greed"'))  # the same values under another name
    refused(r"guard\.categories")
    Path(rows).write_text(text)
    other = make_model()
    torch.nn.init.constant_(other.model.norm.weight, 2)
    other.save_pretrained(model_folder)
    refused(r"base_fingerprint\.norms")


def test_rows_may_move_to_another_file_before_a_resume(model_folder, rows, tmp_path, monkeypatch):
    """Kills: a comparison of the rows' file names instead of the rows."""
    run(monkeypatch, model_folder, tmp_path / "run", "--dataset", rows, "--epochs=1")
    moved = Path(rows).rename(tmp_path / "moved.jsonl")
    run(monkeypatch, model_folder, tmp_path / "run", "--dataset", moved, "--epochs=1", "--resume")


def test_a_folder_that_holds_another_run_is_left_alone(model_folder, rows, tmp_path, monkeypatch):
    """Kills: overwriting a finished run."""
    (tmp_path / "config.json").write_text("another run's")
    with pytest.raises(UserError, match="another run"):
        run(monkeypatch, model_folder, tmp_path, "--dataset", rows)
    assert (tmp_path / "config.json").read_text() == "another run's"
