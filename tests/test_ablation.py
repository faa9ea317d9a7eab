"""The rows that guards learn from and are measured on."""

import sys
from pathlib import Path

import pytest
from conftest import make_rows, write

from chat import conversation
from data import tenth_of
from errors import UserError
from tools import ablation, guard_data
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
    for n, (file, *_) in enumerate(guard_data.SOURCES.values()):
        if isinstance(file, str):
            (tmp_path / file).parent.mkdir(exist_ok=True)
            answer = {"response": None} if "prompts" in file else {}
            rows = [row | {"prompt": f"{n} {row['prompt']}"} | answer for row in make_rows(300)]
            write(tmp_path / file, rows)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["guard_data.py", "."])
    guard_data.main()
    mix = {path.stem: read(path) for path in Path("runs/mix").iterdir()}
    for name, (*_, learnt, measured) in (guard_data.SOURCES | guard_data.COPIES).items():
        for split, limit in (("train", learnt), ("validation", measured)):
            kinds = [row["is_safe"] for row in mix[f"{split}-{name}"]]
            assert 0 < kinds.count(True) <= limit and 0 < kinds.count(False) <= limit
    answers = {row["response"]: f"0 {row['prompt']}" for row in make_rows(300)}  # BeaverTails is the first
    tenths = {"train": set(), "validation": set(), "test": set()}
    for name, row in [(name, row) for name, rows in mix.items() for row in rows]:
        texts = [m["content"] for m in conversation(row)]
        said = [row["original"]] if "original" in row else texts[::2]  # what the user says
        if name.endswith(("-surrounded", "-long")):
            before, behind = row["around"]
            assert texts[-1].startswith(before) and texts[-1].endswith(behind)
            texts[-1] = texts[-1].removeprefix(before).removesuffix(behind)
            said = texts[:1]
        said = [answers[text] for text in said] if name.endswith("-alone") else said
        tenths[name.partition("-")[0]] |= {tenth_of({"prompt": text}) for text in said}
        assert sum(map(len, texts)) <= guard_data.LONGEST
    assert tenths == {"train": set(range(2, 10)), "validation": {0, 1}, "test": {2}}
    kinds = {(row["disguise"], row["is_safe"]) for row in mix["train-disguised"]}
    assert kinds == {(d.__name__, is_safe) for d in guard_data.DISGUISES for is_safe in (True, False)}
