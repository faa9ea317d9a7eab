"""The folder of a run: what is saved, how a killed run goes on, and what is refused."""

import contextlib
import errno
import itertools
import json
import os
import shutil
import signal
from datetime import date, timedelta
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import make_guard, make_model, make_tokenizer, write
from test_train import FAST, MEASURES, close, learnable, read_config, run, table, tensors, write_learnable

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
    return write_learnable(tmp_path / "rows.jsonl")


def files(output):
    """{path: content} of a run's files but its state, which torch writes in more than one way."""
    paths = [path for path in output.rglob("*") if path.is_file() and path.name != "state.pt"]
    return {path.relative_to(output): path.read_bytes() for path in paths}


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


# ---------------------------------------------------------------- what is saved


def test_a_split_without_rows_has_no_scores():
    """Kills: a run that ends after its first epoch because no row fell into the test split."""
    assert training_run.score(start_accelerator(), make_guard(), [], 8).shape == (0, 3)


def test_the_curves_show_the_losses_and_every_split(tmp_path, monkeypatch):
    """Kills: a split or an epoch left out, losses over epochs, lines without names."""
    figure = pytest.importorskip("matplotlib.figure").Figure()
    monkeypatch.setattr("matplotlib.figure.Figure", lambda **_: figure)
    losses = [{"update": n, "loss": 1 / n} for n in range(1, 5)]
    rows = [{f"{split}/auprc": n / 10 + k / 100 for k, split in enumerate(SPLITS)} for n in (1, 2)]
    state = {"losses": losses, "metrics": [{"epoch": n, **row} for n, row in enumerate(rows, 1)]}
    training_run.draw_curves(tmp_path / "curves.png", state)
    left, right = figure.axes
    drawn = {line.get_label(): line.get_xydata().flatten().tolist() for line in right.lines}
    assert drawn == {s: [1, rows[0][f"{s}/auprc"], 2, rows[1][f"{s}/auprc"]] for s in SPLITS}
    assert left.lines[0].get_xydata().tolist() == [[n, 1 / n] for n in range(1, 5)] and right.get_legend()
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("options", [[], BARE, ["--guard-path=full"]], ids=["default", "bare", "full"])
def test_a_saved_guard_gives_what_was_measured(options, precision, model_folder, rows, tmp_path, monkeypatch):
    """Kills: a calibration that is not folded in, or another epoch's; scores in bf16, of other rows."""
    measured = []

    def spy(logits, calibration, unsafe_head):
        measured.append((logits, calibration, unsafe_score(logits, calibration, unsafe_head)))
        return measured[-1][2]

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    monkeypatch.setattr(training_run, "unsafe_score", spy)
    monkeypatch.setattr(training_run, "TRAIN_SAMPLE", 24)  # of 66 rows
    output = tmp_path / "run"
    run(monkeypatch, model_folder, output, "--dataset", rows, "--epochs=2", "--learning-rate=0.003", *options)
    assert read_config(output)["arguments"]["mixed_precision"] == precision
    best = max(table(output, "metrics.csv"), key=lambda row: float(row["validation/auprc"]))
    guard = load_guard(output / "config.json", device_id=-1)
    splits, names, _ = load_splits([rows])
    of_best = measured[3 * (int(best["epoch"]) - 1) :][:3]
    for split, (logits, (shift, temperature), unsafe) in zip(SPLITS, of_best, strict=True):
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
    trained = sum(tensor.numel() for tensor in learnt.values())
    head = sum(learnt[name].numel() for name in learnt if "guard_head" in name)
    whole = sum(parameter.numel() for parameter in make_model().parameters())
    counts = {"chat_model": whole, "lora": trained - head, "guard_head": head, "trained": trained}
    counts["trained_share_of_chat_model"] = trained / whole
    assert json.loads((output / "parameter_counts.json").read_text()) == counts


# ---------------------------------------------------------------- going on


