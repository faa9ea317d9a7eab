"""Thresholds on other rows."""

import json
import sys

import pytest
from conftest import make_guard, write

from checkpoint import CHOSEN_LATER
from errors import UserError
from model import Verdict
from tools import thresholds


@pytest.fixture
def choose(model_folder, tmp_path, monkeypatch):
    """Run the tool on rows, with a guard that judges a text by its length. Returns the new config's path."""
    guard, path = make_guard(), tmp_path / "config.json"
    path.write_text(json.dumps({"base_model": "x", "guard": {"threshold": 0.5, "categories": ["a"]}}))
    guard.verdicts = lambda texts, *_: [Verdict(1, len(text.ids) / 1000, {}, False, 1) for text in texts]
    monkeypatch.setattr(thresholds, "load_guard", lambda *_, **__: guard)

    def run(rows, *options):
        source = write(tmp_path / "rows.jsonl", rows)
        arguments = [str(path), str(tmp_path / "new.json"), "--dataset", source, *options]
        monkeypatch.setattr(sys, "argv", ["thresholds.py", *arguments])
        thresholds.main()
        return guard, json.loads((tmp_path / "new.json").read_text())

    return run


def rows_of(kind, count):
    """Safe rows, and a harmful one that is longer than all but one of them."""
    rows = [{kind: "x" * n, "is_safe": True} for n in range(1, count + 1)]
    rows.append({kind: "x" * count, "is_safe": False})
    return [row if kind == "prompt" else {"prompt": "hi"} | row for row in rows]


def test_thresholds_are_those_of_the_given_rows(choose):
    """Kills: old thresholds, answers and prompts mixed up, a lost setting, a threshold in the adapter."""
    assert {"threshold", "prompt_threshold", "verdict_every"} <= set(CHOSEN_LATER)
    guard, config = choose(rows_of("prompt", 40) + rows_of("response", 60), "--verdict-every=16")
    assert config["base_model"] == "x" and config["guard"]["categories"] == ["a"]
    assert config["guard"]["verdict_every"] == 16
    for kind, name, count in (("prompt", "prompt_threshold", 40), ("response", "threshold", 60)):
        verdicts = guard.classify(rows_of(kind, count))
        flagged = [verdict.unsafe >= config["guard"][name] for verdict in verdicts]
        assert flagged == [False] * (count - 1) + [True] * 2


def test_a_kind_with_too_few_rows_keeps_its_threshold(choose):
    """Kills: prompts that choose the threshold of answers, a threshold of a few rows."""
    _, config = choose(rows_of("prompt", 40))
    assert config["guard"]["threshold"] == 0.5 and config["guard"]["prompt_threshold"] < 1
    with pytest.raises(UserError, match="too few safe rows"):
        choose(rows_of("prompt", 10) + rows_of("response", 10))
