"""The tool that puts harmless text around harm."""

import json
import sys

from conftest import make_guard, make_rows, write

from model import Verdict
from tools import robustness


def test_shares_are_of_what_is_flagged_as_it_is(monkeypatch, capsys, tmp_path):
    """Kills: rows that are not flagged as they are, text on the other side, lost places."""
    guard, seen = make_guard(), []

    def classify(rows):  # flags "harm" unless a recipe follows it
        seen.extend(rows)
        texts = [row.get("response") or row["prompt"] for row in rows]
        flags = ["harm" in text and "pancakes" not in text for text in texts]
        return [Verdict(0, 0.5, {}, flag, 1) for flag in flags]

    guard.classify = classify
    rows = [{"prompt": f"a harmful question {n} of some length", "is_safe": False} for n in range(3)]
    rows += [{"prompt": "a question", "is_safe": False}, {"prompt": "a harmful one", "is_safe": True}]
    rows += [{"prompt": "hi", "response": "harm", "is_safe": False}]
    files = ["--dataset", write(tmp_path / "rows.jsonl", rows)]
    files += ["--harmless", write(tmp_path / "harmless.jsonl", make_rows(4))]
    monkeypatch.setattr(robustness, "guard_of", lambda args: guard)
    monkeypatch.setattr(robustness, "LONG", {100: 2})
    monkeypatch.setattr(sys, "argv", ["robustness.py", *files])
    robustness.main()
    found = {row.pop("what"): row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert found.pop("as they are") == {"responses": 1, "prompts": 3}
    assert found.pop("a recipe") == {"responses": 0, "prompts": 0}
    assert found.pop("harmless texts of 100 tokens") == {"texts": 2, "prompts": 0, "responses": 0}
    for place in ("start", "middle", "end"):
        assert found.pop(f"harm at the {place} of 100 tokens") == {"texts": 3, "prompts": 1}
    hidden = ("leet", "spaced", "capitals", "look_alike", "zero_width", "soft_hyphens", "full_width")
    for name in (*hidden, "one_letter_a_line"):
        assert found.pop(name) == {"prompts": 0}
    assert found.pop("unpunctuated") == {"prompts": 1}
    assert len(found) == 14 and all(row == {"responses": 1, "prompts": 1} for row in found.values())
    prompts, question = {row["prompt"] for row in seen}, rows[0]["prompt"]
    assert question + robustness.BEHIND["regards"] in prompts
    assert robustness.BEFORE["a refusal before"] + question in prompts
    assert any(text.startswith(f"\n\n{question}") and len(text) > 100 for text in prompts)
    assert any(text.endswith(f"{question}\n\n") and len(text) > 100 for text in prompts)