def test_a_killed_run_goes_on_from_its_last_state(model_folder, rows, tmp_path, monkeypatch):
    """Kills: an epoch that starts anew; an order, cuts, dropout or a rate that a resumed run has not."""
    arguments = ["--dataset", rows, "--epochs=3", "--lora-dropout=0.1", "--learning-rate=0.005"]
    arguments += ["--per-device-batch-size=4", "--gradient-accumulation-steps=2", "--save-steps=2"]
    assert die_at(monkeypatch, None, model_folder, tmp_path / "whole", *arguments) == list(range(27))
    resume = []
    for moment, first in {0: 0, 1: 0, 14: 0, 17: 14, 18: 16, 25: 18, None: 24}.items():
        begun = die_at(monkeypatch, moment, model_folder, tmp_path / "killed", *arguments, *resume)
        assert begun == list(range(first, 27 if moment is None else moment))
        resume = ["--resume"]
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


@pytest.mark.slow
def test_an_end_at_any_write_changes_no_byte(model_folder, tmp_path, monkeypatch):
    """Kills: files that do not fit together, one that is overwritten in place, parts that are left behind."""
    some = write(tmp_path / "some.jsonl", learnable()[:40])
    options = ["--per-device-batch-size=12", "--save-steps=2", "--lora-dropout=0.1"]  # 3 updates an epoch
    arguments = ["--dataset", some, *FAST, *options]
    # Every epoch counts as the best, so an adapter and its config are also written over older ones.
    monkeypatch.setattr(training_run, "best_epoch", lambda state: state["metrics"][-1])
    fsync = Mock()
    monkeypatch.setattr(os, "fsync", fsync)
    run(monkeypatch, model_folder, tmp_path / "whole", *arguments)
    assert fsync.call_count == 18  # 2 writes at the start, 6 after each epoch, and 4 states
    for number in range(18):
        output, calls = tmp_path / f"{number} writes", itertools.count()
        end = OSError(errno.ENOSPC, "No space left") if number % 3 else Death()

        def ends(file, calls=calls, number=number, end=end):
            if next(calls) == number:
                os.ftruncate(file, os.fstat(file).st_size // 2)  # what a crash may leave
                raise end

        with monkeypatch.context() as patch, pytest.raises((Death, OSError)) as ended:
            patch.setattr(os, "fsync", ends)
            patch.setattr(os, "getpid", lambda: 7)  # the process that goes on has another id
            run(patch, model_folder, output, *arguments)
        if ended.type is OSError:
            assert Path(ended.value.filename).is_relative_to(output) and not list(output.rglob("*.tmp"))
        began = (output / "config.json").exists()
        if not began:
            shutil.rmtree(output)
        run(monkeypatch, model_folder, output, *arguments, *["--resume"] * began)
        assert files(output) == files(tmp_path / "whole")


@pytest.mark.slow
def test_a_resume_may_change_what_changes_no_result(model_folder, rows, tmp_path, monkeypatch):
    """Kills: names of files that are compared, a date or a dtype of the day that a run goes on."""
    make_model().to(torch.bfloat16).save_pretrained(model_folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + tokenizer.chat_template
    tokenizer.save_pretrained(model_folder)
    shutil.copytree(model_folder, tmp_path / "moved")
    (tmp_path / "link").symlink_to(model_folder)
    same = shutil.copy(rows, tmp_path / "same.jsonl")
    monkeypatch.chdir(tmp_path)
    options = [*FAST, "--lora-dropout=0.1", "--save-steps=3", "--guard-path=full", "--dataset"]
    monkeypatch.setattr(checkpoint, "product_seconds", lambda _, kind: kind == "bfloat16")
    run(monkeypatch, model_folder, "whole", *options, rows)
    die_at(monkeypatch, 7, model_folder, "killed", *options, rows)
    monkeypatch.setattr(model, "date", Mock(today=lambda: date.today() + timedelta(days=1)))
    monkeypatch.setattr(checkpoint, "product_seconds", lambda _, kind: kind == "float32")
    bases = ["chat-model", "killed/../chat-model", "link", "moved", tmp_path / "moved"]
    others = ["--eval-batch-size=3", "--report-to=tensorboard", "--gradient-checkpointing", "--save-steps=7"]
    given = [[base, "resumed", *options, rows] for base in bases]
    given += [[model_folder, "resumed", *options, same, other] for other in others]
    for arguments in given:
        shutil.copytree("killed", "resumed")
        run(monkeypatch, *arguments, "--resume")
        assert close(tensors("resumed"), tensors("whole"), 1e-5), arguments
        shutil.rmtree("resumed")


# ---------------------------------------------------------------- what is refused

OTHER = """--guard-path=full --guard-prompt=bread --lora-targets=q_proj --lora-r=3 --lora-alpha=31
--lora-dropout=0.01 --no-unsafe-head --no-clf-head-bias --epochs=2 --per-device-batch-size=8
--gradient-accumulation-steps=2 --learning-rate=0.002 --seed=1 --verdict-every=7
--dtype=bfloat16"""  # in LEARNING's order


@pytest.fixture
def finished(model_folder, rows, tmp_path, monkeypatch):
    """A run of one epoch, and a function that tries to go on with it and expects a refusal."""
    arguments = [model_folder, tmp_path / "run", "--dataset", rows, "--epochs=1"]

    def refused(match, *options):
        with pytest.raises(UserError, match=match) as error:
            run(monkeypatch, *arguments, *options, "--resume")
        assert "\n" not in str(error.value)

    run(monkeypatch, *arguments)
    return tmp_path / "run", refused


def test_a_resume_with_other_settings_rows_or_models_is_refused_by_name(
    finished, model_folder, rows, monkeypatch
):
    """Kills: an argument that is not compared, other rows under the same name, another model at its place."""
    output, refused = finished
    before = files(output)
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
    other = make_model()
    torch.nn.init.constant_(other.model.norm.weight, 2)
    other.save_pretrained(model_folder)
    refused(r"differs: norms$")
    make_model("qwen2").save_pretrained(model_folder)
    refused(r"differs: config, norms$")
    assert files(output) == before


def damaged(state):
    """Yield what torch can read and this run cannot have saved."""
    yield from ([1], {"update": 3}, state | {"update": 10**6}, state | {"losses": []})
    yield state | {"run": state["run"] | {"seed": 1}}  # of another run
    optimizer, moments = state["optimizer"], state["optimizer"]["state"]
    for wrong in (torch.tensor(1.0), torch.ones(1), torch.ones(3, 3), torch.full((3, 32), torch.nan)):
        yield state | {"adapter": state["adapter"] | {"guard_head.weight": wrong}}
        changed = moments | {0: moments[0] | {"exp_avg": wrong}}
        yield state | {"optimizer": optimizer | {"state": changed}}


def test_a_damaged_state_is_refused(finished):
    """Kills: a state of another run that torch can read, a pipe that is waited for."""
    output, refused = finished
    path = output / "checkpoints/state.pt"
    whole = path.read_bytes()
    for state in damaged(torch.load(path)):
        torch.save(state, path)
        refused(r"state\.pt ")
    for end in (-100, 0):
        path.write_bytes(whole[:end])
        refused(r"state\.pt is damaged")
    path.unlink()
    os.mkfifo(path)
    signal.signal(signal.SIGALRM, Mock(side_effect=Death))
    signal.alarm(10)
    refused(r"state\.pt ")
    signal.alarm(0)


def test_a_folder_that_cannot_be_the_runs_is_refused_first(model_folder, rows, tmp_path, monkeypatch):
    """Kills: a finished run that is overwritten, a minute of loading before a refusal."""

    def refused(match, *arguments):
        with pytest.raises(UserError, match=match):
            run(monkeypatch, model_folder, *arguments, "--dataset", rows)

    monkeypatch.setattr(train, "load_chat_model", Mock(side_effect=Death))
    monkeypatch.setattr(train, "load_splits", Mock(side_effect=Death))
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text("another run's")
    refused("holds another run", tmp_path)
    assert Path("config.json").read_text() == "another run's"
    refused("holds no run to go on with", tmp_path, "--resume")  # what is there is no config
    refused("holds no run to go on with", "none", "--resume")
    Path("stale/checkpoints").mkdir(parents=True)
    refused("holds another run", "stale")  # its state would be taken for the new run's
    refused("is no folder to write in", rows)
    refused("is no folder to write in", f"{rows}/run")
    if os.getuid():  # root may write everywhere
        Path("closed").mkdir(mode=0o500)
        refused("is no folder to write in", "closed/run")
    assert not Path("none").exists() and not Path("runs").exists()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "check_folder", lambda *_: None)  # as if both had looked before either wrote
    refused("holds another run", "stale")
