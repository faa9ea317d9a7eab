"""The loop, run on a tiny model. Each test names the mutation that it kills."""

import csv
import errno
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from accelerate.state import AcceleratorState
from test_architectures import REFUSED
from test_data import make_rows, write
from transformers import AutoModelForCausalLM

import train
from common import UserError
from conftest import make_model, make_tokenizer
from data import encode, load_splits
from metrics import best_threshold, metrics
from model import GuardedChat, probabilities
from train import calibrate, choose_thresholds, guard_loss, learning_rate

SCRIPT = Path(train.__file__)
FILES = ("adapter.safetensors", "config.json", "metrics.csv", "train_losses.csv")


@pytest.fixture
def rows(tmp_path):
    """Rows of unequal length whose labels can be learnt: what is unsafe says so."""
    rows = make_rows(80)
    for number, row in enumerate(rows):
        row["response"] = ("safe " if row["is_safe"] else "harmful ") * (1 + number % 7)
    return write(tmp_path / "rows.jsonl", rows)


def run(monkeypatch, *arguments):
    """train.main() as `python train.py arguments` would call it, in this process."""
    AcceleratorState._reset_state(True)  # another number of accumulation steps would be ignored
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        train.main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def tensors(output):
    return safetensors.torch.load_file(Path(output) / "adapter.safetensors")


def table(output, name):
    with open(Path(output) / name, newline="") as file:
        return list(csv.DictReader(file))


def close(one, other, tolerance):
    return one.keys() == other.keys() and all((one[k] - other[k]).abs().max() < tolerance for k in one)


@pytest.mark.parametrize("path", ["activated", "full"])
def test_a_run_learns_and_leaves_the_files_of_the_contract(path, model_folder, rows, tmp_path, monkeypatch, capsys):
    """Kills: a loss with the wrong sign, a file left out, the last epoch in place of the best, an untrained head."""
    output = tmp_path / "run"
    options = ["--guard-path", path, "--epochs=6", "--learning-rate=0.003"]
    run(monkeypatch, model_folder, output, "--dataset", rows, *options)
    config, metrics = json.loads((output / "config.json").read_text()), table(output, "metrics.csv")
    losses, counts = table(output, "train_losses.csv"), json.loads((output / "parameter_counts.json").read_text())
    first, last = (sum(float(row["loss"]) for row in losses if row["epoch"] == epoch) for epoch in ("1", "6"))
    assert last < first / 2
    assert float(metrics[-1]["train/auprc"]) > 0.95 and float(metrics[-1]["validation/auprc"]) > 0.95
    assert len(metrics) == 6 and len(losses) == 6 * 5  # 66 training rows in batches of 16
    measures = ("accuracy", "precision", "recall", "f1", "fpr", "auprc")
    columns = itertools.product(train.SPLITS, ("", "/theft", "/hate"), measures)
    assert set(metrics[0]) == {f"{split}{name}/{measure}" for split, name, measure in columns} | {
        "epoch",
        "threshold",
        "prompt_threshold",
    }
    best = max(metrics, key=lambda row: float(row["validation/auprc"]))
    kept = output / f"checkpoints/epoch_{best['epoch']}.safetensors"
    assert (output / "adapter.safetensors").read_bytes() == kept.read_bytes()
    assert config["threshold"] == float(best["threshold"])
    assert len(config["calibration"]["shift"]) == len(config["calibration"]["temperature"]) == 3
    assert config["base_model"] == model_folder and config["categories"] == ["theft", "hate"]
    assert config["guard_path"] == path and config["arguments"]["epochs"] == 6
    assert counts["trained"] == sum(tensor.numel() for tensor in tensors(output).values())
    assert counts["guard_head"] == 3 * 32 + 3
    assert "epoch 6: train AUPRC" in capsys.readouterr().out


