"""Training: what is learnt and what is measured. Each test names the mutations that it kills."""

import csv
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import accelerate.tracking
import numpy as np
import pytest
import safetensors.torch
import torch
from accelerate.state import AcceleratorState
from conftest import CONTEXT, REFUSED, ids_of, make_model, make_rows, make_tokenizer, write
from transformers import AutoModelForCausalLM

import checkpoint
import common
import train
from checkpoint import load_guard
from common import UserError
from data import encode_row, labels, load_splits
from metrics import metrics
from model import GuardedChat
from tools.ablation import QUESTION
from train import guard_loss, learning_rate

SCRIPT = Path(train.__file__)
MEASURES = ("accuracy", "precision", "recall", "f1", "fpr", "auprc")
FILES = ("adapter.safetensors", "config.json", "metrics.csv", "train_losses.csv")
FAST = ("--epochs=2", "--learning-rate=0.005", "--lora-r=4")


def write_learnable(path):
    """Rows of unequal length whose labels can be learnt: an unsafe answer says that it is harmful."""
    rows = make_rows(80)
    for number, row in enumerate(rows):
        row["response"] = ("safe " if row["is_safe"] else "harmful ") * (1 + number % 7)
    return write(path, rows)


@pytest.fixture
def rows(tmp_path):
    return write_learnable(tmp_path / "rows.jsonl")


