"""The scripts that make data and train many guards. Each test names the mutations that it kills."""

import csv
import json
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import ids_of, make_rows, user, write

import train
from chat import conversation
from data import load_splits, tenth_of
from errors import UserError
from tools import ablation, guard_data, train_cached
from tools.guard_data import read

HISTORY = [*user("a"), {"role": "assistant", "content": "b"}]


def test_every_variant_is_one_that_train_takes(monkeypatch):
    """Kills: a misspelt option, two variants that are the same guard by mistake."""
    seen = []
    for name, (_, options) in ablation.VARIANTS.items():
        monkeypatch.setattr(sys, "argv", ["train.py", "model", "out", *options])
        arguments = vars(train.parse_arguments())
        assert arguments not in seen or name.startswith(("rows:", "template:"))  # of other rows or models
        seen.append(arguments)


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Runs ablation.py without the training. started.calls: the [(variant, seed, file names)] to train."""

    def fake_train(output, variant, seed, options, rows):
        started.calls.append((variant, seed, [Path(file).stem for file in rows]))
        if len(started.calls) == started.crash_at:
            raise KeyboardInterrupt
        return {"AUPRC": len(started.calls) / 100, "category AP": 0.5}

    def started(rows, *options):
        files = [write(tmp_path / f"{name}.jsonl", rows) for name in ("rows", "more")]
        monkeypatch.setattr(sys, "argv", ["", *files, str(tmp_path / "out"), *options])
        ablation.main()

    started.calls, started.crash_at = [], None
    monkeypatch.setattr(ablation, "train", fake_train)
    monkeypatch.setattr(ablation, "RESULTS", tmp_path / "ablation.json")
    (tmp_path / "out/plain-template").mkdir(parents=True)
    return started


def test_results_are_kept_and_the_rest_goes_on(started, tmp_path, capsys):
    """Kills: a variant trained twice or left out, results lost in a crash, an ablation on mixed rows."""
    pytest.importorskip("matplotlib").use("Agg")
    started.crash_at = 6
    with pytest.raises(KeyboardInterrupt):
        started(make_rows(200))
    assert started.calls.pop() and len(json.loads((tmp_path / "ablation.json").read_text())) == 5
    started.crash_at = None
    for _ in range(2):
        started(make_rows(200), f"--plot={tmp_path / 'ablation.png'}")
    wanted = [(name, seed) for name, (seeds, _) in ablation.VARIANTS.items() for seed in range(seeds)]
    assert [call[:2] for call in started.calls] == wanted
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| default | 0.010 / 0.020 / 0.030 | 0.500 / 0.500 / 0.500 |"
    assert len(lines) == 2 * (2 + len(ablation.VARIANTS))
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="other rows"):
        started(make_rows(180))


def test_guards_are_measured_on_prompts_they_did_not_learn(started, tmp_path):
    """Kills: a prompt in two parts, a tenth too many, another variant's rows, an answer for its pair."""
    started(make_rows(200))
    paths = {name: tmp_path / f"out/{name}.jsonl" for name in ("train", "validation", "test", "alone")}
    *parts, alone = (read(path) for path in paths.values())
    assert [{tenth_of(row) for row in part} for part in parts] == [{1, 2, 3, 4, 5}, {6, 7, 8, 9}, {0}]
    assert alone == [row | {"prompt": row["response"], "response": None} for row in parts[0]]
    splits = load_splits(list(paths.values())).splits
    assert splits["train"] == parts[0] + alone and splits["validation"] == parts[1]
    given = {variant: rows for variant, _, rows in started.calls}
    assert given.pop("rows: SafeRLHF too") == ["train", "validation", "more"]
    assert given.pop("rows: answers alone too") == ["train", "validation", "alone", "test"]
    assert all(rows == ["train", "validation"] for rows in given.values())


def test_only_real_answers_stand_alone():
    """Kills: a blank answer, a prompt taken for an answer, a history that stays with its answer."""
    rows = [{"prompt": "a", "response": text, "source": "x"} for text in ("b", " ", None)]
    rows += [{"messages": messages, "is_safe": False} for messages in (HISTORY * 2, HISTORY + user("c"))]
    found = [{"prompt": "b", "response": None} | rest for rest in ({"source": "x"}, {"is_safe": False})]
    assert list(guard_data.answers_alone(rows)) == found


