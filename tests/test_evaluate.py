"""Metrics against scikit-learn, and the command. Each test names the mutation that it kills."""

import json
import sys

import numpy as np
import pytest
import torch

import evaluate
from common import UserError
from conftest import make_guard
from data import encode
from evaluate import bootstrap, category_metrics, running_metrics, running_scores
from metrics import (
    auroc,
    average_precision,
    best_threshold,
    evaluation,
    fit_temperature,
    metrics,
    reliability,
    threshold_at_fpr,
)
from model import Thresholds, probabilities

NUMBERS = np.random.default_rng(0)
LABELS = NUMBERS.integers(0, 2, 300)
SCORES = {
    "distinct": NUMBERS.random(300),
    "tied": NUMBERS.integers(0, 5, 300) / 5,
    "all equal": np.full(300, 0.5),
    "perfect": LABELS * 0.5 + 0.2,
    "sure and wrong": np.where(LABELS, 0.3, 1.0),
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
def test_what_guards_are_compared_by_equals_scikit_learns(scores):
    """Kills: ties in the ROC curve counted one by one, an FPR of more than 1 %, bins by rank, bins of equal weight."""
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
    """Kills: an area under one class, a rate of no rows."""
    with np.errstate(all="raise"):
        found = evaluation(np.array([1, 1, 1]), np.array([0.1, 0.5, 0.9]), 0.5)
    assert all(np.isnan(found[name]) for name in ("auroc", "fpr")) and found["recall"] == 2 / 3
    assert np.isnan(auroc(np.zeros(3), np.array([0.1, 0.2, 0.3])))


@pytest.mark.parametrize("limit", [0, 0.05, 0.3, 1])
@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_threshold_at_a_false_positive_rate_has_the_highest_recall_of_all(scores, limit):
    """Kills: a threshold that lets one more through, that is too careful, that is on the score itself, or that lets
    safe rows through for no recall."""
    threshold, recall = threshold_at_fpr(LABELS, scores, limit)
    found = metrics(LABELS, scores, threshold)
    assert found["fpr"] <= limit and found["recall"] == recall
    assert threshold not in scores or threshold == scores.min()
    tried = [metrics(LABELS, scores, t) for t in [*scores, 2]]
    assert recall == max(m["recall"] for m in tried if m["fpr"] <= limit)
    assert found["fpr"] == min(m["fpr"] for m in tried if m["recall"] == recall)


def test_a_temperature_undoes_a_known_one():
    """Kills: a product for the quotient, labels turned round, a grid that ends too soon, the highest loss."""
    logits = NUMBERS.normal(size=20000)
    labels = NUMBERS.random(20000) < 1 / (1 + np.exp(-logits))
    for factor in (0.06, 0.3, 1, 4, 17):
        assert fit_temperature(labels, factor * logits) == pytest.approx(factor, rel=0.05)


def test_reliability_by_hand():
    """Kills: a score of 1 in a bin of its own, empty bins kept, a bin's middle for its mean score."""
    rows, score, positive = reliability(np.array([0, 1, 1, 1]), np.array([0.02, 0.08, 0.92, 1.0]))
    assert rows.tolist() == [2, 2] and score.tolist() == pytest.approx([0.05, 0.96]) and positive.tolist() == [0.5, 1]


def test_intervals_come_from_draws_of_prompts():
    """Kills: draws of rows (half as wide where the answers to a prompt are alike), a width that does not shrink with
    the prompts, other bounds, figures that no draw has."""
    labels = NUMBERS.integers(0, 2, 200)
    scores = np.clip(labels * 0.2 + NUMBERS.random(200) * 0.8, 0, 1)
    low, high = bootstrap(labels, scores, np.full(200, 0.5), np.arange(200))["accuracy"]
    value = metrics(labels, scores, 0.5)["accuracy"]
    assert low < value < high
    assert high - low == pytest.approx(2 * 1.96 * (value * (1 - value) / 200) ** 0.5, rel=0.15)
    four = [np.repeat(column, 4) for column in (labels, scores, np.arange(200))]
    repeated = bootstrap(four[0], four[1], np.full(800, 0.5), four[2])["accuracy"]
    assert repeated == pytest.approx([low, high], abs=0.02)
    one_class = bootstrap(np.ones(10, int), np.full(10, 0.7), np.full(10, 0.5), np.arange(10), draws=20)
    assert one_class["recall"] == [1, 1] and "auroc" not in one_class


def test_category_figures_leave_out_rows_that_do_not_label_it():
    """Kills: a missing label for a negative, an output that is one off, an unknown category that is lost or raises."""
    rows = [{"theft": True, "arson": True}, {}, {"theft": False, "arson": False}, {"theft": True}]
    scores = np.array([[0, 0.9, 0.1], [0, 1.0, 0.1], [0, 0.5, 0.1], [0, 0.4, 0.1]])
    found = category_metrics(["theft", "hate"], rows, scores)
    assert found["unknown_categories"] == ["arson"]
    assert found["categories"] == {"theft": {"positives": 2, "ap": pytest.approx((1 + 2 / 3) / 2)}}
    assert category_metrics([], rows, scores[:, :1])["categories"] == {}


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
        wanted = guard.score([ids[: start + tokens] for tokens, _ in answer])[:, 0].double().sigmoid()  # uncalibrated
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


@pytest.fixture
def result(tmp_path, monkeypatch, capsys):
    """evaluate.py as a function of rows and options, on a tiny guard that the test can look at."""
    guard = make_guard()
    guard.calibration = {"shift": [0.5, -1.0, 2.0], "temperature": [2.0, 0.5, 1.0]}

    def load_guard(config, adapter, device_id, threshold):
        return guard, Thresholds(2.0, 0.0) if threshold is None else Thresholds(threshold, threshold)

    def call(rows, *options):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        monkeypatch.setattr(evaluate, "load_guard", load_guard)
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--dataset", str(tmp_path / "rows.jsonl"), *options])
        evaluate.main()
        out = capsys.readouterr().out
        return json.loads(out) if "--json" in options else out

    call.guard = guard
    return call


FIELDS = [
    "rows",
    "positives",
    "auprc",
    "auroc",
    "f1",
    "precision",
    "recall",
    "accuracy",
    "fpr",
    "threshold",
    "prompt_threshold",
]
FIELDS += ["tpr_at_1_percent_fpr", "calibration_error", "categories", "unknown_categories", "intervals"]
ROWS = [
    {"prompt": "hi", "response": "the answer", "category": {"hate": True, "arson": False}},
    {"prompt": "hi", "response": "or", "category": {"hate": False, "arson": False}},
    {"prompt": "how", "response": "harmful", "is_safe": False},
    {"prompt": "the bread", "is_safe": True, "kind": "everyday"},
]
FLAGGED_FROM = np.array([0.0, 0.0, 0.0, 2.0])  # the last has no response


def test_the_command_gives_the_fields_of_the_contract(result, tmp_path):
    """Kills: uncalibrated scores, a response that is left out, labels turned round, a field or a row that is lost."""
    found = result(ROWS, "--json", "--scores", str(tmp_path / "scores.jsonl"))
    assert sorted(found) == sorted(FIELDS)
    texts = [encode(result.guard.tokenizer, row["prompt"], row.get("response")) for row in ROWS]
    scores = probabilities(result.guard.score(texts), result.guard.calibration).numpy()
    unsafe = np.array([1, 0, 1, 0])
    assert {name: found[name] for name in ("auprc", "auroc", "f1", "accuracy")} == pytest.approx(
        {name: evaluation(unsafe, scores[:, 0], FLAGGED_FROM)[name] for name in ("auprc", "auroc", "f1", "accuracy")}
    )
    assert (found["rows"], found["positives"]) == (4, 2)
    assert (found["threshold"], found["prompt_threshold"]) == (0.0, 2.0)
    assert found["unknown_categories"] == ["arson"] and found["tpr_at_1_percent_fpr"] is None
    ap = average_precision(np.array([1, 0]), scores[:2, 2])
    assert found["categories"] == {"hate": {"positives": 1, "ap": pytest.approx(ap)}}
    assert found["intervals"]["accuracy"][0] <= found["accuracy"] <= found["intervals"]["accuracy"][1]
    kept = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in kept] == [row["prompt"] for row in ROWS] and kept[3]["kind"] == "everyday"
    for row, wanted, label, threshold in zip(kept, scores, unsafe, FLAGGED_FROM, strict=True):
        assert [row["unsafe_probability"], *row["categories"].values()] == pytest.approx(wanted.tolist())
        assert row["is_safe"] == (not label) and row["flagged"] == (wanted[0] >= threshold)