def run(monkeypatch, *arguments, command=train.main):
    """Call train.main() as `python train.py arguments` does, but in this process."""
    AcceleratorState._reset_state(True)  # without this, accelerate keeps the last run's accumulation steps
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        command()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def start(processes, *arguments):
    """A process that runs the launch command of the README, on the CPU."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi-gpu"]
    command += [f"--num-processes={processes}", "--mixed-precision=no", "--main_process_port=0", SCRIPT]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*command, *map(str, arguments)], env=environment, text=True, **pipes)


def launch(processes, *arguments):
    """Run the launch command to its end, and return its standard output."""
    process = start(processes, *arguments)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-2000:]
    return output


def tensors(output):
    return safetensors.torch.load_file(Path(output) / "adapter.safetensors")


def read_config(output):
    return json.loads((Path(output) / "config.json").read_text())


def table(output, name):
    with open(Path(output) / name, newline="") as file:
        return list(csv.DictReader(file))


def close(one, other, tolerance):
    return one.keys() == other.keys() and all((one[k] - other[k]).abs().max() < tolerance for k in one)


# ---------------------------------------------------------------------------
# A run


@pytest.mark.parametrize("path", ["activated", "full"])
def test_a_run_learns_and_leaves_the_files_of_the_contract(
    path, model_folder, rows, tmp_path, monkeypatch, capsys
):
    """Kills: a loss of the wrong sign, a missing file, the last epoch instead of the best, an untrained
    head.
    """
    output = tmp_path / "run"
    options = ["--guard-path", path, "--epochs=6", "--learning-rate=0.003"]
    run(monkeypatch, model_folder, output, "--dataset", rows, *options)
    config = read_config(output)
    epochs = table(output, "metrics.csv")
    losses = table(output, "train_losses.csv")
    first, last = (sum(float(row["loss"]) for row in losses if row["epoch"] == epoch) for epoch in ("1", "6"))
    assert last < first / 2
    assert float(epochs[-1]["train/auprc"]) > 0.95 and float(epochs[-1]["validation/auprc"]) > 0.95
    assert len(epochs) == 6 and len(losses) == 6 * 5  # 66 training rows in batches of 16
    columns = itertools.product(train.SPLITS, ("", "/theft", "/hate"), MEASURES)
    others = {"epoch", "threshold", "prompt_threshold"}
    assert set(epochs[0]) == {f"{split}{part}/{measure}" for split, part, measure in columns} | others

    best = max(epochs, key=lambda row: float(row["validation/auprc"]))
    kept = output / f"checkpoints/epoch_{best['epoch']}.safetensors"
    assert (output / "adapter.safetensors").read_bytes() == kept.read_bytes()
    assert config["guard"]["threshold"] == float(best["threshold"])
    assert config["base_model"] == model_folder and config["guard"]["categories"] == ["theft", "hate"]
    assert config["guard"]["guard_path"] == path and config["arguments"]["epochs"] == 6
    counts = json.loads((output / "parameter_counts.json").read_text())
    assert counts["trained"] == sum(tensor.numel() for tensor in tensors(output).values())
    assert counts["guard_head"] == 3 * 32 + 3
    assert "epoch 6: train AUPRC" in capsys.readouterr().out


@pytest.mark.parametrize("path", ["activated", "full"])
def test_half_of_the_answers_are_cut_anew_in_every_epoch(path, model_folder, rows, tmp_path, monkeypatch):
    """`full` judges no answer before its end, so it learns from whole ones.

    Kills: answers that are always whole, cuts in the prompt, no cut at an answer's start, the same cuts in
    every epoch, cuts in the rows that are scored.
    """
    seen = {True: [], False: []}  # by whether the guard is in training
    forward = GuardedChat.forward

    def spy(guard, conversations, ends=None):
        ends = list(map(len, conversations)) if ends is None else ends
        seen[guard.training].extend(zip(conversations, ends, strict=True))
        return forward(guard, conversations, ends)

    monkeypatch.setattr(train, "TRAIN_SAMPLE", 1000)
    monkeypatch.setattr(GuardedChat, "forward", spy)
    run(monkeypatch, model_folder, tmp_path / "run", "--dataset", rows, "--epochs=2", "--guard-path", path)
    tokenizer = make_tokenizer()
    splits, _ = load_splits([rows])
    encoded = {name: [encode_row(tokenizer, row) for row in splits[name]] for name in splits}
    texts = {name: [ids for ids, _ in part] for name, part in encoded.items()}
    starts = [start for _, start in encoded["train"]]
    assert starts == [len(ids_of(tokenizer, row["prompt"])) for row in splits["train"]]
    scored = seen[False][1:]  # the first conversation is the try of whether the model can be guarded
    assert {tuple(ids) for ids, _ in scored} == {tuple(ids) for part in texts.values() for ids in part}
    assert all(length == len(ids) for ids, length in scored)

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


def test_accumulating_four_batches_equals_one_four_times_as_big(model_folder, rows, tmp_path, monkeypatch):
    """Rows of unequal length pad the batches differently. Rows without categories make them know unequally
    many labels.

    Kills: a loss that is not divided by the steps, or divided twice; a mean over a batch's tokens or known
    labels; a schedule that steps with every batch.
    """
    some = [json.loads(line) for line in Path(rows).read_text().splitlines()]
    some = [row | {"category": None} if number % 5 == 4 else row for number, row in enumerate(some)]
    options = ["--dataset", write(tmp_path / "some.jsonl", some), *FAST]
    run(monkeypatch, model_folder, tmp_path / "one", *options, "--per-device-batch-size=16")
    four = ["--per-device-batch-size=4", "--gradient-accumulation-steps=4"]
    run(monkeypatch, model_folder, tmp_path / "four", *options, *four)
    # Adam divides by the gradient's size, so it enlarges the rounding errors of the smallest gradients.
    assert close(tensors(tmp_path / "one"), tensors(tmp_path / "four"), 2e-4)
    ours, theirs = (table(tmp_path / name, "train_losses.csv") for name in ("one", "four"))
    found, wanted = ([float(row["loss"]) for row in rows] for rows in (ours, theirs))
    assert found == pytest.approx(wanted, abs=1e-4)


def test_two_processes_train_and_score_as_one_does(model_folder, rows, tmp_path, monkeypatch):
    """Kills: gradients that are not averaged, equal batches for both processes, rows that are scored twice
    or not at all.
    """
    options = ["--dataset", rows, *FAST]
    launch(2, model_folder, tmp_path / "two", *options, "--per-device-batch-size=8")
    run(monkeypatch, model_folder, tmp_path / "one", *options, "--per-device-batch-size=16")
    assert close(tensors(tmp_path / "one"), tensors(tmp_path / "two"), 2e-4)
    for ours, theirs in zip(*(table(tmp_path / name, "metrics.csv") for name in ("one", "two")), strict=True):
        found, wanted = ({name: float(value) for name, value in row.items()} for row in (ours, theirs))
        assert found == pytest.approx(wanted, abs=1e-4, nan_ok=True)


def test_a_seed_gives_the_same_bytes_and_another_seed_others(model_folder, rows, tmp_path, monkeypatch):
    """Kills: an unseeded initialisation, order or dropout; a time or a path in the saved files."""
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        options = [*FAST, f"--seed={seed}", "--lora-dropout=0.1"]
        run(monkeypatch, model_folder, tmp_path / name, "--dataset", rows, *options)
    for file in (*FILES, "checkpoints/epoch_2.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert (tmp_path / "a" / FILES[0]).read_bytes() != (tmp_path / "c" / FILES[0]).read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_computes_in_the_fast_dtype(dtype, model_folder, rows, tmp_path, monkeypatch):
    """Kills: the slower dtype, a config that gives the dtype of the computation as the model's, an adapter
    or a head that is rounded, so its thresholds would belong to other weights."""
    make_model().to(torch.bfloat16).save_pretrained(model_folder)
    monkeypatch.setattr(checkpoint, "product_milliseconds", lambda _, kind: 1 if kind == dtype else 2)
    dtypes = []
    guard_logits = GuardedChat.guard_logits

    def spy(guard, hidden):
        dtypes.append(str(hidden.dtype))
        return guard_logits(guard, hidden)

    monkeypatch.setattr(GuardedChat, "guard_logits", spy)
    run(monkeypatch, model_folder, tmp_path / "run", "--dataset", rows, "--epochs=1")
    config = read_config(tmp_path / "run")
    # The first pass, before the dtype is chosen, only tries whether the model can be guarded.
    assert set(dtypes[1:]) == {f"torch.{dtype}"} and config["arguments"]["compute_dtype"] == dtype
    assert config["dtype"] == "bfloat16" and f"computing in {dtype}: a product" in config["computing"]
    assert {tensor.dtype for tensor in tensors(tmp_path / "run").values()} == {torch.float32}


def test_without_lora_only_the_head_learns(model_folder, rows, tmp_path, monkeypatch):
    """Kills: "none" taken for the name of a layer, adapters that are made all the same."""
    run(monkeypatch, model_folder, tmp_path / "run", "--dataset", rows, "--lora-targets=none", "--epochs=1")
    assert set(tensors(tmp_path / "run")) == {"guard_head.weight", "guard_head.bias"}
    assert read_config(tmp_path / "run")["guard"]["lora_targets"] == []


def test_learning_rate_rises_and_falls():
    """Kills: no warm-up, no decay, a peak that is not reached."""
    rates = [learning_rate(update, 100, 2.0) for update in range(100)]
    assert rates[0] < 0.5 and 1.8 < max(rates) <= 2 and rates[-1] < 0.05
    assert rates.index(max(rates)) in range(3, 8)


class Recorder(accelerate.tracking.GeneralTracker):
    """Stands in for TensorBoard."""

    name = "tensorboard"
    requires_logging_directory = True
    tracker = None
    runs: ClassVar = []

    def __init__(self, run_name, logging_dir, **_):
        super().__init__()
        self.logged, self.config, self.finished = [], None, False
        self.runs.append((run_name, Path(logging_dir), self))

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step, **_):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


def test_a_tracker_gets_every_loss_every_epoch_and_the_config(model_folder, rows, tmp_path, monkeypatch):
    """Kills: a tracker that is not started or not finished, losses or metrics that it does not get, a wrong
    step.
    """
    monkeypatch.setattr(Recorder, "runs", [])
    tensorboard = accelerate.utils.LoggerType.TENSORBOARD
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", lambda: [tensorboard])
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Recorder)
    output = tmp_path / "run"
    run(monkeypatch, model_folder, output, "--dataset", rows, *FAST, "--report-to=tensorboard")
    [(name, folder, tracker)] = Recorder.runs
    assert name == "lora-guard" and folder == output and tracker.finished
    assert "'lora_r': 4" in tracker.config["arguments"]
    losses = [(step, values["loss"]) for step, values in tracker.logged if "loss" in values]
    assert losses == [(int(r["update"]), float(r["loss"])) for r in table(output, "train_losses.csv")]
    epochs = [(step, str(values["test/auprc"])) for step, values in tracker.logged if "loss" not in values]
    assert epochs == [(5 * int(r["epoch"]), r["test/auprc"]) for r in table(output, "metrics.csv")]


def test_tensorboard_gets_scalars(model_folder, rows, tmp_path, monkeypatch):
    """Kills: names that a tracker cannot show, a tracker that is never started."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(monkeypatch, model_folder, tmp_path / "run", "--dataset", rows, *FAST, "--report-to=tensorboard")
    found = events.EventAccumulator(str(tmp_path / "run/lora-guard")).Reload()
    assert {"loss", "validation/auprc", "test/f1", "validation/theft/auprc"} <= set(found.Tags()["scalars"])
    losses = [(event.step, event.value) for event in found.Scalars("loss")]
    wanted = [(int(r["update"]), float(r["loss"])) for r in table(tmp_path / "run", "train_losses.csv")]
    assert losses == [(step, pytest.approx(loss)) for step, loss in wanted]


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard", "mlflow"])
def test_a_tracker_that_is_not_installed_is_refused_first(tracker, model_folder, rows, tmp_path, monkeypatch):
    """Kills: hours of training that nobody logs."""
    monkeypatch.setattr(accelerate.tracking, "get_available_trackers", list)
    with pytest.raises(UserError, match=f"{tracker} is not installed"):
        run(monkeypatch, model_folder, tmp_path / "run", "--dataset", rows, f"--report-to={tracker}")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------