@pytest.mark.parametrize("path", ["activated", "full"])
def test_half_of_the_answers_are_cut_somewhere_anew_in_every_epoch(path, model_folder, rows, tmp_path, monkeypatch):
    """`full`, which judges no answer before its end, learns from whole ones.

    Kills: answers always whole, cuts in the prompt, none before the answer, the same cuts in every epoch, cuts in what
    is scored."""
    seen, forward = {True: [], False: []}, GuardedChat.forward

    def spy(guard, conversations, ends=None):
        seen[guard.training].extend(zip(conversations, ends or map(len, conversations), strict=True))
        return forward(guard, conversations, ends)

    monkeypatch.setattr(GuardedChat, "forward", spy)
    run(monkeypatch, model_folder, tmp_path / "run", "--dataset", rows, "--epochs=2", "--guard-path", path)
    tokenizer, splits = make_tokenizer(), load_splits([rows])[0]
    texts = {split: [encode(tokenizer, row["prompt"], row["response"]) for row in splits[split]] for split in splits}
    starts = [len(encode(tokenizer, row["prompt"])) for row in splits["train"]]
    cuts = [(texts["train"].index(conversation), length) for conversation, length in seen[True]]
    assert all(length >= starts[row] for row, length in cuts)
    whole = sum(length == len(texts["train"][row]) for row, length in cuts)
    if path == "full":
        assert whole == len(cuts)
        return
    assert 0.4 < whole / len(cuts) < 0.75  # a cut can also fall on the last token
    assert 0.02 < sum(length == starts[row] for row, length in cuts) / len(cuts) < 0.2
    half = len(cuts) // 2
    assert len(set(cuts[:half]) & set(cuts[half:])) < 0.6 * half
    scored = seen[False][1:]  # after the one that tells whether the model can be guarded
    assert all(ids in texts["validation"] + texts["test"] and length == len(ids) for ids, length in scored)


COMMON = ["--epochs=2", "--learning-rate=0.005", "--lora-r=4"]


def test_accumulating_four_batches_equals_one_of_four_times_the_size(model_folder, rows, tmp_path, monkeypatch):
    """Kills: a loss that is not divided by the steps, or divided twice; a mean over tokens or known labels of a batch;
    a schedule that steps with every batch. The rows are of unequal length, so that batches are padded differently, and
    some have no categories, so that batches know differently many labels."""
    some = [json.loads(line) for line in Path(rows).read_text().splitlines()]
    some = [row | {"category": None} if number % 5 == 4 else row for number, row in enumerate(some)]
    options = [model_folder, "--dataset", write(tmp_path / "some.jsonl", some), *COMMON]
    run(monkeypatch, options[0], tmp_path / "one", *options[1:], "--per-device-batch-size=16")
    run(
        monkeypatch,
        options[0],
        tmp_path / "four",
        *options[1:],
        "--per-device-batch-size=4",
        "--gradient-accumulation-steps=4",
    )
    # Adam divides by the gradient's size, so where that is almost zero it enlarges what is rounding: not bit for bit.
    assert close(tensors(tmp_path / "one"), tensors(tmp_path / "four"), 2e-4)
    ours, theirs = (table(tmp_path / name, "train_losses.csv") for name in ("one", "four"))
    assert len(ours) == len(theirs)
    assert all(float(a["loss"]) == pytest.approx(float(b["loss"]), abs=1e-4) for a, b in zip(ours, theirs, strict=True))