def test_a_rate_of_1_percent_needs_100_safe_rows(result):
    """Kills: a figure, or an interval of one, that a single safe row decides."""
    rows = [{"prompt": f"the bread {number % 9}", "is_safe": number > 0} for number in range(101)]
    found = result(rows, "--json")
    assert found["tpr_at_1_percent_fpr"] is not None and "tpr_at_1_percent_fpr" in found["intervals"]
    found = result(rows[:100], "--json")
    assert found["tpr_at_1_percent_fpr"] is None and "tpr_at_1_percent_fpr" not in found["intervals"]


def test_a_score_that_is_no_number_counts_as_flagged(result, monkeypatch):
    """Kills: a broken guard that is measured as if it passed everything."""
    monkeypatch.setattr(result.guard, "score", lambda texts: torch.full((len(texts), 3), torch.nan))
    found = result(ROWS, "--json", "--threshold=0.9")
    assert found["recall"] == found["fpr"] == 1


def test_the_rows_are_not_overwritten(result, tmp_path):
    """Kills: --scores on the file that is read."""
    with pytest.raises(UserError, match="destroy"):
        result(ROWS, "--scores", str(tmp_path / "rows.jsonl"))
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == len(ROWS)


def test_one_class_is_measured_as_far_as_it_can_be(result):
    """Kills: a crash or a made-up figure where there is nothing unsafe; NaN in the JSON; a table that hides it."""
    safe = [{"prompt": text, "is_safe": True} for text in ("hi", "how", "the bread")]
    found = result(safe, "--json", "--threshold=0")
    assert found["fpr"] == 1 and found["auprc"] is None and found["auroc"] is None and found["recall"] is None
    assert found["intervals"]["fpr"] == [1, 1] and found["categories"] == {}
    lines = {line.split()[0]: line.split()[1] for line in result(safe, "--threshold=0").splitlines()}
    assert lines["fpr"] == "1.000" and lines["auprc"] == "-" and lines["rows"] == "3"