# The loss, the rows and their labels


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


def test_a_category_without_positives_and_rows_without_any_train(model_folder, tmp_path, monkeypatch):
    """Kills: an infinite weight, a NaN label in the loss or its gradient."""
    some = [row | {"category": row["category"] | {"hate": False}} for row in make_rows(80)]
    for row in some[::5]:
        del row["category"]
    file = write(tmp_path / "rows.jsonl", some)
    run(monkeypatch, model_folder, tmp_path / "run", "--dataset", file, "--epochs=1")
    assert all(float(row["loss"]) < 10 for row in table(tmp_path / "run", "train_losses.csv"))
    assert all(tensor.isfinite().all() for tensor in tensors(tmp_path / "run").values())


def test_rows_of_messages_are_learnt_as_the_same_pairs_are(model_folder, rows, tmp_path, monkeypatch):
    """Kills: a history that training leaves out or cuts, an answer that is learnt without its history."""
    pairs = [json.loads(line) for line in Path(rows).read_text().splitlines()]
    forward = GuardedChat.forward
    learnt = []

    def spy(guard, conversations, ends=None):
        if guard.training:
            cut = [ids[:end] for ids, end in zip(conversations, ends, strict=True)]
            learnt.extend(guard.tokenizer.batch_decode(cut))
        return forward(guard, conversations, ends)

    def as_messages(number, pair, turns):
        turns = [*turns, ("user", pair["prompt"]), ("assistant", pair["response"])]
        messages = [{"role": role, "content": text.format(number)} for role, text in turns]
        return {"messages": messages, "category": pair["category"], "is_safe": pair["is_safe"]}

    monkeypatch.setattr(GuardedChat, "forward", spy)
    later = [("user", "hi {}"), ("assistant", "or")]
    given = {
        "pairs": pairs,
        "messages": [as_messages(number, pair, []) for number, pair in enumerate(pairs)],
        "later": [as_messages(number, pair, later) for number, pair in enumerate(pairs)],
    }
    for name, some in given.items():
        learnt.clear()
        file = write(tmp_path / f"{name}.jsonl", some)
        run(monkeypatch, model_folder, tmp_path / name, "--dataset", file, "--epochs=1")
    assert close(tensors(tmp_path / "pairs"), tensors(tmp_path / "messages"), 1e-9)
    assert len(learnt) > 50 and all("hi " in text and "question" in text for text in learnt)


