"""Metrics against scikit-learn. Each test names the mutation that it kills."""

import numpy as np
import pytest

from evaluate import average_precision, best_threshold, metrics

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
