"""The script behind the table of choices. Each test names the mutation that it kills."""

import json
import sys

import pytest
from test_data import make_rows, write

from common import UserError
from data import read_jsonl, tenth_of
from experiments import ablation
from train import parse_arguments


def test_every_variant_is_one_that_the_training_takes(monkeypatch):
    """Kills: a misspelt option, two variants that are the same guard by mistake."""
    seen = []
    for name, (_, options) in ablation.VARIANTS.items():
        monkeypatch.setattr(sys, "argv", ["train.py", "model", "out", *options])
        arguments = vars(parse_arguments())
        same_options = name.startswith(("rows: SafeRLHF", "template"))  # these differ in what they are given
        assert same_options or arguments not in seen
        seen.append(arguments)


def test_what_was_measured_is_kept_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    """Kills: a variant that is trained twice or left out, prompts in both parts, a tenth too many, results lost in a
    crash, a table of another order, one ablation on two sets of rows."""
    calls = []

    def train(output, variant, seed, options, rows):
        if len(calls) == 5:
            calls.append("crash")
            raise KeyboardInterrupt
        calls.append((variant, seed, len(rows)))
        return {"AUPRC": len(calls) / 100, "category AP": 0.5}

    monkeypatch.setattr(ablation, "train", train)
    monkeypatch.setattr(ablation, "RESULTS", tmp_path / "ablation.json")
    (tmp_path / "out/plain-template").mkdir(parents=True)
    rows = [write(tmp_path / name, make_rows(200, start)) for name, start in (("a.jsonl", 0), ("b.jsonl", 500))]
    monkeypatch.setattr(sys, "argv", ["ablation.py", *rows, str(tmp_path / "out")])
    with pytest.raises(KeyboardInterrupt):
        ablation.main()
    assert len(json.loads((tmp_path / "ablation.json").read_text())) == 5
    ablation.main()
    calls.remove("crash")
    wanted = [(name, seed) for name, (seeds, _) in ablation.VARIANTS.items() for seed in range(seeds)]
    assert [call[:2] for call in calls] == wanted
    assert [variant for variant, _, files in calls if files == 3] == ["rows: SafeRLHF too"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| default | 0.010 / 0.020 / 0.030 | 0.500 / 0.500 / 0.500 |"
    assert len(lines) == 2 + len(ablation.VARIANTS)
    ablation.main()
    assert len(calls) == len(wanted)
    parts = [[row for _, row in read_jsonl(tmp_path / f"out/{name}.jsonl")] for name in ("train", "validation")]
    assert [{tenth_of(row) for row in part} for part in parts] == [{1, 2, 3, 4, 5}, {6, 7, 8, 9}]
    monkeypatch.setattr(sys, "argv", ["ablation.py", rows[1], rows[1], str(tmp_path / "out")])
    with pytest.raises(UserError, match="other rows"):
        ablation.main()