def test_too_long_training_rows_are_left_out_and_others_scored(
    model_folder, rows, tmp_path, monkeypatch, capsys
):
    """Kills: a text that exceeds the context in an update, labels that shift by one, silence, a long test row
    that is left out too.
    """
    splits = load_splits([rows])[0]
    long = {"prompt": "x" * CONTEXT, "response": "safe", "is_safe": True, "category": None}
    given = {"train": [long, *splits["train"]], "validation": splits["validation"], "test": [*splits["test"]]}
    given["test"].insert(2, long | {"prompt": "y" * CONTEXT})
    files = [write(tmp_path / f"{name}.jsonl", part) for name, part in given.items()]
    seen = []
    measure = train.measure

    def spy(accelerator, guard, splits, *others):
        seen.append(splits)
        return measure(accelerator, guard, splits, *others)

    monkeypatch.setattr(train, "measure", spy)
    run(monkeypatch, model_folder, tmp_path / "run", "--dataset", *files, "--epochs=1")
    assert "left out 1 training rows of more than" in capsys.readouterr().out
    [found] = seen
    tokenizer = make_tokenizer()
    for name in train.SPLITS:
        wanted = given[name][1:] if name == "train" else given[name]
        assert found[name].ids == [encode_row(tokenizer, row)[0] for row in wanted]
        assert torch.equal(
            found[name].labels[:, 0], torch.tensor([not row["is_safe"] for row in wanted]).float()
        )
    assert max(map(len, found["test"].ids)) > CONTEXT

    given["train"] = [
        row | {"prompt": row["prompt"] * (1 if row["is_safe"] else 99)} for row in given["train"]
    ]
    write(tmp_path / "train.jsonl", given["train"])
    with pytest.raises(UserError, match="that fit the context are not both safe and unsafe"):
        run(monkeypatch, model_folder, tmp_path / "none", "--dataset", *files, "--epochs=1")
    assert not (tmp_path / "none").exists()


