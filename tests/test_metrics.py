"""Metrics against scikit-learn and by hand. Each test names the mutations that it kills."""

import math

import numpy as np
import pytest

from metrics import (
    auroc,
    average_precision,
    calibrate,
    evaluation,
    fit_temperature,
    metrics,
    operating_points,
    reliability,
    threshold_at_fpr,
    unsafe_score,
)

NUMBERS = np.random.default_rng(0)
LABELS = NUMBERS.integers(0, 2, 300)
SCORES = {
    "distinct": NUMBERS.random(300),
    "tied": NUMBERS.integers(0, 5, 300) / 5,
    "all equal": np.full(300, 0.5),
    "perfect": LABELS * 0.5 + 0.2,
    "sure and wrong": np.where(LABELS, 0.3, 1.0),
}


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


# ---------------------------------------------------------------------------
# How good scores are


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_metrics_equal_those_of_scikit_learn(scores):
    """Kills: ties that count one by one, a trapezoid for the area, > for >=, any two metrics mixed up."""
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
def test_evaluation_equals_that_of_scikit_learn(scores):
    """Kills: ROC ties that count one by one, an FPR of more than 1 %, bins of equal weight or rank."""
    oracle = pytest.importorskip("sklearn.metrics")
    calibration_curve = pytest.importorskip("sklearn.calibration").calibration_curve
    false, true, _ = oracle.roc_curve(LABELS, scores, drop_intermediate=False)
    positive, score = calibration_curve(LABELS, scores, n_bins=10)
    rows = np.histogram(scores, np.linspace(0, 1, 11))[0]
    found = evaluation(LABELS, scores, 0.4)
    assert {name: found[name] for name in metrics(LABELS, scores, 0.4)} == metrics(LABELS, scores, 0.4)
    assert found["auroc"] == pytest.approx(oracle.roc_auc_score(LABELS, scores), abs=1e-9)
    assert found["tpr_at_1_percent_fpr"] == pytest.approx(true[false <= 0.01].max(), abs=1e-9)
    error = (rows[rows > 0] * abs(positive - score)).sum() / rows.sum()
    assert found["calibration_error"] == pytest.approx(error, abs=1e-9)


def test_too_few_rows_give_nan_and_not_a_figure():
    """Kills: an area with one class only, a rate of no rows."""
    with np.errstate(all="raise"):
        found = evaluation(np.array([1, 1, 1]), np.array([0.1, 0.5, 0.9]), 0.5)
    assert all(np.isnan(found[name]) for name in ("auroc", "fpr")) and found["recall"] == 2 / 3
    assert np.isnan(auroc(np.zeros(3), np.array([0.1, 0.2, 0.3])))


def test_a_ratio_of_nothing_is_nan():
    """Kills: a division by zero, a 0 or 1 for what nobody can know."""
    found = metrics(np.zeros(4), np.array([0.1, 0.2, 0.3, 0.4]), 0.5)
    assert found["accuracy"] == 1 and found["fpr"] == 0
    assert all(np.isnan(found[name]) for name in ("precision", "recall", "f1", "auprc"))
    assert np.isnan(average_precision(np.zeros(0), np.zeros(0)))
    assert all(np.isnan(value) for value in metrics(np.zeros(0), np.zeros(0), 0.5).values())


def test_every_row_may_have_its_own_threshold():
    """Kills: one threshold for prompts and answers, thresholds in another order."""
    labels, scores = np.array([1, 0, 1, 0]), np.array([0.4, 0.4, 0.6, 0.6])
    found = metrics(labels, scores, np.array([0.3, 0.5, 0.5, 0.7]))
    assert found["accuracy"] == 1 and found["fpr"] == 0
    assert metrics(labels, scores, np.array([0.5, 0.3, 0.7, 0.5]))["accuracy"] == 0


