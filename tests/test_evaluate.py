"""The command that measures a guard on labelled rows."""

import json
import sys

import datasets
import numpy as np
import pytest
import torch
from conftest import ids_of, make_guard, make_rows, score, write

import evaluate
from chat import Text
from errors import UserError
from evaluate import bootstrap, evaluation_rows, running
from metrics import average_precision, evaluation

ROWS = [
    {"prompt": "how", "response": "harmful", "is_safe": False},
    {"prompt": "hi", "response": "the answer", "category": {"theft": True, "arson": False}},
    {"prompt": "hi", "response": "or", "category": {"theft": False, "arson": False}},
    {"prompt": "the bread", "is_safe": True, "kind": "everyday"},
]


@pytest.fixture
def result(tmp_path, monkeypatch, capsys):
    """evaluate.py as a function of rows, or of files' names, and options, with its guard as `.guard`."""

    def call(rows, *options):
        is_named = rows and isinstance(rows[0], str)
        names = rows if is_named else [write(tmp_path / "rows.jsonl", rows)]
        monkeypatch.setattr(evaluate, "guard_of", lambda args: call.guard)
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--dataset", *names, *map(str, options)])
        evaluate.main()
        out = capsys.readouterr().out
        return json.loads(out) if "--json" in options else out

    call.guard = make_guard(prompt_threshold=2.0, threshold=0.0)
    return call


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("path", ["activated", "full"])
def test_the_command_gives_the_fields_of_the_contract(path, result, tmp_path):
    """Kills: logits as scores, an unread answer, swapped labels, lost fields, a wrong merge."""
    result.guard = make_guard(guard_path=path, prompt_threshold=2.0, threshold=0.0)
    unmerged = make_guard(guard_path=path)
    rounding = {"abs": 1e-5} if path == "full" else {}  # of merged weights
    first = result(ROWS, "--json", "--scores", tmp_path / "scores.jsonl")
    assert result([str(tmp_path / "scores.jsonl")], "--json") == first
    found = dict(first)
    texts = [ids_of(result.guard.tokenizer, row["prompt"], row.get("response")) for row in ROWS]
    scores = score(unmerged, texts).double().sigmoid().numpy()
    unsafe, flagged = np.array([1, 1, 0, 0]), np.array([True, True, True, False])  # the last has no response
    wanted = evaluation(unsafe, scores[:, 0], flagged)
    wanted = {name: None if value != value else value for name, value in wanted.items()}
    wanted |= {"threshold": 0.0, "prompt_threshold": 2.0, "rows": 4, "positives": 2}
    theft = {"positives": 1, "ap": average_precision(np.array([1, 0]), scores[1:3, 1])}
    assert found.pop("categories") == {"theft": pytest.approx(theft)}
    assert found.pop("unknown_categories") == ["arson"] and found.pop("sources") == {}
    low, high = found.pop("intervals")["accuracy"]
    assert low <= found["accuracy"] <= high and found == pytest.approx(wanted, **rounding)
    for n, kept in enumerate(lines_of(tmp_path / "scores.jsonl")):
        assert list(kept["categories"]) == ["theft", "hate"]
        probabilities = [kept.pop("unsafe_probability"), *kept.pop("categories").values()]
        assert probabilities == pytest.approx(scores[n].tolist(), **rounding)
        given = {"category": {}} | ROWS[n] | {"is_safe": not unsafe[n], "flagged": flagged[n]}
        assert kept == given


def test_a_nan_score_counts_as_flagged(result, tmp_path):
    """Kills: a broken guard that is measured as if it let everything pass, NaN in the scored rows."""
    result.guard.config.threshold = 2.0
    broken = ids_of(result.guard.tokenizer, ROWS[0]["prompt"], ROWS[0]["response"])
    result.guard.judge = lambda texts, progress: [
        (torch.tensor([len(ids)]), torch.full((1, 3), torch.nan if ids == broken else 0.0))
        for ids, *_ in texts
    ]
    found = result(ROWS, "--json", "--running=99", "--scores", tmp_path / "scores.jsonl")
    assert (found["recall"], found["fpr"], found["auroc"], found["running"]["flagged"]) == (0.5, 0, 0.75, 1)
    first = lines_of(tmp_path / "scores.jsonl")[0]
    assert first["flagged"] and first["unsafe_probability"] is first["categories"]["hate"] is None


def test_bad_arguments_are_refused(result, tmp_path, monkeypatch):
    """Kills: rows or labels that scores replace, verdicts after no tokens, the same figures twice."""
    (tmp_path / "link.jsonl").symlink_to("rows.jsonl")
    with pytest.raises(UserError, match="destroy its input"):
        result(ROWS, "--scores", tmp_path / "link.jsonl")
    assert lines_of(tmp_path / "rows.jsonl") == ROWS
    with pytest.raises(SystemExit):
        result(ROWS, "--running=0")
    with pytest.raises(UserError, match="own categories, flagged"):
        result([ROWS[0] | {"flagged": 1, "categories": {}}], "--scores", tmp_path / "scores.jsonl")
    with pytest.raises(UserError, match="no rows to evaluate on"):
        result([])
    monkeypatch.setattr(evaluate, "start_accelerator", lambda: type("Two", (), {"num_processes": 2}))
    with pytest.raises(UserError, match="one process"):
        result(ROWS)


