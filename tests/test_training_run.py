"""The folder of a run: what is saved, how a killed run goes on, and what is refused."""

import contextlib
import json
import shutil
from datetime import date, timedelta
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer, write
from test_train import FAST, MEASURES, close, files, learnable, read_config, run, table, tensors

import checkpoint
import model
import train
import training_run
from checkpoint import load_guard, start_accelerator
from data import SPLITS, labels, load_splits
from errors import UserError
from metrics import metrics, unsafe_score

BARE = ["--no-unsafe-head", "--no-clf-head-bias"]


class Death(BaseException):
    """Ends a run as a kill does: no code of the run is called any more that could tidy up."""


@pytest.fixture
def rows(tmp_path):
    return write(tmp_path / "rows.jsonl", learnable())


def die_at(monkeypatch, moment, *arguments):
    """Call train.main() until update number `moment` begins. Returns the numbers of the updates before."""
    begun = []
    rate = train.learning_rate

    def begin(update, updates, peak):
        if update == moment:
            raise Death
        begun.append(update)
        return rate(update, updates, peak)

    with monkeypatch.context() as patch, contextlib.suppress(Death):
        patch.setattr(train, "learning_rate", begin)
        run(patch, *arguments)
    return begun


CASES = {  # {name: (options, mixed precision)}
    "default": ([], "no"),
    "bare": (BARE, "no"),
    "head alone": (["--lora-targets=none"], "no"),
    "full": (["--guard-path=full"], "bf16"),
}


@pytest.mark.parametrize(("options", "precision"), CASES.values(), ids=CASES)
def test_a_saved_guard_gives_what_was_measured(options, precision, model_folder, rows, tmp_path, monkeypatch):
    """Kills: no calibration, or another epoch's; scores in bf16, of other rows, none; LoRA for "none"."""
    measured = Mock(wraps=unsafe_score)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    monkeypatch.setattr(training_run, "unsafe_score", measured)
    monkeypatch.setattr(training_run, "TRAIN_SAMPLE", 24)  # of 66 rows
    output = tmp_path / "run"
    run(monkeypatch, model_folder, output, "--dataset", rows, "--epochs=2", "--learning-rate=0.003", *options)
    assert read_config(output)["arguments"]["mixed_precision"] == precision
    best = max(table(output, "metrics.csv"), key=lambda row: float(row["validation/auprc"]))
    guard = load_guard(output / "config.json", device_id=-1)
    splits, names, _ = load_splits([rows])
    of_best = measured.call_args_list[3 * (int(best["epoch"]) - 1) :][:3]
    for split, call in zip(SPLITS, of_best, strict=True):
        logits, (shift, temperature), _ = call.args
        unsafe = unsafe_score(*call.args)
        chosen = np.random.default_rng(0).permutation(len(splits[split]))[:24]
        sample = [splits[split][n] for n in chosen] if split == "train" else splits[split]
        z = (logits.astype(float) - shift) / temperature  # (N, 3)
        assert np.abs(z - logits).max() > 0.1  # so the calibration changes something
        verdicts = guard.classify(sample)
        found = np.array([[v.unsafe, *v.categories.values()] for v in verdicts])  # (N, 3)
        assert np.abs(found - np.c_[unsafe, 1 / (1 + np.exp(-z[:, 1:]))]).max() < 1e-5
        flagged = np.array([v.flagged for v in verdicts])
        wanted = metrics(labels(sample, names)[:, 0].numpy(), unsafe, flagged)
        columns = {name: float(best[f"{split}/{name}"]) for name in MEASURES}
        assert columns == pytest.approx(wanted, nan_ok=True)
    learnt = torch.load(output / "checkpoints/state.pt")["adapter"]  # not calibrated
    assert ("guard_head.bias" in learnt) == guard.config.unsafe_head == (options != BARE)
    assert "guard_head.bias" in tensors(output) and guard.config.clf_head_bias
    counts = json.loads((output / "parameter_counts.json").read_text())
    assert counts["trained"] == sum(tensor.numel() for tensor in learnt.values())
    assert counts["lora"] == sum(tensor.numel() for name, tensor in learnt.items() if "lora" in name)
    assert (counts["lora"] == 0) == ("--lora-targets=none" in options)
    assert counts["guard_head"] == counts["trained"] - counts["lora"] > 0
    assert counts["chat_model"] == sum(parameter.numel() for parameter in make_model().parameters())
    assert training_run.score(start_accelerator(), guard, [], 8).shape == (0, 3)  # as of an empty test split


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(model_folder, rows, tmp_path, monkeypatch):
    """Kills: an epoch that starts anew or is saved twice; other orders, cuts or rates; parts left behind."""
    killed = tmp_path / "killed"
    arguments = ["--dataset", rows, "--epochs=3", "--lora-dropout=0.1", "--learning-rate=0.005"]
    arguments += ["--per-device-batch-size=4", "--gradient-accumulation-steps=2", "--save-steps=2"]
    assert die_at(monkeypatch, None, model_folder, tmp_path / "whole", *arguments) == list(range(27))
    resume = []
    for moment, first in {0: 0, 14: 0, 17: 14, 18: 16, 25: 18}.items():
        begun = die_at(monkeypatch, moment, model_folder, killed, *arguments, *resume)
        assert begun == list(range(first, moment))
        resume = ["--resume"]
    (killed / "adapter.safetensors.7.tmp").write_bytes(b"half of an adap")
    with monkeypatch.context() as patch:  # between the files of the last epoch and its state
        patch.setattr(training_run, "draw_curves", Mock(side_effect=Death))
        assert die_at(patch, None, model_folder, killed, *arguments, "--resume") == [24, 25, 26]
    assert die_at(monkeypatch, None, model_folder, killed, *arguments, "--resume") == [26]
    assert files(killed) == files(tmp_path / "whole")


