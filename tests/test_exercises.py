"""The exercises: their tests pass for the solutions, and fail for what is unsolved or wrong."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from exercises import test_all

EXERCISES = Path(test_all.__file__).parent
NAMES = sorted(path.stem for path in EXERCISES.glob("[0-9]*.py"))
WRONG = [  # (exercise, a part of its solution, what a learner may write in its place)
    ("1_lora", "lora_alpha / r", "r / lora_alpha"),
    ("1_lora", "torch.zeros(", "torch.randn("),
    ("1_lora", "not self.gate.is_open", "False"),
    ("1_lora", ".requires_grad_(False)", ""),
    ("2_gate", "class Gate(threading.local)", "class Gate"),
    ("2_gate", "self.is_open = previous", "self.is_open = False"),
    ("2_gate", "other.submit(lambda: gate.is_open).result()", "gate.is_open"),
    ("3_cache", "fork(cache), ", "cache, "),
    ("3_cache", "    forked.layers = [copy.copy(layer) for layer in cache.layers]\n", ""),
    ("3_cache", "    forked = copy.copy(cache)\n", "    return copy.deepcopy(cache)\n"),
    ("3_cache", "with gate.opened():", "if True:"),
    ("4_loss", "(~labels.isnan()).sum(0)", "len(labels)"),
    ("4_loss", "(known - positives) / positives", "positives / (known - positives)"),
    ("4_loss", "labels.nan_to_num()", "labels"),
    ("4_loss", "(bce[:, 0].mean() + categories) / 2", "bce.mean()"),
    ("5_threshold", "(labels == 0).sum()", "len(labels)"),
    ("5_threshold", "np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)", "np.arange(len(scores))"),
    ("5_threshold", "/ labels.sum()", "/ len(labels)"),
]


def check(name, code):
    """Run an exercise's test on this code."""
    written = {"__name__": name}
    exec(compile(code, name, "exec"), written)
    getattr(test_all, f"test_{name}")(SimpleNamespace(**written))


@pytest.mark.parametrize("name", NAMES)
def test_solution_passes_and_unsolved_exercise_fails(name):
    """Kills: a test that no right answer passes, one that passes before anything is written."""
    check(name, (EXERCISES / f"solutions/{name}.py").read_text())
    with pytest.raises(NotImplementedError):
        check(name, (EXERCISES / f"{name}.py").read_text())


@pytest.mark.parametrize(("name", "right", "wrong"), WRONG)
def test_wrong_solution_fails(name, right, wrong):
    """Kills: a test that misses one of the likely mistakes."""
    code = (EXERCISES / f"solutions/{name}.py").read_text()
    assert right in code
    with pytest.raises(AssertionError):
        check(name, code.replace(right, wrong))
