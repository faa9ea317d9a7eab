"""Training: what is learnt, what is measured, what is refused."""

import csv
import itertools
import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import Mock

import accelerate.tracking
import numpy as np
import pytest
import safetensors.torch
import torch
from accelerate.state import AcceleratorState
from conftest import CONTEXT, PATHS, make_rows, make_tokenizer, write

import train
import training_run
from checkpoint import load_guard
from data import SPLITS, encode_row, load_splits
from errors import UserError
from model import NEVER, GuardedChat
from train import guard_loss, learning_rate, over_cuts

MEASURES = ("accuracy", "precision", "recall", "f1", "fpr", "auprc")
FILES = ("adapter.safetensors", "config.json", "metrics.csv", "train_losses.csv")
FAST = ("--epochs=2", "--learning-rate=0.005", "--lora-r=4")


def run(monkeypatch, *arguments):
    """Call train.main() as `python train.py arguments` does, but in this process."""
    AcceleratorState._reset_state(True)  # without this, accelerate keeps the last run's precision
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    train.main()


def learnable():
    """Rows of unequal length whose labels can be learnt: an unsafe answer says that it is harmful."""
    rows = make_rows(80)
    for number, row in enumerate(rows):
        row["response"] = ("safe " if row["is_safe"] else "harmful ") * (1 + number % 7)
    return rows


def tensors(output):
    return safetensors.torch.load_file(Path(output) / "adapter.safetensors")


def close(one, other, tolerance):
    return one.keys() == other.keys() and all((one[k] - other[k]).abs().max() < tolerance for k in one)


def read_config(output):
    return json.loads((Path(output) / "config.json").read_text())


