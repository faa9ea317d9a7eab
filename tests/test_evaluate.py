"""The command that measures a guard. Each test names the mutations that it kills."""

import json
import sys

import datasets
import numpy as np
import pytest
import torch
from conftest import ids_of, make_guard, make_rows, user, write

import checkpoint
import evaluate
from common import UserError
from data import encode_row
from evaluate import bootstrap, category_metrics, running_metrics, running_scores
from metrics import average_precision, evaluation, metrics
from tools import plots

NUMBERS = np.random.default_rng(0)


def test_intervals_come_from_draws_of_prompts():
    """Kills: draws of rows, whose interval is too narrow if answers to one prompt agree; a width that does
    not shrink with the prompts; other bounds; an interval of a figure that no draw has.
    """
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


def test_category_figures_leave_out_rows_without_its_label():
    """Kills: a missing label taken for a negative, an output that is one off, a lost unknown category."""
    rows = [{"theft": True, "arson": True}, {}, {"theft": False, "arson": False}, {"theft": True}]
    scores = np.array([[0, 0.9, 0.1], [0, 1.0, 0.1], [0, 0.5, 0.1], [0, 0.4, 0.1]])
    found = category_metrics(["theft", "hate"], rows, scores)
    assert found["unknown_categories"] == ["arson"]
    assert found["categories"] == {"theft": {"positives": 2, "ap": pytest.approx((1 + 2 / 3) / 2)}}
    assert category_metrics([], rows, scores[:, :1])["categories"] == {}


def test_running_scores_are_those_of_the_cut_conversations():
    """Kills: tokens counted from the prompt's start, a cut that is left out, the whole answer twice where it
    ends on a cut.
    """
    guard = make_guard()
    rows = [{"prompt": "hi", "response": text} for text in ("the answer is harmful", "or", "a b c d ")]
    encoded = [encode_row(guard.tokenizer, row) for row in rows]
    start = len(ids_of(guard.tokenizer, "hi"))
    for (ids, _), answer in zip(encoded, running_scores(guard, encoded, 4), strict=True):
        length = len(ids) - start
        assert [tokens for tokens, _ in answer] == [*range(4, length, 4), length]
        wanted = guard.score([ids[: start + tokens] for tokens, _ in answer])[:, 0].double().sigmoid()
        assert [score for _, score in answer] == pytest.approx(wanted.tolist(), abs=1e-6)
    assert any(len(ids) - start in (4, 8, 12) for ids, _ in encoded)  # one answer ends on a cut


def test_running_metrics_by_hand():
    """Kills: shares of the wrong rows, the last flag for the first, > for >= at half, unsafe rows as safe."""
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
    """evaluate.py as a function of rows, or of a data set's name and options, with its guard as `.guard`."""
    guard = make_guard(prompt_threshold=2.0, threshold=0.0)

    def load_guard(config, adapter, device_id, threshold, *_):
        if threshold is not None:
            guard.config.threshold = guard.config.prompt_threshold = threshold
        return guard

    def call(rows, *options):
        source = rows if isinstance(rows, str) else write(tmp_path / "rows.jsonl", rows)
        monkeypatch.setattr(evaluate, "load_guard", load_guard)
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--dataset", source, *map(str, options)])
        evaluate.main()
        out = capsys.readouterr().out
        return strict_json(out) if "--json" in options else out

    call.guard = guard
    return call