def test_a_resume_may_change_what_changes_no_result(model_folder, rows, tmp_path, monkeypatch):
    """Kills: file names that are compared, today's date or dtype, the dtype of computation as the model's."""
    make_model().to(torch.bfloat16).save_pretrained(model_folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + tokenizer.chat_template
    tokenizer.save_pretrained(model_folder)
    options = [*FAST, "--lora-dropout=0.1", "--save-steps=3", "--guard-path=full", "--dataset"]
    monkeypatch.setattr(checkpoint, "product_seconds", lambda _, kind: kind == "bfloat16")
    run(monkeypatch, model_folder, tmp_path / "whole", *options, rows)
    config = read_config(tmp_path / "whole")
    assert (config["dtype"], config["arguments"]["compute_dtype"]) == ("bfloat16", "float32")
    die_at(monkeypatch, 7, model_folder, tmp_path / "killed", *options, rows)
    monkeypatch.setattr(model, "date", Mock(today=lambda: date.today() + timedelta(days=1)))
    monkeypatch.setattr(checkpoint, "product_seconds", lambda _, kind: kind == "float32")
    moved = shutil.move(model_folder, tmp_path / "moved")
    options += [shutil.copy(rows, tmp_path / "same.jsonl"), "--resume", "--gradient-checkpointing"]
    options += ["--eval-batch-size=3", "--report-to=tensorboard", "--save-steps=7"]
    run(monkeypatch, moved, tmp_path / "killed", *options)
    assert close(tensors(tmp_path / "killed"), tensors(tmp_path / "whole"), 1e-5)


def test_the_curves_show_the_losses_and_every_split(tmp_path, monkeypatch):
    """Kills: a split or an epoch left out, losses over epochs, lines without names."""
    figure = pytest.importorskip("matplotlib.figure").Figure()
    monkeypatch.setattr("matplotlib.figure.Figure", lambda **_: figure)
    rows = [{f"{split}/auprc": n / 10 + k / 100 for k, split in enumerate(SPLITS)} for n in (1, 2)]
    metrics = [{"epoch": n, **row} for n, row in enumerate(rows, 1)]
    losses = [{"update": 1, "loss": 0.5}, {"update": 2, "loss": 0.25}]
    training_run.draw_curves(tmp_path / "curves.png", {"losses": losses, "metrics": metrics})
    left, right = figure.axes
    drawn = {line.get_label(): line.get_xydata().flatten().tolist() for line in right.lines}
    assert drawn == {s: [1, rows[0][f"{s}/auprc"], 2, rows[1][f"{s}/auprc"]] for s in SPLITS}
    assert left.lines[0].get_xydata().tolist() == [[1, 0.5], [2, 0.25]] and right.get_legend()


OTHER = """--guard-path=full --guard-prompt=bread --lora-targets=q_proj --lora-r=3 --lora-alpha=31
--lora-dropout=0.01 --no-unsafe-head --no-clf-head-bias --epochs=2 --per-device-batch-size=8
--gradient-accumulation-steps=2 --learning-rate=0.002 --seed=1 --verdict-every=7
--dtype=bfloat16"""  # in LEARNING's order


def test_a_resume_of_another_run_or_a_damaged_one_is_refused(model_folder, rows, tmp_path, monkeypatch):
    """Kills: an argument, a row or a model not compared, a state that is another run's or does not fit."""
    output = tmp_path / "run"
    arguments = [model_folder, output, "--dataset", rows, "--epochs=1"]
    run(monkeypatch, *arguments)
    before, path = files(output), output / "checkpoints/state.pt"
    whole, state = path.read_bytes(), torch.load(path)

    def refused(match, *options):
        with pytest.raises(UserError, match=match) as error:
            run(monkeypatch, *arguments, *options, "--resume")
        assert "\n" not in str(error.value)

    optimizer, moments = state["optimizer"], state["optimizer"]["state"]
    for wrong in (
        {"losses": []},
        {"run": state["run"] | {"seed": 1}},
        {"adapter": state["adapter"] | {"guard_head.weight": torch.ones(1)}},
        {"optimizer": optimizer | {"state": moments | {0: moments[0] | {"exp_avg": torch.ones(1)}}}},
    ):
        torch.save(state | wrong, path)
        refused(r"state\.pt ")
    path.write_bytes(whole[:-100])
    refused(r"state\.pt is damaged")
    given = [name for name in training_run.LEARNING if name not in ("num_processes", "mixed_precision")]
    for name, option in zip(given, OTHER.split(), strict=True):
        refused(rf"differs: {name}$", option)
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        refused(r"differs: mixed_precision$")
    text = Path(rows).read_text()
    for old, new in (("safe safe", "safe"), ('"hate": true', '"hate": false'), ('"hate"', '"greed"')):
        Path(rows).write_text(text.replace(old, new))
        refused(r"differs: test, train, validation$")
    Path(rows).write_text(text)
    make_model("qwen2").save_pretrained(model_folder)
    refused(r"differs: config, norms$")
    assert files(output) == before


def test_a_run_takes_a_free_folder_or_is_refused_first(model_folder, rows, tmp_path, monkeypatch):
    """Kills: a finished run that is overwritten, loading before a refusal, a folder that is not free."""

    def refused(match, *arguments):
        with pytest.raises(UserError, match=match):
            run(monkeypatch, model_folder, *arguments, "--dataset", rows)

    monkeypatch.setattr(train, "load_chat_model", Mock(side_effect=Death))
    monkeypatch.setattr(train, "load_splits", Mock(side_effect=Death))
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text("another run's")
    refused("holds another run", tmp_path)
    refused("holds no run to go on with", tmp_path, "--resume")  # what is there is no config
    refused("holds no run to go on with", "none", "--resume")
    assert Path("config.json").read_text() == "another run's" and not Path("none").exists()
    Path("stale/checkpoints").mkdir(parents=True)
    refused("holds another run", "stale")  # its state would be taken for the new run's
    refused("is no folder to write in", f"{rows}/run")
    for name in ("runs/1", "runs/3"):
        Path(name).mkdir(parents=True)
    assert training_run.run_folder(None, False) == Path("runs/2")
    assert training_run.run_folder(Path("mine"), False) == Path("mine")