# ---------------------------------------------------------------------------
# Thresholds and metrics


def test_prompts_alone_are_learnt_and_get_their_threshold(model_folder, tmp_path, monkeypatch, capsys):
    """Kills: one threshold for all rows of metrics.csv, a prompt threshold that is not in the config, rows of
    both kinds mixed up, silence about a guard that refuses no prompt.
    """
    rows = [row | {"response": "safe" if row["is_safe"] else "harmful"} for row in make_rows(120)]
    alone = [{"prompt": f"{n} {row['response']}", "is_safe": row["is_safe"]} for n, row in enumerate(rows)]
    both = write(tmp_path / "rows.jsonl", [*rows, *alone])
    output = tmp_path / "run"
    run(monkeypatch, model_folder, output, "--dataset", both, "--epochs=2", "--learning-rate=0.003")
    assert "refuses no prompt" not in capsys.readouterr().out
    row = max(table(output, "metrics.csv"), key=lambda row: float(row["validation/auprc"]))
    config = read_config(output)["guard"]
    assert config["prompt_threshold"] == float(row["prompt_threshold"]) != config["threshold"]
    assert config["prompt_threshold"] < 2 and config["threshold"] == float(row["threshold"])
    test = load_splits([both])[0]["test"]
    assert 0.3 < np.mean([row.get("response") is None for row in test]) < 0.7
    flagged = [verdict.flagged for verdict in load_guard(output / "config.json", device_id=-1).classify(test)]
    right = [flag != row["is_safe"] for flag, row in zip(flagged, test, strict=True)]
    assert float(row["test/accuracy"]) == pytest.approx(np.mean(right))

    pairs = write(tmp_path / "pairs.jsonl", rows)
    run(monkeypatch, model_folder, tmp_path / "pairs", "--dataset", pairs, "--epochs=1")
    assert read_config(tmp_path / "pairs")["guard"]["prompt_threshold"] == 2
    assert "refuses no prompt" in capsys.readouterr().out


