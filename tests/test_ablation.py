"""The rows that guards learn from and are measured on."""

import json
import re
import sys
from pathlib import Path

import pytest
from conftest import make_rows, write

from data import tenth_of
from errors import UserError
from tools import ablation, guard_data, language_data
from tools.guard_data import read


def test_an_ablation_measures_on_prompts_that_no_guard_learnt(tmp_path):
    """Kills: a prompt in two parts, a tenth too many, an answer for its pair, an ablation on mixed rows."""
    files = ablation.write_files(write(tmp_path / "rows.jsonl", make_rows(200)), tmp_path / "out")
    *parts, alone = (read(Path(files[name])) for name in ("train", "validation", "test", "alone"))
    assert [{tenth_of(row) for row in part} for part in parts] == [{1, 2, 3, 4, 5}, {6, 7, 8, 9}, {0}]
    assert alone == [row | {"prompt": row["response"], "response": None} for row in parts[0]]
    with pytest.raises(UserError, match="other rows"):
        ablation.write_files(write(tmp_path / "rows.jsonl", make_rows(180)), tmp_path / "out")


def test_the_mix_has_every_source_within_its_limits_and_no_prompt_twice(tmp_path, monkeypatch):
    """Kills: a source left out, a limit of one class, a copy in another split, a disguise of one label."""
    monkeypatch.chdir(tmp_path)
    for n, name in enumerate(guard_data.SOURCES):
        rows = [row | {part: f"{n} {row[part]}" for part in ("prompt", "response")} for row in make_rows(300)]
        if name in guard_data.COPIES["disguised"][0]:
            rows = [row | {"response": None} for row in rows]
        monkeypatch.setitem(guard_data.SOURCES, name, (write(tmp_path / name, rows), 60, 20))
    monkeypatch.setattr(sys, "argv", ["guard_data.py", "."])
    guard_data.main()
    mix = {path.stem: read(path) for path in Path("runs/mix").iterdir()}
    for name, (*_, learnt, measured) in (guard_data.SOURCES | guard_data.COPIES).items():
        for split, limit in (("train", learnt), ("validation", measured)):
            kinds = [row["is_safe"] for row in mix[f"{split}-{name}"]]
            assert 0 < kinds.count(True) <= limit and 0 < kinds.count(False) <= limit
    tenths = {"train": set(), "validation": set(), "test": set()}
    for name, rows in mix.items():
        if name.endswith(("-surrounded", "-long")):
            for row in rows:
                before, behind = row["around"]
                judged = row["response"] or row["prompt"]
                assert judged.startswith(before) and judged.endswith(behind)
        for n, part, number in re.findall(r"(\d+) (question|answer) (\d+)", json.dumps(rows)):
            number = int(number) // 2 if part == "answer" else number  # of its prompt
            tenths[name.partition("-")[0]].add(tenth_of({"prompt": f"{n} question {number}"}))
    assert tenths == {"train": set(range(2, 10)), "validation": {0, 1}, "test": {2}}
    kinds = {(row["disguise"], row["is_safe"]) for row in mix["train-disguised"]}
    assert kinds == {(d.__name__, is_safe) for d in guard_data.DISGUISES for is_safe in (True, False)}


def test_all_translations_of_a_harmful_question_share_a_split(tmp_path, monkeypatch):
    """Kills: a split by text, a long prompt or a long row of the mix that is kept, a whole mix."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["language_data.py", "."])
    for folder in ("prompts", "runs/mix"):
        Path(folder).mkdir(parents=True)
    rows = [{"prompt": f"{n} {n % 40}", "is_safe": False, "question": str(n % 40)} for n in range(200)]
    harmless = [{"prompt": f"harmless {n}", "is_safe": True} for n in range(40)]
    write(Path("prompts/multilingual.jsonl"), [*rows, {"prompt": "a" * 201, "is_safe": True}, *harmless])
    with pytest.raises(UserError, match="runs/mix has no files"):
        language_data.main()
    for name in ("train-prompts", "train-long", "validation-prompts"):
        write(Path(f"runs/mix/{name}.jsonl"), make_rows(400))
    language_data.main()
    found = {path.stem: read(path) for path in Path("runs/languages").iterdir()}
    parts = [found.pop(f"{split}-languages") for split in ("train", "validation")]
    questions = [{row.get("question") for row in part} - {None} for part in parts]
    assert sum(map(len, parts)) == 240 and not questions[0] & questions[1]
    assert len(questions[0]) > len(questions[1]) > 0
    assert 60 < len(found.pop("train-prompts")) < 140 and found == {"validation-prompts": make_rows(400)}