def test_reliability_by_hand():
    """Kills: a score of 1 in a bin of its own, empty bins that stay, a bin's middle for its mean score."""
    rows, score, positive = reliability(np.array([0, 1, 1, 1]), np.array([0.02, 0.08, 0.92, 1.0]))
    assert rows.tolist() == [2, 2] and positive.tolist() == [0.5, 1]
    assert score.tolist() == pytest.approx([0.05, 0.96])


# ---------------------------------------------------------------------------
# Where to flag


@pytest.mark.parametrize("limit", [0, 0.05, 0.3, 1])
@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_threshold_at_fpr_has_the_highest_recall_of_all(scores, limit):
    """Kills: a threshold that flags one safe row too many, that is too careful, that equals a score, or that
    flags safe rows for no recall.
    """
    threshold, recall = threshold_at_fpr(LABELS, scores, limit)
    found = metrics(LABELS, scores, threshold)
    assert found["fpr"] <= limit and found["recall"] == recall
    assert threshold not in scores or threshold == scores.min()
    tried = [metrics(LABELS, scores, t) for t in [*scores, 2]]
    assert recall == max(m["recall"] for m in tried if m["fpr"] <= limit)
    assert found["fpr"] == min(m["fpr"] for m in tried if m["recall"] == recall)


SAFE = np.arange(200) / 250  # scores of 200 safe rows, 0 to .796
HARMFUL = np.arange(100) / 100  # scores of 100 harmful rows, 0 to .99


def points(prompts, answers):
    """operating_points of (safe scores, harmful scores) of prompts and of answers, in one shuffled array."""
    scores = np.concatenate([*prompts, *answers])
    parts = zip((0, 1, 0, 1), (*prompts, *answers), strict=True)
    labels = np.concatenate([np.full(len(part), label) for label, part in parts])
    answered = np.arange(len(scores)) >= sum(map(len, prompts))
    order = np.random.default_rng(0).permutation(len(scores))
    return operating_points(labels[order], scores[order], answered[order])


def test_operating_points_keep_to_their_rates():
    """Kills: prompts that count in the choice for answers, or the reverse; rates that are mixed up."""
    found = points((SAFE, HARMFUL), (SAFE / 2, HARMFUL / 2))
    for kind, scale in (("prompt", 1), ("answer", 0.5)):
        assert list(found[kind]) == ["0.005", "0.01", "0.02", "0.05", "0.1"]
        for rate, (threshold, recall) in found[kind].items():
            fpr = (scale * SAFE >= threshold).mean()
            assert fpr <= float(rate) <= fpr + 0.01  # one more of 200 rows is .005
            assert recall == (scale * HARMFUL >= threshold).mean() > 0.19


@pytest.mark.parametrize("prompts", [(SAFE, []), ([], HARMFUL), ([], [])])
def test_prompts_of_one_class_are_never_flagged(prompts):
    """Kills: a threshold for prompts from rows that do not tell safe prompts from unsafe ones."""
    assert {*points(prompts, (SAFE, HARMFUL))["prompt"].values()} == {(2.0, 0.0)}


@pytest.mark.parametrize("answers", [(SAFE[:1], []), ([], HARMFUL[:1]), ([], [])])
def test_with_answers_of_one_class_all_rows_count(answers):
    """Kills: a threshold for answers that a single answer decides, or that no answer can decide."""
    found = points((SAFE, HARMFUL), answers)
    assert found["answer"]["0.05"][0] == pytest.approx(found["prompt"]["0.05"][0], abs=0.01)


# ---------------------------------------------------------------------------
# What makes probabilities of logits


def test_a_temperature_undoes_a_known_one():
    """Kills: a product for the quotient, swapped labels, a grid that ends too soon, the highest loss."""
    logits = NUMBERS.normal(size=20000)
    labels = NUMBERS.random(20000) < sigmoid(logits)
    for factor in (0.06, 0.3, 1, 4, 17):
        assert fit_temperature(labels, factor * logits) == pytest.approx(factor, rel=0.05)