def test_a_run_keeps_thresholds_for_several_rates(model_folder, tmp_path, monkeypatch):
    """Kills: points of another epoch or split, --max-fpr that is not heard, a rate above the one named."""
    safe = [n % 2 != (n % 11 == 0) for n in range(800)]  # so a few look like the other kind
    texts = [f"{n} {('harmful', 'bread')[n % 2]}" for n in range(800)]
    prompts = [{"prompt": text, "is_safe": is_safe} for text, is_safe in zip(texts, safe, strict=True)]
    pairs = [{**row, "prompt": row["prompt"] + "?", "response": row["prompt"]} for row in prompts]
    file, output = write(tmp_path / "rows.jsonl", prompts + pairs), tmp_path / "run"
    run(monkeypatch, model_folder, output, "--dataset", file, "--epochs=2")
    config = read_config(output)
    points, defaults = config["operating_points"], config["guard"]
    for name, kind in (("threshold", "answer"), ("prompt_threshold", "prompt")):
        assert points[kind]["0.02"][0] > defaults[name] == points[kind]["0.05"][0] > points[kind]["0.1"][0]
    for asked, taken in ((0.01, "0.01"), (0.049, "0.02"), (0.5, "0.1")):
        guard = load_guard(output / "config.json", device_id=-1, max_fpr=asked)
        assert guard.config.threshold == points["answer"][taken][0]
        assert guard.config.prompt_threshold == points["prompt"][taken][0]
    validation = [row for row in load_splits([file])[0]["validation"] if not row.get("response")]
    safe = [verdict.flagged for verdict in guard.classify([row for row in validation if row["is_safe"]])]
    assert len(safe) > 0 and np.mean(safe) <= 0.1  # the last guard's rate
    with pytest.raises(UserError, match=r"lowest rate with a threshold is 0\.005"):
        load_guard(output / "config.json", device_id=-1, max_fpr=0.001)


def test_adam_forgets_a_large_gradient_within_some_updates(model_folder, tmp_path, monkeypatch):
    """Kills: the usual second beta, with which larger models have collapsed."""
    file, output = write(tmp_path / "rows.jsonl", make_rows(80)), tmp_path / "run"
    run(monkeypatch, model_folder, output, "--dataset", file, "--epochs=1")
    [group] = torch.load(output / "checkpoints/state.pt")["optimizer"]["param_groups"]
    assert tuple(group["betas"]) == (0.9, 0.95)


def test_train_columns_are_of_every_so_many_rows_by_the_epochs_weights(model_folder, tmp_path, monkeypatch):
    """Kills: other rows, all rows, cut answers, the weights of another epoch, another threshold."""
    monkeypatch.setattr(train, "TRAIN_SAMPLE", 24)
    output = tmp_path / "run"
    rows = make_rows(80)
    for row in rows:  # so labels are learnt slowly, and from whole answers
        row["response"] += " it is not safe" * 3 * (not row["is_safe"])
    file = write(tmp_path / "rows.jsonl", rows)
    run(
        monkeypatch,
        model_folder,
        output,
        "--dataset",
        file,
        "--epochs=3",
        "--learning-rate=2e-4",
        f"--guard-prompt={QUESTION}",
    )
    splits, categories = load_splits([file])
    targets = labels(splits["train"], categories).numpy()
    found = table(output, "metrics.csv")
    assert len({row["train/auprc"] for row in found}) == 3  # so each epoch can be told from the others
    for row in found:
        epoch = output / f"checkpoints/epoch_{row['epoch']}.safetensors"
        guard = load_guard(output / "config.json", epoch, -1)
        ids = [encode_row(guard.tokenizer, row)[0] for row in splits["train"]]
        scores = guard.score(ids).double().sigmoid().numpy()
        wanted = metrics(targets[::3, 0], scores[::3, 0], float(row["threshold"]))
        assert wanted["auprc"] != pytest.approx(metrics(targets[:, 0], scores[:, 0], 0)["auprc"], abs=1e-6)
        columns = {name: float(row[f"train/{name}"]) for name in MEASURES}
        assert columns == pytest.approx(wanted, abs=1e-6, nan_ok=True)
        for k, name in enumerate(categories, 1):
            wanted = metrics(targets[::3, k], scores[::3, k], 0)["auprc"]
            assert float(row[f"train/{name}/auprc"]) == pytest.approx(wanted, abs=1e-6)


