"""Metrics against scikit-learn and by hand. Each test names the mutations that it kills."""

import math

import numpy as np
import pytest

from metrics import calibrate, evaluation, metrics, operating_points, threshold_at_fpr, unsafe_score

NUMBERS = np.random.default_rng(0)
LABELS = NUMBERS.integers(0, 2, 300)
SCORES = {
    "distinct": NUMBERS.random(300),
    "tied": NUMBERS.integers(0, 5, 300) / 5,
    "all equal": np.full(300, 0.5),
    "perfect": LABELS * 0.5 + 0.2,
    "sure and wrong": np.where(LABELS, 0.92, 1.0),  # in one bin of ten
}


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_metrics_equal_those_of_scikit_learn(scores):
    """Kills: ties that count one by one, an area by the wrong rule, bins by rank, two metrics mixed up."""
    oracle = pytest.importorskip("sklearn.metrics")
    flagged = (scores >= 0.4) ^ (NUMBERS.random(300) < 0.1)  # no one threshold gives these flags
    wanted = {
        "accuracy": oracle.accuracy_score(LABELS, flagged),
        "precision": oracle.precision_score(LABELS, flagged),
        "recall": oracle.recall_score(LABELS, flagged),
        "f1": oracle.f1_score(LABELS, flagged),
        "fpr": 1 - oracle.recall_score(LABELS, flagged, pos_label=0),
        "auprc": oracle.average_precision_score(LABELS, scores),
    }
    assert metrics(LABELS, scores, flagged) == pytest.approx(wanted, abs=1e-9)
    false, true, _ = oracle.roc_curve(LABELS, scores, drop_intermediate=False)
    wanted["auroc"] = oracle.roc_auc_score(LABELS, scores)
    for percent in (1, 2, 5):
        wanted[f"tpr_at_{percent}_percent_fpr"] = true[false <= percent / 100].max()
    bins = np.digitize(scores, np.linspace(0, 1, 11)[1:-1] - 1e-9)  # 0.6 is in the seventh bin
    wanted["calibration_error"] = sum(abs((scores - LABELS)[bins == n].sum()) for n in range(10)) / 300
    assert evaluation(LABELS, scores, flagged) == pytest.approx(wanted, abs=1e-9)


def test_a_ratio_of_nothing_is_nan():
    """Kills: a division by zero, a 0 or 1 for what nobody can know, an area with one class only."""
    scores = np.array([0.1, 0.2, 0.3, 0.4])
    with np.errstate(all="raise"):
        harmless = evaluation(np.zeros(4), scores, scores > 1)
        harmful = evaluation(np.ones(4), scores, scores > 0.3)
        empty = metrics(np.zeros(0), np.zeros(0), np.zeros(0, bool))
    known = [{name for name in found if not math.isnan(found[name])} for found in (harmless, harmful, empty)]
    assert known[0] == {"accuracy", "fpr", "calibration_error"} and known[2] == set()
    assert known[1] == {"accuracy", "precision", "recall", "f1", "auprc", "calibration_error"}
    assert (harmless["accuracy"], harmless["fpr"], harmful["recall"]) == (1, 0, 0.25)


@pytest.mark.parametrize("limit", [0, 0.05, 1])
@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_threshold_at_fpr_has_the_highest_recall_of_all(scores, limit):
    """Kills: one safe row too many, too careful a threshold, one at a score, flags that add no recall."""
    threshold, recall = threshold_at_fpr(LABELS, scores, limit)
    found = metrics(LABELS, scores, scores >= threshold)
    assert found["fpr"] <= limit and found["recall"] == recall
    assert threshold not in scores or threshold == scores.min()
    tried = [metrics(LABELS, scores, scores >= t) for t in [*scores, 2]]
    assert recall == max(m["recall"] for m in tried if m["fpr"] <= limit)
    assert found["fpr"] == min(m["fpr"] for m in tried if m["recall"] == recall)


