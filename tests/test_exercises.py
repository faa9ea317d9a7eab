"""The exercises: their tests pass for the solutions, and fail for what is unsolved or wrong."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from exercises import test_all

EXERCISES = Path(test_all.__file__).parent
NAMES = sorted(path.stem for path in EXERCISES.glob("[0-9]*.py"))
CROPPED = """    with gate.opened():
        hidden = chat_model.base_model(guard_prompt_ids, past_key_values=cache).last_hidden_state
    cache.crop(-guard_prompt_ids.shape[1])
    return hidden[:, -1]
"""
QUANTILE = """    threshold = np.quantile(scores[labels == 0], 1 - rate)
    return threshold, (scores[labels == 1] >= threshold).mean()
"""
WRONG = {  # {exercise: {mistake: (a part of the solution, what a learner may write in its place)}}
    "1_lora": {
        "no scaling": ("lora_alpha / r", "1"),
        "scaling upside down": ("lora_alpha / r", "r / lora_alpha"),
        "B is not zero at first": ("torch.zeros(", "torch.randn("),
        "A is zero too": (
            "nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))",
            "nn.init.zeros_(self.lora_A)",
        ),
        "gate not read": ("not self.gate.is_open", "False"),
        "gate as a factor": (
            "        if not self.gate.is_open:\n            return y\n",
            "        x = x * self.gate.is_open\n",
        ),
        "W learns": (".requires_grad_(False)", ""),
    },
    "2_gate": {
        "one state for all threads": ("class Gate(threading.local)", "class Gate"),
        "inner block shuts it": ("self.is_open = previous", "self.is_open = False"),
        "error leaves it open": (
            "        try:\n            yield\n        finally:\n            ",
            "        yield\n        ",
        ),
        "asked in the same thread": ("other.submit(lambda: gate.is_open).result()", "gate.is_open"),
    },
    "3_cache": {
        "cache grows": ("fork(cache), ", "cache, "),
        "layers are shared": ("    forked.layers = [copy.copy(layer) for layer in cache.layers]\n", ""),
        "deep copy": ("    forked = copy.copy(cache)\n", "    return copy.deepcopy(cache)\n"),
        "cropping": ("    options =", CROPPED + "    options ="),
        "gate stays shut": ("with gate.opened():", "if True:"),
    },
    "4_loss": {
        "unknown is safe in the weights": ("(~labels.isnan()).sum(0)", "len(labels)"),
        "weights upside down": ("(known - positives) / positives", "positives / (known - positives)"),
        "unknown is safe in the loss": ("    bce = bce.masked_fill(labels.isnan(), 0)  # (B, 1 + K)\n", ""),
        "NaN gradients": ("labels.nan_to_num()", "labels"),
        "a sum over the categories": ("bce[:, 1:].mean()", "bce[:, 1:].sum(1).mean()"),
        "one mean over all": ("(bce[:, 0].mean() + categories) / 2", "bce.mean()"),
    },
    "5_threshold": {
        "quantile of the harmless": ("    order =", QUANTILE + "    order ="),
        "rate of all rows": ("(labels == 0).sum()", "len(labels)"),
        "equal scores told apart": (
            "np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)",
            "np.arange(len(scores))",
        ),
        "flags only what is above": ("thresholds)[best]", "thresholds)[min(best + 1, len(thresholds))]"),
        "recall of all rows": ("/ labels.sum()", "/ len(labels)"),
    },
}


def check(name, code):
    """Run an exercise's test on this code."""
    written = {"__name__": name}
    exec(compile(code, name, "exec"), written)
    getattr(test_all, f"test_{name}")(SimpleNamespace(**written))


@pytest.mark.parametrize("name", NAMES)
def test_solution_passes(name):
    """Kills: a test that no right answer passes."""
    check(name, (EXERCISES / f"solutions/{name}.py").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_unsolved_exercise_fails(name):
    """Kills: a test that passes before anything is written, a solution left in its exercise."""
    with pytest.raises(NotImplementedError):
        check(name, (EXERCISES / f"{name}.py").read_text())


@pytest.mark.parametrize(("name", "mistake"), [(name, mistake) for name in NAMES for mistake in WRONG[name]])
def test_wrong_solution_fails(name, mistake):
    """Kills: a test that misses one of the likely mistakes."""
    code, (right, wrong) = (EXERCISES / f"solutions/{name}.py").read_text(), WRONG[name][mistake]
    assert right in code
    with pytest.raises(RuntimeError if mistake == "cropping" else AssertionError):
        check(name, code.replace(right, wrong))


def test_exercises_are_short():
    """Kills: an exercise that outgrows a page, solutions of more than 30 lines, 350 lines in all."""
    lines = {path: len(path.read_text().splitlines()) for path in EXERCISES.rglob("*.py")}
    assert sum(lines.values()) <= 350
    assert max(n for path, n in lines.items() if path.parent.name == "solutions") <= 30