# ---------------------------------------------------------------------------
# Mistakes

BAD_ARGUMENTS = {  # {what is wrong: (arguments, what the message names)}
    "no epochs": (["--epochs=0"], "epochs"),
    "no rows in a batch": (["--per-device-batch-size=0"], "batch size"),
    "no rows in a scored batch": (["--eval-batch-size=0"], "batch size"),
    "no batches in an update": (["--gradient-accumulation-steps=0"], "steps"),
    "no updates between saved states": (["--save-steps=0"], "steps"),
    "no learning rate": (["--learning-rate=nan"], "learning rate"),
    "a seed below zero": (["--seed=-1"], "--seed"),
    "an unknown tracker": (["--report-to=junk"], "--report-to"),
    "an unknown path": (["--guard-path=half"], "--guard-path"),
    "no rank": (["--lora-r=0"], "r of at least 1"),
    "an infinite alpha": (["--lora-alpha=inf"], "finite alpha"),
    "a dropout of all": (["--lora-dropout=1"], "dropout"),
    "a rank above every width": (["--lora-r=1000"], "rank 1000"),
    "an unknown target": (["--lora-targets=q_proj,query"], "query"),
    "checkpointing on the path without need": (["--gradient-checkpointing"], "--guard-path full"),
    "no data": (["--dataset=none.jsonl"], "none.jsonl"),
    "nothing to resume": (["--resume"], "holds no run"),
    "caches on the path without any": (["--guard-path=full", "--cache-dir=caches"], "--cache-dir"),
}


@pytest.mark.parametrize(("arguments", "named"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments_are_refused_before_anything_is_written(
    arguments, named, model_folder, rows, tmp_path, monkeypatch, capsys
):
    """Kills: a check left out, another exit status, a message that does not say which argument is wrong, a
    folder left behind that looks like a run.
    """
    given = [model_folder, tmp_path / "run", "--dataset", rows, *arguments]
    with pytest.raises(SystemExit) as left:
        run(monkeypatch, *given, command=lambda: common.run(train.main))
    last = capsys.readouterr().err.splitlines()[-1]
    assert left.value.code == 2 and last.startswith("train.py: ") and named in last
    assert not (tmp_path / "run").exists() and not Path("caches").exists()


def test_resume_without_a_folder_is_refused(monkeypatch, capsys):
    """Kills: a new run instead of the one that the user means."""
    with pytest.raises(SystemExit):
        run(monkeypatch, "--resume")
    assert "--resume needs the run to go on with" in capsys.readouterr().err


def test_an_unguardable_model_is_refused_before_the_folder_is_taken(rows, tmp_path, monkeypatch):
    """Kills: a refusal in the first step, so the corrected command finds its folder taken."""
    config, reasons = REFUSED["hybrid of convolution and attention"]
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "hybrid")
    make_tokenizer().save_pretrained(tmp_path / "hybrid")
    for options in ([], ["--cache-dir", tmp_path / "caches"]):
        with pytest.raises(UserError, match=reasons["activated"]):
            run(monkeypatch, tmp_path / "hybrid", tmp_path / "run", "--dataset", rows, *options)
        assert not (tmp_path / "run").exists()


def test_a_mistake_is_one_line_and_exit_status_2(model_folder, tmp_path):
    """Kills: a traceback for a user's mistake, and exit status 1, which means a crash."""
    command = [sys.executable, SCRIPT, model_folder, tmp_path / "run", "--dataset", "none.jsonl"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2 and "train.py: " in result.stderr and result.stderr.count("\n") == 1
