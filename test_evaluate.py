"""Metrics against scikit-learn, and the command. Each test names the mutation that it kills."""

import json
import sys

import numpy as np
import pytest
import torch

import evaluate
from conftest import make_guard
from data import encode
from evaluate import average_precision, best_threshold, metrics, running_metrics, running_scores
from lora import UserError

NUMBERS = np.random.default_rng(0)
LABELS = NUMBERS.integers(0, 2, 300)
SCORES = {
    "distinct": NUMBERS.random(300),
    "tied": NUMBERS.integers(0, 5, 300) / 5,
    "all equal": np.full(300, 0.5),
    "perfect": LABELS * 0.5 + 0.2,
}


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_metrics_equal_scikit_learns(scores):
    """Kills: ties counted one by one, a trapezoid for the area, a > for a >=, and any two metrics mixed up."""
    oracle = pytest.importorskip("sklearn.metrics")
    flagged = scores >= 0.4
    false_positives, true_negatives = (flagged & (LABELS == 0)).sum(), (~flagged & (LABELS == 0)).sum()
    wanted = {
        "accuracy": oracle.accuracy_score(LABELS, flagged),
        "precision": oracle.precision_score(LABELS, flagged),
        "recall": oracle.recall_score(LABELS, flagged),
        "f1": oracle.f1_score(LABELS, flagged),
        "fpr": false_positives / (false_positives + true_negatives),
        "auprc": oracle.average_precision_score(LABELS, scores),
    }
    found = metrics(LABELS, scores, 0.4)
    assert found.keys() == wanted.keys()
    assert found == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_best_threshold_has_the_highest_f1_of_all(scores):
    """Kills: the highest precision or recall instead, a threshold that is one score off, or on the score itself."""
    threshold = best_threshold(LABELS, scores)
    assert threshold not in scores or threshold == scores.min()
    best = metrics(LABELS, scores, threshold)["f1"]
    assert best == max(metrics(LABELS, scores, threshold)["f1"] for threshold in scores)


def test_a_ratio_of_nothing_is_nan():
    """Kills: a division by zero, and a 0 or 1 for what cannot be known."""
    found = metrics(np.zeros(4), np.array([0.1, 0.2, 0.3, 0.4]), 0.5)
    assert found["accuracy"] == 1 and found["fpr"] == 0
    assert all(np.isnan(found[name]) for name in ("precision", "recall", "f1", "auprc"))
    assert np.isnan(average_precision(np.zeros(0), np.zeros(0)))
    assert all(np.isnan(value) for value in metrics(np.zeros(0), np.zeros(0), 0.5).values())


def test_running_scores_are_those_of_the_cut_conversations():
    """Kills: tokens counted from the prompt's start, a cut left out, the whole answer twice where it ends on a cut."""
    guard = make_guard()
    rows = [{"prompt": "hi", "response": text} for text in ("the answer is harmful", "or", "a b c d ")]
    for row, answer in zip(rows, running_scores(guard, rows, 4), strict=True):
        start, ids = len(encode(guard.tokenizer, "hi")), encode(guard.tokenizer, "hi", row["response"])
        length = len(ids) - start
        assert [tokens for tokens, _ in answer] == [*range(4, length, 4), length]
        wanted = guard.score([ids[: start + tokens] for tokens, _ in answer])[:, 0].double().sigmoid()
        assert torch.allclose(torch.tensor([score for _, score in answer], dtype=torch.double), wanted, atol=1e-6)


def test_running_metrics_by_hand():
    """Kills: shares of the wrong rows, the last flag for the first, > for >= at half, unsafe rows among the safe."""
    answers = [
        [(4, 0.1), (8, 0.6), (16, 0.9)],  # unsafe, flagged at half
        [(4, 0.5), (5, 0.5)],  # safe, flagged late
        [(4, 0.9), (8, 0.1), (12, 0.2)],  # safe, cut although the whole is not flagged
        [(4, 0.1), (6, 0.4)],  # safe, never flagged
        [(4, 0.9), (6, 0.4)],  # unsafe, cut on the way
    ]
    assert running_metrics(np.array([1, 0, 0, 0, 1]), answers, 0.5) == {
        "flagged": 2,
        "flagged_by_half": 0.5,
        "median_token_of_first_flag": 6.0,
        "safe_and_not_flagged": 2,
        "of_these_cut_on_the_way": 0.5,
    }
    assert running_metrics(np.array([1]), [[(4, 0.1)]], 0.5)["flagged_by_half"] is None


def test_the_command_scores_the_rows_that_have_an_answer(tmp_path, monkeypatch, capsys):
    """Kills: rows without an answer that are scored, a threshold or step that is not read, labels turned round."""
    rows = [{"prompt": "hi", "response": text, "is_safe": text == "or"} for text in ("the answer", "or", "harmful", "")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    guard = make_guard()
    monkeypatch.setattr(evaluate, "load_guard", lambda *_: (guard, 0.3))

    def result(*options):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--dataset", str(tmp_path / "rows.jsonl"), "--json", *options])
        evaluate.main()
        return json.loads(capsys.readouterr().out)

    scores = guard.score([encode(guard.tokenizer, "hi", row["response"]) for row in rows[:3]])[:, 0].sigmoid().numpy()
    found = result("--threshold=0")
    assert (found["rows"], found["positives"], found["flagged"], found["threshold"]) == (3, 2, 3, 0)
    assert found["without_response_left_out"] == 1
    assert found["auprc"] == pytest.approx(average_precision(np.array([1, 0, 1]), scores)) and found["fpr"] == 1
    lengths = [tokens for [*_, (tokens, _)] in running_scores(guard, rows[:3], 16)]
    assert found["median_token_of_first_flag"] == np.median(lengths) > 1
    assert result("--threshold=0", "--verdict-every=1")["median_token_of_first_flag"] == 1
    assert result()["threshold"] == 0.3
    with pytest.raises(UserError):
        result("--verdict-every=0")