def test_calibration_by_hand():
    """Kills: a shift the other way or after the temperature, one temperature for all outputs, unknown labels
    taken for 0.
    """
    unknown = math.nan
    labels = np.array([[1, 1, 1], [1, 0, 1], [1, unknown, 1], [0, unknown, unknown]])
    logits = np.where(np.isnan(labels), 50.0, [3.0, 1.0, 3.0])
    shift, temperature = calibrate(logits, labels, np.exp([1.0, 0.0, 2.0]))
    assert shift == pytest.approx([1, 0, 2])  # so z is 2, 1 and 1
    # Unsafe is true in 3 rows of 4: sigmoid(2 / T) = 3/4. The categories are true in 4 known cells of 5.
    wanted = [2 / math.log(3), 1 / math.log(4), 1 / math.log(4)]
    assert temperature == pytest.approx(wanted, rel=0.01)


def test_calibration_undoes_the_weights_and_the_confidence():
    """Kills: a calibration that holds for the case by hand only."""
    generator = np.random.default_rng(1)
    weight, chance = np.array([0.5, 9.0]), generator.normal(size=(20000, 2))
    labels = (generator.random((20000, 2)) < sigmoid(chance)).astype(float)
    shift, temperature = calibrate(chance * [3, 0.5] + np.log(weight), labels, weight)
    assert shift == pytest.approx(np.log(weight)) and temperature == pytest.approx([3, 0.5], rel=0.06)


def test_a_calibration_is_always_finite():
    """Kills: an infinite shift from a weight of 0, a temperature of no labels."""
    logits = np.array([[2.0, 1.0], [-2.0, 1.0], [2.0, 1.0]])
    labels = np.array([[1, math.nan], [0, math.nan], [0, math.nan]])
    shift, temperature = calibrate(logits, labels, np.array([1.0, 0.0]))
    assert shift.tolist() == pytest.approx([0, math.log(1e-3)])
    assert temperature[0] != 1 and temperature[1] == 1
    alone = calibrate(logits[:, :1], labels[:, :1], np.ones(1))  # a guard without categories
    assert [values.tolist() for values in alone] == [[0], [temperature[0]]]


LOGITS = np.array([[1.0, 2.0, 3.0], [40.0, -1.0, -9.0]])
CALIBRATION = np.array([0.3, -1, 2]), np.array([2, 0.5, 1])  # shift, temperature


def test_the_unsafe_score_is_the_calibrated_unsafe_output():
    """Kills: raw logits, a shift after the temperature, fp32, which cannot tell this score from 1."""
    found = unsafe_score(LOGITS.astype(np.float32), CALIBRATION, unsafe_head=True)
    assert found == pytest.approx([sigmoid(0.35), sigmoid(19.85)], abs=1e-7) and found[1] < 1


def test_without_the_unsafe_head_the_likeliest_category_counts():
    """Kills: the largest raw logit, whose weight may be largest; the unsafe column as a category."""
    found = unsafe_score(LOGITS, CALIBRATION, unsafe_head=False)
    assert found == pytest.approx([sigmoid(6.0), sigmoid(0.0)], abs=1e-12)  # (2 + 1) / 0.5 and (-1 + 1) / 0.5


@pytest.mark.parametrize("unsafe_head", [True, False])
def test_an_unsafe_score_is_a_probability(unsafe_head):
    """Kills: a score that ranks rows well and means nothing, with or without the unsafe head."""
    generator = np.random.default_rng(2)
    weight, chance = np.array([0.5, 9.0]), generator.normal(size=(20000, 2))
    labels = (generator.random((20000, 2)) < sigmoid(chance)).astype(float)
    logits = chance * [3, 0.5] + np.log(weight)
    scores = unsafe_score(logits, calibrate(logits, labels, weight), unsafe_head)
    column = 0 if unsafe_head else 1  # the likeliest of one category is that category
    rows, score, positive = reliability(labels[:, column], scores)
    assert (rows * abs(score - positive)).sum() / rows.sum() < 0.02