SAFE = np.arange(200) / 250  # scores of 200 safe rows, 0 to .796
HARMFUL = np.arange(100) / 100  # scores of 100 harmful rows, 0 to .99


def points(prompts, answers):
    """operating_points of (safe scores, harmful scores) of prompts and of answers."""
    scores = np.concatenate([*prompts, *answers])
    labels = np.repeat([0, 1, 0, 1], [len(part) for part in (*prompts, *answers)])
    answered = np.arange(len(scores)) >= sum(map(len, prompts))
    return operating_points(labels, scores, answered)


def test_operating_points_need_rows_enough_of_their_kind():
    """Kills: a threshold that no false positive decides, a count of the other kind, prompts of one class."""
    few, many = (SAFE[:20], HARMFUL), (SAFE, HARMFUL)
    found = {"prompt": points(few, many), "answer": points(many, few)}
    assert list(points((SAFE[:19], HARMFUL), many)["prompt"]) == ["0.1"]
    for kind, other in (("prompt", "answer"), ("answer", "prompt")):
        assert list(found[kind][other]) == ["0.005", "0.01", "0.02", "0.05", "0.1"]
        assert list(found[kind][kind]) == ["0.05", "0.1"]
    for one_class in ((SAFE, []), ([], HARMFUL), ([], [])):
        assert points(one_class, many)["prompt"] == {}
        answer = points(many, [part[:1] for part in one_class])["answer"]  # all rows count
        assert answer["0.05"][0] == pytest.approx(points(many, many)["prompt"]["0.05"][0], abs=0.01)
        assert points(one_class, one_class) == {"prompt": {}, "answer": {}}


def test_separable_rows_keep_scores_that_differ():
    """Kills: a temperature that goes to 0 with the loss, so that all scores are exactly 0 or 1."""
    logits = np.linspace(-8, 8, 41, dtype=np.float32)[:, None]  # as the guard gives them
    calibration = calibrate(logits, (logits > 0).astype(float), np.ones(1))
    scores = unsafe_score(logits, calibration, unsafe_head=True)
    assert calibration[1] == pytest.approx([0.25]) and (np.diff(scores) > 0).all() and scores[-1] < 1
    wrong = calibrate(logits, (logits < 0).astype(float), np.ones(1))
    assert wrong[1] == pytest.approx([4])


def test_calibration_by_hand():
    """Kills: a shift the other way or after the temperature, one temperature for all, unknown taken for 0."""
    unknown = math.nan
    labels = np.array([[1, 1, 1], [1, 0, 1], [1, unknown, 1], [0, unknown, unknown]])
    logits = np.where(np.isnan(labels), 50.0, [3.0, 1.0, 3.0])
    shift, temperature = calibrate(logits, labels, np.exp([1.0, 0.0, 2.0]))
    assert shift == pytest.approx([1, 0, 2])  # so z is 2, 1 and 1
    # Unsafe is true in 3 rows of 4: sigmoid(2 / T) = 3/4. The categories are true in 4 known cells of 5.
    wanted = [2 / math.log(3), 1 / math.log(4), 1 / math.log(4)]
    assert temperature == pytest.approx(wanted, rel=0.01)
    labels[:, 1:] = unknown
    assert calibrate(logits, labels, np.ones(3))[1].tolist()[1:] == [1, 1]


@pytest.mark.parametrize(("unsafe_head", "z"), [(True, [0.35, 19.85]), (False, [6.0, 0.0])])
def test_an_unsafe_score_is_a_probability(unsafe_head, z):
    """Kills: raw logits, a shift after the temperature, a wrong column, the category of the largest logit."""
    shift, temperature = np.array([0.3, -1, 2]), np.array([2, 0.5, 1])
    logits = np.array([[1.0, 2.0, 3.0], [40.0, -1.0, -9.0]], np.float32)
    found = unsafe_score(logits, (shift, temperature), unsafe_head)
    assert found == pytest.approx(1 / (1 + np.exp(-np.array(z))), abs=1e-12) and (found < 1).all()