def start(processes, *arguments):
    """The launch command of the README, on the CPU; the process that it has become."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi-gpu", f"--num-processes={processes}"]
    command += ["--mixed-precision=no", "--main_process_port=0", SCRIPT, *map(str, arguments)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, **pipes)


def launch(processes, *arguments):
    process = start(processes, *arguments)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]
    return output


def test_two_processes_train_and_score_as_one_does(model_folder, rows, tmp_path, monkeypatch):
    """Kills: gradients that are not averaged, processes on the same batches, rows scored twice or by nobody."""
    launch(2, model_folder, tmp_path / "two", "--dataset", rows, *COMMON, "--per-device-batch-size=8")
    run(monkeypatch, model_folder, tmp_path / "one", "--dataset", rows, *COMMON, "--per-device-batch-size=16")
    assert close(tensors(tmp_path / "one"), tensors(tmp_path / "two"), 2e-4)
    for ours, theirs in zip(*(table(tmp_path / name, "metrics.csv") for name in ("one", "two")), strict=True):
        assert {k: float(v) for k, v in ours.items()} == pytest.approx(
            {k: float(v) for k, v in theirs.items()}, abs=1e-4, nan_ok=True
        )


def test_a_seed_gives_the_same_bytes_and_another_seed_others(model_folder, rows, tmp_path, monkeypatch):
    """Kills: an unseeded initialisation, order or dropout; a time or a path in what is saved."""
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run(
            monkeypatch,
            model_folder,
            tmp_path / name,
            "--dataset",
            rows,
            *COMMON,
            f"--seed={seed}",
            "--lora-dropout=0.1",
        )
    for file in (*FILES, "checkpoints/epoch_2.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert (tmp_path / "a/adapter.safetensors").read_bytes() != (tmp_path / "c/adapter.safetensors").read_bytes()


def same_files(one, other):
    def content(output):
        files = [path for path in output.rglob("*") if path.is_file() and path.name != "state.pt"]
        return {path.relative_to(output): path.read_bytes() for path in files}

    assert content(one) == content(other)


LONG = ["--epochs=3", "--lora-dropout=0.1", "--learning-rate=0.005", "--per-device-batch-size=4", "--save-steps=3"]


@pytest.mark.parametrize(
    ("at", "number", "status"), [(4, signal.SIGTERM, 143), (18, signal.SIGINT, 130), (54, signal.SIGTERM, 143)]
)
def test_a_run_that_is_told_to_stop_saves_first_and_ends_as_if_undisturbed(
    at, number, status, model_folder, rows, tmp_path, monkeypatch, capsys
):
    """Kills: a state without the moments, the sums, the losses, the place in the epoch or the dropout's seed; an update
    that is lost or learnt twice; a signal that is not looked for, or not at an epoch's end."""
    arguments = ["--dataset", rows, *LONG[:-1], "--gradient-accumulation-steps=2", "--save-steps=1000"]
    run(monkeypatch, model_folder, tmp_path / "whole", *arguments)
    learnt = []

    def stops(update, updates, peak):
        learnt.append(update)
        assert updates == 27  # 9 in each epoch
        if len(learnt) == at:
            signal.raise_signal(number)
        return rate(update, updates, peak)

    rate = train.learning_rate
    monkeypatch.setattr(train, "learning_rate", stops)
    with pytest.raises(SystemExit) as left:
        run(monkeypatch, model_folder, tmp_path / "stopped", *arguments)
    assert left.value.code == status and "--resume" in capsys.readouterr().out
    assert len(learnt) == at
    run(monkeypatch, model_folder, tmp_path / "stopped", *arguments, "--resume")
    assert learnt == [update for update in range(27) for _ in range(2)]
    same_files(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.slow
def test_two_processes_that_are_told_to_stop_end_at_one_update(model_folder, rows, tmp_path):
    """Kills: a process that stops by itself, so that the other waits for it for ever; a state of another update."""
    arguments = ["--dataset", rows, *LONG, "--epochs=12"]
    launch(2, model_folder, tmp_path / "whole", *arguments)
    process, state = start(2, model_folder, tmp_path / "run", *arguments), tmp_path / "run/checkpoints/state.pt"
    deadline = time.monotonic() + 120
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode and output.count("go on with --resume") == 1
    assert len(table(tmp_path / "whole", "train_losses.csv")) > torch.load(state)["update"]
    launch(2, model_folder, tmp_path / "run", *arguments, "--resume")
    same_files(tmp_path / "whole", tmp_path / "run")


def test_a_second_ctrl_c_does_not_wait(monkeypatch):
    """Kills: a handler that stays, for evaluations can take long."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        stops = train.stop_signals()
        signal.raise_signal(signal.SIGINT)
        assert stops == [signal.SIGINT] and signal.getsignal(signal.SIGINT) == before[signal.SIGINT]
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # which launchers may send twice
        assert stops == [signal.SIGINT, signal.SIGTERM, signal.SIGTERM]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Death(BaseException):
    """The end of a process, as far as what it leaves behind is concerned."""


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_death_at_any_write_changes_no_byte(function, model_folder, rows, tmp_path, monkeypatch):
    """Kills: files that do not fit together, a state that is written before what it stands for, a run that cannot begin
    anew, parts that are left behind."""
    arguments = ["--dataset", rows, *LONG[:-2], "--per-device-batch-size=16", "--save-steps=2", "--epochs=2"]
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
            patch.setattr(os, "getpid", lambda: 7)  # the one that goes on will have another
            try:
                run(patch, model_folder, output, *arguments)
            except Death:
                pass
            else:
                break
        resume = ["--resume"] * (output / "config.json").exists()
        if not resume:  # a run that never began, in a folder that may be somebody else's
            (output / "config.json.7.tmp").unlink(missing_ok=True)
        run(monkeypatch, model_folder, output, *arguments, *resume)
        same_files(tmp_path / "whole", output)
    assert last > 15


def test_a_resume_with_other_arguments_rows_or_model_is_refused_by_name(model_folder, rows, tmp_path, monkeypatch):
    """Kills: an argument that is not compared, caches that are kept from the middle on, a damaged state that torch can
    read, other rows under the same name, another model in the same folder."""
    arguments = ["--dataset", rows, "--epochs=1"]
    run(monkeypatch, model_folder, tmp_path / "run", *arguments)
    with pytest.raises(UserError, match=r"arguments\.lora_dropout"):
        run(monkeypatch, model_folder, tmp_path / "run", *arguments, "--lora-dropout=0.1", "--resume")
    with pytest.raises(UserError, match=r"arguments\.caches_kept"):
        run(monkeypatch, model_folder, tmp_path / "run", *arguments, "--cache-dir", tmp_path / "caches", "--resume")
    state = tmp_path / "run/checkpoints/state.pt"
    whole = state.read_bytes()
    for damaged in ({"update": 3}, [1], None):
        torch.save(damaged, state)
        with pytest.raises(UserError, match="holds no run to go on with"):
            run(monkeypatch, model_folder, tmp_path / "run", *arguments, "--resume")
    state.write_bytes(whole)
    text = Path(rows).read_text()
    Path(rows).write_text(text.replace("safe safe", "safe"))
    with pytest.raises(UserError, match=r"rows\.train"):
        run(monkeypatch, model_folder, tmp_path / "run", *arguments, "--resume")
    Path(rows).write_text(text)
    other = make_model()
    torch.nn.init.constant_(other.model.norm.weight, 2)
    other.save_pretrained(model_folder)
    with pytest.raises(UserError, match=r"base_fingerprint\.norms"):
        run(monkeypatch, model_folder, tmp_path / "run", *arguments, "--resume")


def train_and_exit(*arguments):
    sys.argv = ["train.py", *map(str, arguments)]
    train.main()


@pytest.mark.slow
def test_twenty_kills_at_random_moments_change_no_byte(model_folder, rows, tmp_path):
    """Kills: what only a process that is gone leaves behind, and moments that the tests above do not think of."""
    processes = multiprocessing.get_context("forkserver")
    # Or every process would import them for seconds.
    processes.set_forkserver_preload(["test_train", "transformers.models.llama.modeling_llama"])

    def start(output):
        resume = ["--resume"] * (output / "config.json").exists()
        process = processes.Process(
            target=train_and_exit, args=(model_folder, output, "--dataset", rows, *LONG, *resume)
        )
        process.start()
        return process

    start(tmp_path / "warm").join()
    started = time.perf_counter()
    start(tmp_path / "whole").join()
    duration, moments = time.perf_counter() - started, random.Random(0)
    kills = 0
    while kills < 20:
        output = tmp_path / f"killed {kills}"
        process = start(output)
        process.join(moments.uniform(0, duration))
        if process.is_alive():
            process.kill()
            kills += 1
        process.join()
        if not (output / "config.json").exists():  # as above
            shutil.rmtree(output, ignore_errors=True)
        resumed = start(output)
        resumed.join()
        assert resumed.exitcode == 0
        same_files(tmp_path / "whole", output)
        shutil.rmtree(output)


def test_a_full_disk_is_said_and_costs_nothing_that_was_saved(model_folder, rows, tmp_path, monkeypatch):
    """Kills: a file written in its place, a part that is left behind, a message that does not name the file."""
    arguments = ["--dataset", rows, *LONG]
    run(monkeypatch, model_folder, tmp_path / "whole", *arguments)
    saved = []

    def fills_up(file):
        files = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.suffix != ".tmp"]
        saved.append({path: path.read_bytes() for path in files})
        if len(saved) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"cannot write .*state.pt: No space left"):
        patch.setattr(os, "fsync", fills_up)
        run(patch, model_folder, tmp_path / "run", *arguments)
    assert saved[-1] == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    # And by a limit of the system's own: no file of more than 16 KB, which the state has.
    command = shlex.join(map(str, [sys.executable, SCRIPT, model_folder, tmp_path / "run", *arguments, "--resume"]))
    result = subprocess.run(
        ["bash", "-c", f"ulimit -f 16; exec {command}"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 2 and re.search(r"cannot write .*state\.pt: File too large", result.stderr)
    assert saved[-1] == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    run(monkeypatch, model_folder, tmp_path / "run", *arguments, "--resume")
    same_files(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize(("able", "dtype"), [(False, "float32"), (True, "bfloat16")])
def test_training_computes_in_the_fast_dtype(able, dtype, model_folder, rows, tmp_path, monkeypatch):
    """Kills: 16 bits without instructions for them or never, a config that names another dtype of the model."""
    make_model().to(torch.bfloat16).save_pretrained(model_folder)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": able})
    dtypes, forward = set(), GuardedChat._head

    def head(guard, hidden):
        dtypes.add(str(hidden.dtype))
        return forward(guard, hidden)

    monkeypatch.setattr(GuardedChat, "_head", head)
    run(monkeypatch, model_folder, tmp_path / "run", "--dataset", rows, "--epochs=1")
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert dtypes == {f"torch.{dtype}"} and config["arguments"]["compute_dtype"] == dtype
    assert config["dtype"] == "bfloat16"


def test_loss_by_hand():
    """Kills: a wrong share of the two terms, a weight on the negatives, a mean over known labels only."""
    logits, weight = torch.tensor([[0.0, 1.0, -1.0], [2.0, 0.0, 0.0]]), torch.tensor([2.0, 3.0, 4.0])
    target = torch.tensor([[1.0, 0.0, 1.0], [0.0, torch.nan, torch.nan]])

    def softplus(value):
        return torch.nn.functional.softplus(torch.tensor(value)).item()

    unsafe = (2 * softplus(0.0) + softplus(2.0)) / 2
    categories = (softplus(1.0) + 4 * softplus(1.0)) / 4
    assert guard_loss(logits, target, weight, True).item() == pytest.approx((unsafe + categories) / 2)
    assert guard_loss(logits, target, weight, False).item() == pytest.approx(categories)
    assert guard_loss(logits[:, :1], target[:, :1], weight[:1], True).item() == pytest.approx(unsafe / 2)


def test_a_category_without_positives_and_rows_without_categories_train(model_folder, tmp_path, monkeypatch):
    """Kills: an infinite weight, a NaN label in the loss or its gradient."""
    rows = [row | {"category": row["category"] | {"hate": False}} for row in make_rows(80)]
    for row in rows[::5]:
        del row["category"]
    run(monkeypatch, model_folder, tmp_path / "run", "--dataset", write(tmp_path / "rows.jsonl", rows), "--epochs=1")
    assert all(float(row["loss"]) < 10 for row in table(tmp_path / "run", "train_losses.csv"))
    assert all(tensor.isfinite().all() for tensor in tensors(tmp_path / "run").values())


def test_calibration_undoes_the_weights_and_the_confidence_of_the_loss():
    """Kills: a shift the other way, the unsafe output's temperature for the categories', unknown labels taken for 0,
    a weight of 0 that makes the shift infinite, a shift for the largest logit, which no weight belongs to."""
    torch.manual_seed(0)
    weight, chance = torch.tensor([0.5, 9.0, 0.0]), torch.randn(20000, 3)
    target = (torch.rand(20000, 3) < chance.sigmoid()).float()
    target[:, 2] = 1
    logits = chance * torch.tensor([3.0, 0.5, 0.5]) + torch.tensor([0.5, 9.0, 1e-3]).log()
    target[::2, 1:] = torch.nan
    logits[::2, 1] = -20.0
    found = calibrate(logits, target, weight, True)
    assert found["shift"] == pytest.approx([math.log(0.5), math.log(9.0), math.log(1e-3)])
    assert found["temperature"][0] == pytest.approx(3, rel=0.06)
    only = calibrate(logits[:, :2], target[:, :2], weight[:2], True)
    assert only["temperature"] == pytest.approx([3, 0.5], rel=0.06)
    for column in (0, 1):
        share = probabilities(logits[1::2, :2], only)[:, column].mean().item()
        assert share == pytest.approx(target[1::2, column].mean().item(), abs=0.02)
    assert calibrate(logits, target, weight, False)["shift"] == [0, *found["shift"][1:]]
    target[:, 1:] = torch.nan
    assert calibrate(logits, target, weight, True)["temperature"][1:] == [1, 1]


def test_thresholds_are_chosen_for_answers_by_f1_and_for_prompts_by_few_refusals():
    """Kills: prompts that take part in the choice for answers, or the other way round; a best F1 for prompts, which
    refuses safe ones; a prompt refused where the rows say nothing about prompts alone."""
    labels = np.array([0, 1, 1, 0, 0, 1, 0, 1, 1])
    scores = np.array([0.1, 0.7, 0.8, 0.2, 0.05, 0.15, 0.6, 0.15, 0.8])
    answered = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0], bool)
    assert choose_thresholds(labels, scores, answered, None) == pytest.approx((0.7, 0.45))
    assert choose_thresholds(labels, scores, answered, 0.5) == pytest.approx((0.1, 0.45))
    assert choose_thresholds(labels[:4], scores[:4], answered[:4], None) == pytest.approx((2.0, 0.45))
    assert choose_thresholds(labels[3:], scores[3:], answered[3:], None)[0] == pytest.approx(0.7)
    every = choose_thresholds(labels[3:], scores[3:], np.ones(6, bool), None)  # for one answer alone decides nothing
    assert choose_thresholds(labels[3:], scores[3:], answered[3:], None)[1] == every[1]


def test_the_threshold_is_that_of_the_f1_to_be_expected_unless_the_measured_f1_is_much_below():
    """Kills: labels alone, of which few rows near the threshold decide; probabilities alone, which may be biased; a
    margin that does not shrink with the rows; prompts that take part; the rule in place of a rate that is named."""
    generator = np.random.default_rng(0)
    scores = generator.random(100_000) ** 2
    labels, answered = (generator.random(100_000) < scores).astype(float), np.arange(100_000) % 4 > 0
    best = best_threshold(labels[answered], scores[answered])
    draws = [slice(start, start + 400) for start in range(0, 20_000, 400)]
    chosen = [choose_thresholds(labels[few], scores[few], answered[few], None).response for few in draws]
    measured = [best_threshold(labels[few][answered[few]], scores[few][answered[few]]) for few in draws]
    assert np.std(chosen) < np.std(measured) / 2 and np.mean(chosen) == pytest.approx(best, abs=0.02)
    others = np.where(answered, scores, 0.9)
    assert choose_thresholds(labels, others, answered, None).response == pytest.approx(best, abs=0.02)
    biased = scores / (scores + 3 * (1 - scores))  # by one in log odds
    assert choose_thresholds(labels, biased, answered, None).response == best_threshold(
        labels[answered], biased[answered]
    )
    assert metrics(labels[answered], scores[answered], choose_thresholds(labels, scores, answered, 0.1).response)[
        "fpr"
    ] == pytest.approx(0.1, abs=1e-3)


def test_prompts_alone_are_learnt_and_get_their_threshold(model_folder, tmp_path, monkeypatch, capsys):
    """Kills: one threshold for all rows in metrics.csv, a prompt's that is not kept in the config, rows of both kinds
    mixed up where one is too long, silence about a guard that refuses no prompt."""
    rows = [row | {"response": "safe" if row["is_safe"] else "harmful"} for row in make_rows(120)]
    alone = [{"prompt": f"{number} {row['response']}", "is_safe": row["is_safe"]} for number, row in enumerate(rows)]
    long = {"prompt": "x" * 2000, "response": "safe", "is_safe": True}
    seen, choose = [], train.epoch_metrics
    monkeypatch.setattr(train, "epoch_metrics", lambda *given: seen.append(given) or choose(*given))
    both = write(tmp_path / "rows.jsonl", [long, *rows, *alone])
    run(monkeypatch, model_folder, tmp_path / "run", "--dataset", both, "--epochs=1")
    [row], config = table(tmp_path / "run", "metrics.csv"), json.loads((tmp_path / "run/config.json").read_text())
    logits, targets, answered, _, calibration, _ = seen[0]
    for split in train.SPLITS:
        assert len(logits[split]) == len(targets[split]) == len(answered[split])
        assert 0.3 < answered[split].mean() < 0.7 and (answered[split] == ~targets[split][:, 1].isnan().numpy()).all()
    thresholds = np.where(answered["test"], config["threshold"], config["prompt_threshold"])
    flagged = probabilities(logits["test"], calibration)[:, 0].numpy() >= thresholds
    assert float(row["test/accuracy"]) == pytest.approx((flagged == targets["test"][:, 0].numpy()).mean())
    assert config["prompt_threshold"] == float(row["prompt_threshold"]) != config["threshold"]
    assert config["calibration"] == calibration
    assert config["prompt_threshold"] < 2 and "refuses no prompt" not in capsys.readouterr().out
    run(monkeypatch, model_folder, tmp_path / "pairs", "--dataset", write(tmp_path / "pairs.jsonl", rows), "--epochs=1")
    assert json.loads((tmp_path / "pairs/config.json").read_text())["prompt_threshold"] == 2
    assert "refuses no prompt" in capsys.readouterr().out


def test_answers_alone_are_learnt_beside_their_pairs(model_folder, rows, tmp_path, monkeypatch):
    """Kills: an answer in place of its pair, labels that are lost, answers of validation or test rows among them."""
    seen, labels = [], train.labels
    monkeypatch.setattr(train, "labels", lambda rows, names: seen.append(rows) or labels(rows, names))
    run(monkeypatch, model_folder, tmp_path / "run", "--dataset", rows, "--epochs=1", "--answers-alone")
    learnt, *others = seen
    splits, _ = load_splits([rows])
    assert learnt[: len(splits["train"])] == splits["train"] and others == [splits["validation"], splits["test"]]
    alone = [
        (row["prompt"], row["response"], row["category"], row["is_safe"]) for row in learnt[len(splits["train"]) :]
    ]
    assert alone == [(row["response"], None, row["category"], row["is_safe"]) for row in splits["train"]]


def test_rows_of_messages_are_learnt_as_the_same_rows_of_pairs_are(model_folder, rows, tmp_path, monkeypatch):
    """Kills: a history that training leaves out or cuts, an answer that is learnt alone with its history."""
    pairs = [json.loads(line) for line in Path(rows).read_text().splitlines()]
    forward, judged = GuardedChat.forward, []

    def spy(self, conversations, ends=None):
        if ends:
            judged.extend(self.tokenizer.decode(ids[:end]) for ids, end in zip(conversations, ends, strict=True))
        return forward(self, conversations, ends)

    monkeypatch.setattr(GuardedChat, "forward", spy)
    adapters = []
    for name in ("pairs", "messages", "later"):
        given = []
        for number, pair in enumerate(pairs):
            turns = [("user", f"hi {number}"), ("assistant", "or")] if name == "later" else []
            turns += [("user", pair["prompt"]), ("assistant", pair["response"])]
            messages = [{"role": role, "content": text} for role, text in turns]
            labels = {"category": pair["category"], "is_safe": pair["is_safe"]}
            given.append(pair if name == "pairs" else labels | {"messages": messages})
        judged.clear()
        options = ["--dataset", write(tmp_path / f"{name}.jsonl", given), "--epochs=1", "--answers-alone"]
        run(monkeypatch, model_folder, tmp_path / name, *options)
        adapters.append((tmp_path / name / "adapter.safetensors").read_bytes())
    assert adapters[0] == adapters[1]
    later = [text for text in judged if "hi " in text]  # the others are answers alone
    assert 50 < len(later) < len(judged) and all("question" in text for text in later)


def test_a_false_positive_rate_that_the_user_names_is_kept(model_folder, tmp_path, monkeypatch):
    """Kills: an option that is not read, the rate of another split, a threshold that is not the one of the metrics."""
    alike = [row | {"response": "safe"} for row in make_rows(80)]  # so that the classes overlap
    options = ["--dataset", write(tmp_path / "alike.jsonl", alike), "--epochs=1"]
    run(monkeypatch, model_folder, tmp_path / "run", *options, "--max-fpr=0")
    [row] = table(tmp_path / "run", "metrics.csv")
    assert float(row["validation/fpr"]) == 0
    assert json.loads((tmp_path / "run/config.json").read_text())["threshold"] == float(row["threshold"])
    run(monkeypatch, model_folder, tmp_path / "best", *options)
    [best] = table(tmp_path / "best", "metrics.csv")
    assert float(best["validation/f1"]) > float(row["validation/f1"])


def test_kept_caches_change_no_loss_and_a_second_run_is_the_same(model_folder, rows, tmp_path, monkeypatch):
    """Kills: whole answers where cut ones are due, rows mixed up, caches of which the second run is not told."""
    for name, options in (
        ("plain", []),
        ("kept", ["--cache-dir", tmp_path / "c"]),
        ("again", ["--cache-dir", tmp_path / "c"]),
    ):
        run(monkeypatch, model_folder, tmp_path / name, "--dataset", rows, *COMMON, *options)
    assert close(tensors(tmp_path / "plain"), tensors(tmp_path / "kept"), 2e-4)
    for file in FILES:
        assert (tmp_path / "kept" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    assert len(list((tmp_path / "c").glob("*/*"))) == len(list((tmp_path / "c").glob("*/*.safetensors"))) > 60


def test_without_lora_the_head_alone_learns(model_folder, rows, tmp_path, monkeypatch):
    """Kills: "none" taken for a layer's name, adapters that are made all the same."""
    run(monkeypatch, model_folder, tmp_path / "run", "--dataset", rows, "--lora-targets=none", "--epochs=1")
    assert set(tensors(tmp_path / "run")) == {"guard_head.weight", "guard_head.bias"}
    assert json.loads((tmp_path / "run/config.json").read_text())["lora_targets"] == []


def test_learning_rate_rises_and_falls():
    """Kills: no warm-up, no decay, a peak that is not reached."""
    rates = [learning_rate(update, 100, 2.0) for update in range(100)]
    assert rates[0] < 0.5 and 1.8 < max(rates) <= 2 and rates[-1] < 0.05
    assert rates.index(max(rates)) in range(3, 8)


BAD_ARGUMENTS = {
    "no epochs": ["--epochs=0"],
    "no rows in a batch": ["--per-device-batch-size=0"],
    "no learning rate": ["--learning-rate=nan"],
    "no rank": ["--lora-r=0"],
    "a target that is not there": ["--lora-targets=q_proj,query"],
    "no data": ["--dataset=none.jsonl"],
    "nothing to resume": ["--resume"],
    "a seed below zero": ["--seed=-1"],
    "an alpha without end": ["--lora-alpha=inf"],
    "a rank above every width": ["--lora-r=1000"],
    "a tracker that is not there": ["--report-to=junk"],
    "a rate above 1": ["--max-fpr=1.5"],
    "caches on the path that has none": ["--guard-path=full", "--cache-dir=caches"],
}


@pytest.mark.parametrize("arguments", BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments_are_refused_before_anything_is_written(arguments, model_folder, rows, tmp_path, monkeypatch):
    """Kills: a check left out, and a folder left behind that looks like a run."""
    with pytest.raises((UserError, SystemExit)):
        run(monkeypatch, model_folder, tmp_path / "run", "--dataset", rows, *arguments)
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_be_guarded_is_refused_before_the_folder_is_taken(rows, tmp_path, monkeypatch):
    """Kills: finding it out in the first step, when the command that is put right finds its folder taken."""
    config, _ = REFUSED["hybrid of convolution and attention"]
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "hybrid")
    make_tokenizer().save_pretrained(tmp_path / "hybrid")
    for options in ([], ["--cache-dir", tmp_path / "caches"]):
        with pytest.raises(UserError, match="cannot borrow a LinearAttentionLayer"):
            run(monkeypatch, tmp_path / "hybrid", tmp_path / "run", "--dataset", rows, *options)
        assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_another_run_is_left_alone(model_folder, rows, tmp_path, monkeypatch):
    """Kills: overwriting a finished run."""
    (tmp_path / "config.json").write_text("another run's")
    with pytest.raises(UserError, match="another run"):
        run(monkeypatch, model_folder, tmp_path, "--dataset", rows)
    assert (tmp_path / "config.json").read_text() == "another run's"


def test_a_mistake_is_one_line_and_exit_status_2(model_folder, tmp_path):
    """Kills: a traceback for a user's mistake, and exit status 1, which means a crash."""
    command = [sys.executable, SCRIPT, model_folder, tmp_path / "run", "--dataset", "none.jsonl"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and "train.py: " in result.stderr and result.stderr.count("\n") == 1