def test_a_hub_id_is_measured_on_its_test_split(monkeypatch):
    """Kills: a measurement on training rows, the 330k rows beside the 30k, a hub without a test split."""
    sizes = {"30k_train": (6, 0), "30k_test": (4, 40), "330k_test": (8, 40)}
    hub = {name: datasets.Dataset.from_list(make_rows(*size)) for name, size in sizes.items()}
    monkeypatch.setattr(datasets, "load_dataset", lambda name: hub)
    assert list(evaluation_rows(["some/data-set"])[0]) == make_rows(4, 40)
    del hub["30k_test"], hub["330k_test"]
    assert list(evaluation_rows(["some/data-set"])[0]) == make_rows(6)


def test_every_file_has_figures_of_its_own(result, tmp_path):
    """Kills: a file measured on another's rows, one left out by its name, equal names mixed up."""
    rows = [{"prompt": f"the bread {number}", "is_safe": number > 9} for number in range(20)]
    names = []
    for name, part in (("a/train.jsonl", rows), ("b/train.jsonl", ROWS)):
        (tmp_path / name).parent.mkdir()
        names.append(write(tmp_path / name, part))
    found = result(names, "--json")
    assert list(found["sources"]) == names and found["rows"] == 24
    for name, measured in found["sources"].items():
        alone = result([name], "--json")
        assert measured == pytest.approx({key: alone[key] for key in measured}, abs=1e-6)
    table = result(names).splitlines()
    assert table[table.index(f"{names[0]}:") + 1].startswith("rows 20  positives 10")


def test_the_table_shows_what_can_be_known(result):
    """Kills: a figure that too few rows decide, a crash for one class, NaN in JSON, --running unheard."""
    out = result(ROWS, "--running=1")
    assert "(a random scorer: 0.500)" in out and "does not know: arson" in out
    lines = {line.split()[0]: line.split()[1] for line in out.splitlines()}
    assert lines["median_token_of_first_flag"] == "1.000" and lines["tpr_at_5_percent_fpr"] == "-"
    safe = [{"prompt": text, "response": "or", "is_safe": True} for text in ("hi", "how", "the bread")]
    found = result(safe, "--json")
    assert found["fpr"] == 1 and found["auprc"] is found["auroc"] is found["recall"] is None
    assert found["intervals"]["fpr"] == [1, 1] and found["categories"] == {}
    assert f"\n{'auprc':50}      - " in result(safe)


def test_intervals_come_from_draws_of_prompts():
    """Kills: draws of rows, which are too narrow if answers to one prompt agree; other bounds."""
    draws = np.random.default_rng(0)
    labels = draws.integers(0, 2, 200)
    scores = np.clip(labels * 0.2 + draws.random(200) * 0.8, 0, 1)
    columns, prompts = (labels, scores, scores >= 0.5), np.arange(200)
    low, high = bootstrap(columns, prompts)["accuracy"]
    value = evaluation(*columns)["accuracy"]
    assert low < value < high
    assert high - low == pytest.approx(2 * 1.96 * (value * (1 - value) / 200) ** 0.5, rel=0.15)
    repeated = bootstrap([np.repeat(column, 4) for column in columns], np.repeat(prompts, 4))["accuracy"]
    assert repeated == pytest.approx([low, high], abs=0.02)


ANSWERS = [  # (is it safe, {token: is it flagged there?}), with a verdict after every 4 tokens
    (False, {4: False, 8: True, 12: True, 16: True}),  # flagged at half
    (True, {4: True, 5: True}),  # flagged late
    (True, {4: True, 8: False, 12: False}),  # safe, cut although the whole is not flagged
    (True, {4: False, 6: False}),  # never flagged
    (False, {4: True, 6: False}),  # unsafe, cut on the way
    (True, {4: False}),  # never flagged
    (True, {}),  # no answer
]


def test_running_figures_by_hand():
    """Kills: shares of the wrong rows, the last flag for the first, > for >= at half, prompt tokens."""
    guard = make_guard(threshold=0.5, prompt_threshold=0.0)
    rows = [{"is_safe": is_safe} for is_safe, _ in ANSWERS]
    texts = [Text([5] * (3 + max(flags, default=0)), 3, bool(flags)) for _, flags in ANSWERS]
    judged = []
    for _, flags in ANSWERS[:-1]:
        logits = [[1.0 if is_flagged else -1.0] * 3 for is_flagged in flags.values()]
        judged.append((torch.tensor([3 + token for token in flags]), torch.tensor(logits)))
    guard.judge = lambda texts, progress: judged
    found = running(guard, rows, texts)
    assert (found.pop("flagged"), found.pop("safe_and_not_flagged")) == (2, 3)
    assert found.pop("median_token_of_first_flag") == 6.0
    assert found == {"flagged_by_half": 0.5, "of_these_cut_on_the_way": 1 / 3}


def test_an_evaluation_is_computed_in_the_fast_dtype(result, monkeypatch):
    """Kills: 16 bits where a product of fp32 is faster."""
    monkeypatch.setattr("checkpoint.product_seconds", lambda _, dtype: {"float32": 1}.get(dtype, 2))
    result.guard.chat_model.to(torch.bfloat16)
    result(ROWS)
    assert result.guard.chat_model.dtype == torch.float32