def test_a_variant_is_measured_after_its_last_epoch(model_folder, tmp_path, monkeypatch):
    """Kills: another split or epoch, caches of the full path, a run that starts again, a failure ignored."""
    started = Mock(return_value=Mock(returncode=0))
    monkeypatch.setattr(train, "load", train.load)  # undone at the end
    monkeypatch.setattr(ablation, "EMBEDDED", model_folder)
    monkeypatch.setattr(ablation.subprocess, "run", started)
    files = [write(tmp_path / "train.jsonl", make_rows(20)), write(tmp_path / "val.jsonl", make_rows(12, 20))]
    options = ["--lora-r=2", "--learning-rate=0.02"]
    for variant in ("guard path: full", "template: plain", "LoRA: r 2"):
        with pytest.raises(FileNotFoundError):  # nothing was trained
            ablation.train(tmp_path, variant, 1, ablation.VARIANTS.get(variant, (1, options))[1], files)
    monkeypatch.setattr(sys, "argv", started.call_args.args[0][1:])
    train_cached.main()
    result, folder = ablation.train(tmp_path, "LoRA: r 2", 1, options, files), tmp_path / "LoRA__r_2_1"
    commands = [call.args[0][1:] for call in started.call_args_list]
    root, plain = Path(train.__file__).parent, str(tmp_path / "plain-template")
    cached = [str(root / "tools/train_cached.py"), str(tmp_path / "caches")]
    starts = [[str(root / "train.py"), model_folder], [*cached, plain], [*cached, model_folder, str(folder)]]
    assert [command[: len(start)] for command, start in zip(commands, starts, strict=False)] == starts
    assert commands[3:] == [[*commands[2], "--resume"]] and "--seed=1" in commands[2]
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    names = [f"validation/{part}auprc" for part in ("", "theft/", "hate/")]
    first, last = ([float(row[name]) for name in names] for row in rows)
    assert list(result.values()) == [last[0], pytest.approx(sum(last[1:]) / 2)] and first != last
    started.return_value.returncode = 1
    with pytest.raises(UserError, match=r"training of .* failed"):
        ablation.train(tmp_path, "LoRA: r 2", 1, options, files)


def test_the_plain_template_is_saved_once(model_folder, tmp_path, monkeypatch):
    """Kills: control tokens in the template, a folder that is written again."""
    monkeypatch.setattr(ablation, "EMBEDDED", model_folder)
    for _ in range(2):
        ablation.save_plain_template(tmp_path / "plain")
        _, tokenizer = ablation.load_chat_model(str(tmp_path / "plain"))
        wanted = "user: a\n\nassistant: b\n\nuser: hi\n\nassistant: safe"
        assert tokenizer.decode(ids_of(tokenizer, "hi", "safe", HISTORY)) == wanted
        monkeypatch.setattr(ablation, "EMBEDDED", "gone")


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


def test_disguises_by_hand():
    """Kills: a disguise that changes what is said, or nothing."""
    wanted = ["A BOMB, NOW?", "4 b0mb, n0w?", "а bоmb, nоw?", *(c.join("a bomb, now?") for c in "\u200b\xad")]  # noqa: RUF001
    wanted += ["ａ ｂｏｍｂ， ｎｏｗ？", "a  b o m b ,  n o w ?", "a bomb now"]  # noqa: RUF001
    assert [disguise("a bomb, now?") for disguise in guard_data.DISGUISES] == wanted


def test_a_long_row_is_cut_or_left_out_and_a_damaged_one_is_named(tmp_path):
    """Kills: an answer that is dropped because it is long, a prompt that is cut, a mix of the rows before."""
    assert guard_data.shortened({"prompt": "a" * 1001}) is None
    assert guard_data.shortened(row := {"prompt": "a" * 1000}) == row
    assert guard_data.shortened({"prompt": "a" * 100, "response": "b" * 900})["response"] == "b" * 600
    assert guard_data.shortened({"prompt": "a" * 500, "response": "b" * 900}) is None
    (tmp_path / "rows.jsonl").write_text('{"prompt": "hi"}\n{"prompt"')
    with pytest.raises(UserError, match="line 2: cannot be read as JSON"):
        read(tmp_path / "rows.jsonl")