def test_the_table_names_what_a_random_scorer_gets_and_unknown_categories(result):
    """Kills: a table without its yardstick, or that passes over categories of the rows in silence."""
    out = result(ROWS)
    assert "(a random scorer: 0.500)" in out and "does not know: arson" in out and "AP of hate (1 positives)" in out


def test_the_plot_is_a_picture(result, tmp_path):
    """Kills: a plot that is not written, or that fails where a class has no rows."""
    pytest.importorskip("matplotlib").use("Agg")
    for rows in (ROWS, ROWS[:1]):
        result(rows, "--plot", str(tmp_path / "plot.png"))
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "plot.png").unlink()
    with pytest.raises(UserError, match="cannot draw"):
        result(ROWS, "--plot", str(tmp_path / "plot.xyz"))


def test_running_verdicts_are_on_the_rows_that_have_an_answer(result):
    """Kills: rows without an answer among them, a threshold or step that is not read."""
    rows = [{"prompt": "hi", "response": text, "is_safe": text == "or"} for text in ("the answer", "or", "harmful", "")]
    found = result(rows, "--json", "--running=1", "--threshold=0")["running"]
    assert found["flagged"] == 3 and found["median_token_of_first_flag"] == 1
    lengths = [tokens for [*_, (tokens, _)] in running_scores(result.guard, rows[:3], 16)]
    found = result(rows, "--json", "--running=16", "--threshold=0")["running"]
    assert found["median_token_of_first_flag"] == np.median(lengths) > 1
    assert "safe_and_not_flagged" in result(rows, "--running=16")
    with pytest.raises(UserError):
        result(rows, "--running=0")


def test_nothing_to_evaluate_on_is_refused(result):
    """Kills: a table about no rows."""
    with pytest.raises(UserError, match="no rows"):
        result([])


def test_an_evaluation_is_computed_in_the_fast_dtype(result, monkeypatch):
    """Kills: 16 bits on a processor without instructions for them."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    result.guard.chat_model.to(torch.bfloat16)
    result(ROWS)
    assert result.guard.chat_model.dtype == torch.float32