def table(output, name):
    with open(Path(output) / name, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def learn(model_folder, tmp_path, monkeypatch):
    """Train on rows, or on files in splits: learn(name, given, *options) -> the run's folder."""
    (tmp_path / "link").symlink_to(model_folder)
    monkeypatch.chdir(tmp_path)

    def learn(name, given, *options):
        parts = given.items() if isinstance(given, dict) else [("rows", given)]
        paths = [write(tmp_path / f"{split}.jsonl", rows) for split, rows in parts]
        run(monkeypatch, "link", tmp_path / name, "--dataset", *paths, *options)
        return tmp_path / name

    return learn


def files(output):
    """{path: content} of a run's files but its state, which torch writes in more than one way."""
    paths = [path for path in output.rglob("*") if path.is_file() and path.name != "state.pt"]
    return {path.relative_to(output): path.read_bytes() for path in paths}


@pytest.mark.parametrize("path", PATHS)
def test_a_run_learns_and_leaves_the_files_of_the_contract(path, learn, tmp_path, capsys):
    """Kills: a loss of the wrong sign, a lost file or link, the last epoch for the best, other betas."""
    output = learn("run", learnable(), "--guard-path", path, "--epochs=6", "--learning-rate=0.003")
    epochs, losses = table(output, "metrics.csv"), table(output, "train_losses.csv")
    assert float(epochs[-1]["validation/auprc"]) > 0.95
    assert [row["update"] for row in losses] == [str(n) for n in range(1, 31)]  # 66 rows in batches of 16
    assert [row["epoch"] for row in epochs] == list("123456")
    columns = itertools.product(SPLITS, ("", "/theft", "/hate"), MEASURES)
    others = {"epoch", "threshold", "prompt_threshold"}
    assert set(epochs[0]) == {f"{split}{part}/{measure}" for split, part, measure in columns} | others
    kept = {f"checkpoints/epoch_{n}.safetensors" for n in range(1, 7)}
    pictures = {"curves.png"} if find_spec("matplotlib") else set()
    assert {*map(str, files(output))} == {*FILES, *kept, *pictures, "parameter_counts.json"}
    best = max(epochs, key=lambda row: float(row["validation/auprc"]))
    kept = output / f"checkpoints/epoch_{best['epoch']}.safetensors"
    assert (output / "adapter.safetensors").read_bytes() == kept.read_bytes()
    config = read_config(output)
    assert config["base_model"] == str(tmp_path / "link") and config["arguments"]["epochs"] == 6
    assert config["guard"]["categories"] == ["theft", "hate"] and config["guard"]["guard_path"] == path
    printed = capsys.readouterr().out
    figures = [f"{split} AUPRC {float(best[f'{split}/auprc']):.3f}" for split in ("validation", "test")]
    assert f"80 rows of {tmp_path / 'rows.jsonl'}" in printed and "epoch 6: train AUPRC" in printed
    assert f"epoch {best['epoch']} is the best: {', '.join(figures)}\n30 updates took " in printed
    [group] = torch.load(output / "checkpoints/state.pt")["optimizer"]["param_groups"]
    assert tuple(group["betas"]) == (0.9, 0.95)


@pytest.mark.parametrize("path", PATHS)
def test_rows_are_learnt_from_whole_and_at_random_cuts(path, learn, tmp_path, monkeypatch):
    """Kills: rows that are cut off, cuts before the judged part, the same in all epochs, or in scoring."""
    seen = {True: {}, False: {}}  # by whether the guard is in training: {ids: cuts}
    forward = GuardedChat.forward

    def spy(guard, conversations, cuts):
        if guard.training or seen[True]:  # before, the new guard is on trial
            for ids, row in zip(conversations, cuts, strict=True):
                seen[guard.training].setdefault(tuple(ids), set()).update(row)
        return forward(guard, conversations, cuts)

    monkeypatch.setattr(training_run, "TRAIN_SAMPLE", 1000)
    monkeypatch.setattr(GuardedChat, "forward", spy)
    learn("run", learnable(), "--epochs=2", "--guard-path", path)
    tokenizer = make_tokenizer()
    splits = load_splits([tmp_path / "rows.jsonl"]).splits
    texts = {name: [encode_row(tokenizer, row) for row in splits[name]] for name in splits}
    assert seen[False] == {tuple(text.ids): {len(text.ids)} for part in texts.values() for text in part}
    assert seen[True].keys() == {tuple(text.ids) for text in texts["train"]}
    cuts = [(text, seen[True][tuple(text.ids)]) for text in texts["train"]]
    assert all(text.start < min(ends) and max(ends) == len(text.ids) for text, ends in cuts)
    assert sum(len(ends) > 1 for _, ends in cuts) > 10
    assert any(len(ends) > 2 for _, ends in cuts)  # two epochs, each with a place of its own and the end


def test_a_seed_gives_the_same_bytes_and_no_two_seeds_share_an_epoch(learn, monkeypatch):
    """Kills: seed plus epoch as an epoch's seed, an unseeded weight or dropout, a time in the files."""
    orders = Mock(wraps=train.epoch_updates)
    monkeypatch.setattr(train, "epoch_updates", orders)
    options = [*FAST, "--lora-dropout=0.1"]
    seeds = {"a": 0, "b": 1, "c": 1}
    a, b, c = (learn(name, learnable(), *options, f"--seed={seed}") for name, seed in seeds.items())
    generators = [call.args[2] for call in orders.call_args_list]
    assert len({generator.initial_seed() for generator in generators}) == 4  # of two seeds and two epochs
    assert files(b) == files(c) and not close(tensors(a), tensors(b), 0.01)


def test_loss_over_cuts_by_hand():
    """Kills: a mean, the highest or the last alone, padding that counts, a gradient of the weights."""
    logits = torch.tensor([[[2.0], [-1.0], [-1.0]], [[0.0], [1.0], [3.0]]], requires_grad=True)  # (2, 3, 1)
    found = over_cuts(logits, [[4, 7], [4, 7, 9]])
    e = math.exp
    first = (2 * e(2) - e(-1)) / (e(2) + e(-1))  # the third is padding
    second = (e(1) + 3 * e(3)) / (1 + e(1) + e(3))
    assert found[:, 0].tolist() == pytest.approx([first, second])
    found.sum().backward()
    assert logits.grad[0, 2] == 0 and (logits.grad >= 0).all() and logits.grad[1, 2] > 0.5


def test_accumulating_four_batches_equals_one_four_times_as_big(learn, monkeypatch):
    """Kills: a loss divided by the steps twice or never, a mean over known labels, accelerate's variable."""
    some = [row | {"category": None} if n % 5 == 4 else row for n, row in enumerate(learnable())]
    one = learn("one", some, *FAST)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1000")
    four = learn("four", some, *FAST, "--per-device-batch-size=4", "--gradient-accumulation-steps=4")
    # Adam divides by the gradient's size, so it enlarges the rounding errors of the smallest gradients.
    assert close(tensors(one), tensors(four), 2e-4)
    found, wanted = ([float(row["loss"]) for row in table(run, "train_losses.csv")] for run in (one, four))
    assert found == pytest.approx(wanted, abs=1e-4)


def test_two_processes_train_and_score_as_one_does(learn, model_folder, tmp_path):
    """Kills: gradients that are not averaged, equal batches for both, rows scored twice or not at all."""
    one, two = learn("one", learnable(), *FAST, "--per-device-batch-size=16"), tmp_path / "two"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi-gpu", "--num-processes=2"]
    command += ["--mixed-precision=no", "--main_process_port=0", train.__file__, model_folder, two]
    command += ["--dataset", tmp_path / "rows.jsonl", *FAST, "--per-device-batch-size=8"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert close(tensors(one), tensors(two), 2e-4)
    measured = [table(output, "metrics.csv")[-1] for output in (one, two)]
    found, wanted = ({name: float(value) for name, value in row.items()} for row in measured)
    assert found == pytest.approx(wanted, abs=1e-4, nan_ok=True)


def test_loss_by_hand():
    """Kills: a wrong share of the two terms, a weight on the negatives, a mean over known labels only."""
    logits, weight = torch.tensor([[0.0, 1.0, -1.0], [2.0, 0.0, 0.0]]), torch.tensor([2.0, 3.0, 4.0])
    target = torch.tensor([[1.0, 0.0, 1.0], [0.0, torch.nan, torch.nan]])
    softplus = np.log1p(np.exp([0.0, 1.0, 2.0]))
    unsafe = (2 * softplus[0] + softplus[2]) / 2
    categories = (softplus[1] + 4 * softplus[1]) / 4
    assert guard_loss(logits, target, weight, True).item() == pytest.approx((unsafe + categories) / 2)
    assert guard_loss(logits, target, weight, False).item() == pytest.approx(categories)
    assert guard_loss(logits[:, :1], target[:, :1], weight[:1], True).item() == pytest.approx(unsafe / 2)


def test_learning_rate_rises_and_falls():
    """Kills: no warm-up, no decay, a peak that is not reached."""
    rates = [learning_rate(update, 100, 2.0) for update in range(100)]
    assert rates[0] < 0.5 and 1.8 < max(rates) <= 2 and rates[-1] < 0.05
    assert rates.index(max(rates)) in range(3, 8)


def test_too_long_training_rows_are_left_out_and_others_scored(learn, tmp_path, capsys):
    """Kills: an update beyond the context, labels that shift by one, a long test row that is left out too."""
    splits = load_splits([write(tmp_path / "rows.jsonl", learnable())]).splits
    long = {"prompt": "x" * CONTEXT, "response": "safe", "is_safe": True}
    splits["test"].insert(2, long | {"prompt": "y" * CONTEXT})
    without = learn("without", splits, "--epochs=1")
    assert "left out" not in capsys.readouterr().out
    output = learn("run", splits | {"train": [long, *splits["train"]]}, "--epochs=1")
    assert "left out 1 training rows of more than" in capsys.readouterr().out
    assert files(without) == files(output)
    assert read_config(output)["rows"]["test"].startswith(f"{len(splits['test'])}, ")
    far = [row | {"prompt": row["prompt"] * (1 if row["is_safe"] else 99)} for row in splits["train"]]
    with pytest.raises(UserError, match=r"left out .* the others lack an output's true or false labels"):
        learn("none", splits | {"train": far})


def test_thresholds_keep_to_their_rates(learn, capsys):
    """Kills: points of another epoch or split, one threshold for prompts and answers."""
    texts = [f"{n} {('harmful', 'bread')[n % 2]}" for n in range(400)]
    safe = [n % 2 != (n % 11 == 0) for n in range(400)]  # so a few look like the other kind
    prompts = [{"prompt": text, "is_safe": is_safe} for text, is_safe in zip(texts, safe, strict=True)]
    pairs = [{**row, "prompt": row["prompt"] + "?", "response": row["prompt"]} for row in prompts]
    parts = {"train": slice(120), "validation": slice(120, 320), "test": slice(320, 400)}
    splits = {name: prompts[part] + pairs[part] for name, part in parts.items()}
    output = learn("run", splits, "--epochs=2")
    said = capsys.readouterr().out
    assert "it refuses" not in said and "it flags" not in said
    best = max(table(output, "metrics.csv"), key=lambda row: float(row["validation/auprc"]))
    config = read_config(output)
    guard = load_guard(output / "config.json", device_id=-1)
    for name, kind, rows in (("threshold", "answer", pairs), ("prompt_threshold", "prompt", prompts)):
        points = config["operating_points"][kind]
        assert points["0.02"][0] > points["0.05"][0] > points["0.1"][0]
        assert config["guard"][name] == points["0.05"][0] == float(best[name])
        verdicts = guard.classify([row for row in rows[120:320] if row["is_safe"]])
        assert 0.02 < np.mean([verdict.flagged for verdict in verdicts]) <= 0.05
    assert config["guard"]["threshold"] != config["guard"]["prompt_threshold"]


def test_too_few_rows_give_no_threshold_and_the_run_says_so(learn, capsys):
    """Kills: a threshold of four rows, silence about a guard that refuses no prompt."""
    prompts = [{"prompt": f"{n} {('harmful', 'bread')[n % 2]}", "is_safe": n % 2 == 1} for n in range(100)]
    config = read_config(learn("run", learnable() + prompts, "--epochs=1"))
    assert (config["guard"]["threshold"], config["guard"]["prompt_threshold"]) == (0.5, NEVER)
    assert "0.05" not in config["operating_points"]["prompt"] | config["operating_points"]["answer"]
    answers, prompts = capsys.readouterr().out.splitlines()[-2:]
    assert answers.startswith("it flags answers from 0.5: ") and prompts.startswith("it refuses no prompt: ")


BAD = {  # {argument or variable: what the message names}
    "--epochs=0": "--epochs",
    "--learning-rate=nan": "--learning-rate",
    "--lora-dropout=1": "dropout",
    "--gradient-checkpointing": "--guard-path full",
    "--dataset=none.jsonl": "none.jsonl",
    "--report-to=tensorboard": "tensorboard is not installed",
    "ACCELERATE_MIXED_PRECISION=fp8": "fp8",  # the guard would be measured in another model than is used
    "ACCELERATE_DYNAMO_BACKEND=eager": "dynamo",
}


@pytest.mark.parametrize("given", BAD)
@pytest.mark.filterwarnings("ignore:`log_with")
def test_what_cannot_be_trained_is_refused_before_anything_is_written(given, learn, monkeypatch, capsys):
    """Kills: a check left out, a message that does not say what is wrong, a folder that looks like a run."""
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", list)
    name, _, value = given.partition("=")
    options = [given] if given.startswith("--") else []
    if not options:
        monkeypatch.setenv(name, value)
    with pytest.raises((SystemExit, UserError)) as left:
        learn("run", learnable(), *options)
    said = capsys.readouterr().err if left.type is SystemExit else str(left.value)
    assert BAD[given] in said.splitlines()[-1] and not Path("run").exists()
    AcceleratorState._reset_state(True)  # the next test starts without fp8