def strict_json(text):
    """Parse JSON. Python's parser would take NaN as well, which is not JSON."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def lines_of(path):
    return [strict_json(line) for line in path.read_text().splitlines()]


FIELDS = ["rows", "positives", "auprc", "auroc", "f1", "precision", "recall", "accuracy", "fpr", "threshold"]
FIELDS += [
    "prompt_threshold",
    "tpr_at_1_percent_fpr",
    "calibration_error",
    "categories",
    "unknown_categories",
]
FIELDS += ["intervals", "sources", "tpr_at_2_percent_fpr", "tpr_at_5_percent_fpr"]
ROWS = [
    {"prompt": "hi", "response": "the answer", "category": {"hate": True, "arson": False}},
    {"prompt": "hi", "response": "or", "category": {"hate": False, "arson": False}},
    {"prompt": "how", "response": "harmful", "is_safe": False},
    {"prompt": "the bread", "is_safe": True, "kind": "everyday"},
]
FLAG_FROM = np.array([0.0, 0.0, 0.0, 2.0])  # the last row has no response


def test_the_command_gives_the_fields_of_the_contract(result, tmp_path):
    """Kills: logits for probabilities, a response that is left out, swapped labels, a lost field or row."""
    found = result(ROWS, "--json", "--scores", tmp_path / "scores.jsonl")
    assert sorted(found) == sorted(FIELDS)
    texts = [ids_of(result.guard.tokenizer, row["prompt"], row.get("response")) for row in ROWS]
    scores = result.guard.score(texts).double().sigmoid().numpy()
    unsafe = np.array([1, 0, 1, 0])
    wanted = evaluation(unsafe, scores[:, 0], FLAG_FROM)
    for name in ("auprc", "auroc", "f1", "accuracy"):
        assert found[name] == pytest.approx(wanted[name])
    assert (found["rows"], found["positives"]) == (4, 2)
    assert (found["threshold"], found["prompt_threshold"]) == (0.0, 2.0)
    assert found["unknown_categories"] == ["arson"] and found["tpr_at_1_percent_fpr"] is None
    ap = average_precision(np.array([1, 0]), scores[:2, 2])
    assert found["categories"] == {"hate": {"positives": 1, "ap": pytest.approx(ap)}}
    assert found["intervals"]["accuracy"][0] <= found["accuracy"] <= found["intervals"]["accuracy"][1]
    kept = lines_of(tmp_path / "scores.jsonl")
    assert [row["prompt"] for row in kept] == [row["prompt"] for row in ROWS] and kept[3][
        "kind"
    ] == "everyday"
    for row, wanted, label, flag_from in zip(kept, scores, unsafe, FLAG_FROM, strict=True):
        assert list(row["categories"]) == ["theft", "hate"]
        assert [row["unsafe_probability"], *row["categories"].values()] == pytest.approx(wanted.tolist())
        assert row["is_safe"] == (not label) and row["flagged"] == (wanted[0] >= flag_from)


def test_scored_rows_can_be_measured_again(result, tmp_path):
    """Kills: scored rows that lack a text or a label, or that this command does not read."""
    rows = [*ROWS, {"messages": [*user("hi"), {"role": "assistant", "content": "or"}], "is_safe": True}]
    first = result(rows, "--json", "--scores", tmp_path / "scores.jsonl")
    assert result(str(tmp_path / "scores.jsonl"), "--json") == first


def test_a_rate_of_1_percent_needs_100_safe_rows(result):
    """Kills: a figure, or its interval, that a single safe row decides."""
    rows = [{"prompt": f"the bread {number % 9}", "is_safe": number > 0} for number in range(101)]
    found = result(rows, "--json")
    assert found["tpr_at_1_percent_fpr"] is not None and "tpr_at_1_percent_fpr" in found["intervals"]
    found = result(rows[:100], "--json")
    assert found["tpr_at_1_percent_fpr"] is None and "tpr_at_1_percent_fpr" not in found["intervals"]


def test_a_nan_score_counts_as_flagged(result, tmp_path, monkeypatch):
    """Kills: a broken guard that is measured as if it let everything pass, NaN in the scored rows."""
    monkeypatch.setattr(result.guard, "score", lambda texts: torch.full((len(texts), 3), torch.nan))
    found = result(ROWS, "--json", "--threshold=2", "--running=1", "--scores", tmp_path / "scores.jsonl")
    assert found["recall"] == found["fpr"] == 1 and found["running"]["flagged"] == 3
    for row in lines_of(tmp_path / "scores.jsonl"):
        assert row["flagged"] and row["unsafe_probability"] is row["categories"]["hate"] is None


def test_the_rows_are_not_overwritten(result, tmp_path):
    """Kills: --scores on a file that is read, by its name or in its folder."""
    for source in (ROWS, str(tmp_path)):
        with pytest.raises(UserError, match="destroy"):
            result(source, "--scores", tmp_path / "rows.jsonl")
        assert lines_of(tmp_path / "rows.jsonl") == ROWS


def test_a_hub_id_is_measured_on_its_test_split(result, tmp_path, monkeypatch):
    """Kills: a measurement on training rows, a hub id taken for a file if the --scores file is there."""
    hub = {
        "train": datasets.Dataset.from_list(make_rows(6)),
        "test": datasets.Dataset.from_list(make_rows(4, 40)),
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: hub)
    (tmp_path / "scores.jsonl").write_text("older")
    result("some/data-set", "--scores", tmp_path / "scores.jsonl")
    kept = [row["response"] for row in lines_of(tmp_path / "scores.jsonl")]
    assert kept == [row["response"] for row in make_rows(4, 40)]


def test_every_file_has_figures_of_its_own(result, tmp_path):
    """Kills: a file measured on another's rows, a threshold of another row, a file left out, files of equal
    names that cannot be told apart."""
    rows = [{"prompt": f"the bread {number}", "is_safe": number > 9} for number in range(30)]
    names = []
    for folder, part in (("a", rows[:20]), ("b", ROWS), ("c", rows[20:])):
        (tmp_path / folder).mkdir()
        names.append(write(tmp_path / folder / "test.jsonl", part))
    found = result(names[0], "--json", "--dataset", *names)
    assert list(found["sources"]) == names
    for name in names:
        alone = result(name, "--json")
        assert found["sources"][name] == pytest.approx(
            {n: alone[n] for n in found["sources"][name]}, nan_ok=True
        )
    table = result(names[0], "--dataset", *names).splitlines()
    [header] = [line for line in table if line.startswith("file")]
    [first] = [line for line in table if "/a/test.jsonl" in line]
    assert header.index("rows") + 4 == first.index("20") + 2  # each column stands below its name
    lines = [line.split("/")[-2:] for line in table if "/test.jsonl" in line]
    assert [[folder, *line.split()[:3]] for folder, line in lines] == [
        ["a", "test.jsonl", "20", "10"],
        ["b", "test.jsonl", "4", "2"],
        ["c", "test.jsonl", "10", "0"],
    ]


def test_one_class_is_measured_as_far_as_possible(result):
    """Kills: a crash or an invented figure where nothing is unsafe, NaN in JSON, a table that hides it."""
    safe = [{"prompt": text, "is_safe": True} for text in ("hi", "how", "the bread")]
    found = result(safe, "--json", "--threshold=0")
    assert found["fpr"] == 1 and found["auprc"] is None and found["auroc"] is None and found["recall"] is None
    assert found["intervals"]["fpr"] == [1, 1] and found["categories"] == {}
    lines = {line.split()[0]: line.split()[1] for line in result(safe, "--threshold=0").splitlines()}
    assert lines["fpr"] == "1.000" and lines["auprc"] == "-" and lines["rows"] == "3"


def test_the_table_names_a_random_scorer_and_unknown_categories(result):
    """Kills: a table without its yardstick, or that is silent about categories of the rows."""
    out = result(ROWS)
    assert "(a random scorer: 0.500)" in out and "does not know: arson" in out
    assert "AP of hate (1 positives)" in out


def test_the_plot_is_a_picture(result, tmp_path):
    """Kills: a plot that is not written, or that fails where a class has no rows."""
    pytest.importorskip("matplotlib").use("Agg")
    for rows in (ROWS, ROWS[:1]):
        result(rows, "--plot", tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "plot.png").unlink()
    with pytest.raises(UserError, match="cannot draw"):
        result(ROWS, "--plot", tmp_path / "plot.xyz")


def test_the_plot_has_a_curve_for_each_file_with_unsafe_rows(monkeypatch):
    """Kills: one curve of all rows, curves of the wrong rows, a file that has no curve to draw."""
    pytest.importorskip("matplotlib").use("Agg")
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    files = np.array(["a/test.csv", "a/test.csv", "safe.csv", "b/test.csv", "b/test.csv"])
    labels, scores = np.array([1, 0, 0, 1, 0]), np.array([0.9, 0.2, 0.3, 0.1, 0.5])
    plots.plot_evaluation("plot.png", labels, scores, files)
    curves = {line.get_label(): line.get_ydata().tolist() for line in figures[0].axes[0].lines[:-1]}
    assert curves == {"a/test.csv": [1, 0.5], "b/test.csv": [0, 0.5]}


def test_running_verdicts_are_on_rows_with_an_answer(result):
    """Kills: rows without an answer among them, a threshold or step that is not read."""
    texts = ("the answer", "or", "harmful", "")
    rows = [{"prompt": "hi", "response": text, "is_safe": text == "or"} for text in texts]
    found = result(rows, "--json", "--running=1", "--threshold=0")["running"]
    assert found["flagged"] == 3 and found["median_token_of_first_flag"] == 1
    encoded = [encode_row(result.guard.tokenizer, row) for row in rows[:3]]
    lengths = [len(ids) - start for ids, start in encoded]
    found = result(rows, "--json", "--running=16", "--threshold=0")["running"]
    assert found["median_token_of_first_flag"] == np.median(lengths) > 1
    assert "safe_and_not_flagged" in result(rows, "--running=16")


def test_bad_arguments_are_refused(result, capsys):
    """Kills: an endless loop of verdicts after no tokens, a traceback for a bad flag."""
    with pytest.raises(SystemExit) as exit:
        result(ROWS, "--running=0")
    assert exit.value.code == 2 and "--running must be at least 1" in capsys.readouterr().err


def test_an_evaluation_of_no_rows_is_refused(result):
    """Kills: a table about nothing."""
    with pytest.raises(UserError, match="no rows"):
        result([])


def test_an_evaluation_is_computed_in_the_fast_dtype(result, monkeypatch):
    """Kills: 16 bits where a product of fp32 is faster."""
    monkeypatch.setattr(checkpoint, "product_milliseconds", lambda _, dtype: {"float32": 1}.get(dtype, 2))
    result.guard.chat_model.to(torch.bfloat16)
    result(ROWS)
    assert result.guard.chat_model.dtype == torch.float32
