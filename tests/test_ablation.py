"""The scripts that make data and train many guards. Each test names the mutations that it kills."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ids_of, make_rows, user, write

import train
from common import UserError
from data import conversation, load_splits, read_file, tenth_of
from tools import ablation, guard_data

ROOT = Path(train.__file__).parent


def rows_of(path):
    return [row for _, row in read_file(path)]


def test_every_variant_is_one_that_train_takes(monkeypatch):
    """Kills: a misspelt option, two variants that are the same guard by mistake."""
    seen = []
    for name, (_, options) in ablation.VARIANTS.items():
        monkeypatch.setattr(sys, "argv", ["train.py", "model", "out", *options])
        arguments = vars(train.parse_arguments())
        other_inputs = name.startswith(("rows:", "template:"))  # these differ in their rows or their model
        assert other_inputs or arguments not in seen
        seen.append(arguments)


@pytest.fixture
def started(tmp_path, monkeypatch):
    """ablation.py without the training. started.calls: the [(variant, seed, file names)] to train."""

    def fake_train(output, variant, seed, options, rows):
        if len(started.calls) == 5 and not started.crashed:
            started.crashed = True
            raise KeyboardInterrupt
        started.calls.append((variant, seed, [Path(file).stem for file in rows]))
        return {"AUPRC": len(started.calls) / 100, "category AP": 0.5}

    def started(beavertails, safe_rlhf, *options):
        monkeypatch.setattr(
            sys, "argv", ["ablation.py", beavertails, safe_rlhf, str(tmp_path / "out"), *options]
        )
        ablation.main()

    started.calls, started.crashed = [], False
    monkeypatch.setattr(ablation, "train", fake_train)
    monkeypatch.setattr(ablation, "RESULTS", tmp_path / "ablation.json")
    (tmp_path / "out/plain-template").mkdir(parents=True)
    return started


@pytest.fixture
def files(tmp_path):
    starts = {"beavertails.jsonl": 0, "more.jsonl": 500}
    return [write(tmp_path / name, make_rows(200, start)) for name, start in starts.items()]


def test_results_are_kept_and_the_rest_goes_on(started, files, tmp_path, capsys):
    """Kills: a variant that is trained twice or left out, results lost in a crash, a table in another order,
    an ablation on two sets of rows.
    """
    with pytest.raises(KeyboardInterrupt):
        started(*files)
    assert len(json.loads((tmp_path / "ablation.json").read_text())) == 5
    started(*files)
    wanted = [(name, seed) for name, (seeds, _) in ablation.VARIANTS.items() for seed in range(seeds)]
    assert [call[:2] for call in started.calls] == wanted
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| default | 0.010 / 0.020 / 0.030 | 0.500 / 0.500 / 0.500 |"
    assert len(lines) == 2 + len(ablation.VARIANTS)
    started(*files)
    assert len(started.calls) == len(wanted)
    with pytest.raises(UserError, match="other rows"):
        started(files[1], files[1])


def test_the_results_are_drawn(started, files, tmp_path):
    """Kills: an option that is not read."""
    pytest.importorskip("matplotlib").use("Agg")
    started.crashed = True
    started(*files, "--plot", str(tmp_path / "ablation.png"))
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")


def test_guards_are_measured_on_prompts_they_did_not_learn(started, files, tmp_path):
    """Kills: prompts in two parts, a tenth too many or too few, a variant with another one's rows."""
    started.crashed = True
    started(*files)
    parts = [rows_of(tmp_path / f"out/{name}.jsonl") for name in ("train", "validation", "test")]
    tenths = [{tenth_of(row) for row in part} for part in parts]
    assert tenths == [{1, 2, 3, 4, 5}, {6, 7, 8, 9}, {0}]
    assert sum(map(len, parts)) == 200
    given = {variant: rows for variant, _, rows in started.calls}
    assert given.pop("rows: SafeRLHF too") == ["train", "validation", "more"]
    assert given.pop("rows: answers alone too") == ["train", "validation", "alone", "test"]
    assert all(rows == ["train", "validation"] for rows in given.values())


def test_answers_alone_are_learnt_beside_their_pairs(started, files, tmp_path):
    """Kills: an answer in place of its pair, lost labels, answers of other splits, a tenth cut out."""
    started.crashed = True
    started(*files)
    paths = {name: tmp_path / f"out/{name}.jsonl" for name in ("train", "validation", "alone", "test")}
    splits, _ = load_splits(list(paths.values()))
    pairs = rows_of(paths["train"])
    assert splits["train"][: len(pairs)] == pairs and splits["validation"] == rows_of(paths["validation"])
    alone = [
        (row["prompt"], row["response"], row["category"], row["is_safe"])
        for row in splits["train"][len(pairs) :]
    ]
    assert alone == [(row["response"], None, row["category"], row["is_safe"]) for row in pairs]


def test_only_real_answers_stand_alone():
    """Kills: a blank answer, a prompt taken for an answer, a history that stays with its answer."""
    said = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = [{"role": role, "content": content} for role, content in said]
    rows = [
        {"prompt": "a", "response": "b", "is_safe": True, "source": "x"},
        {"prompt": "a", "is_safe": True},
        {"prompt": "a", "response": " \n", "is_safe": True},
        {"messages": messages, "is_safe": False},
        {"messages": messages[:3], "is_safe": False},
    ]
    assert list(guard_data.answers_alone(rows)) == [
        {"prompt": "b", "response": None, "is_safe": True, "source": "x"},
        {"prompt": "d", "response": None, "is_safe": False},
    ]


@pytest.fixture
def commands(model_folder, monkeypatch):
    """The commands that ablation.train runs. The first one trains the tiny model in this process."""
    commands = []

    def call(command, **_):
        commands.append(command[2:])
        if len(commands) == 1:
            monkeypatch.setattr(sys, "argv", command[1:])
            train.main()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(ablation, "EMBEDDED", model_folder)
    monkeypatch.setattr(ablation.subprocess, "run", call)
    return commands


def test_a_variant_is_measured_after_its_last_epoch(commands, model_folder, tmp_path):
    """Kills: another split or epoch, columns that train.py does not write, a run that starts again."""
    files = [write(tmp_path / "train.jsonl", make_rows(20)), write(tmp_path / "val.jsonl", make_rows(12, 20))]
    options = ["--lora-r=2", "--learning-rate=0.02"]
    result = ablation.train(tmp_path, "LoRA: r 2", 1, options, files)
    [folder] = [path.parent for path in tmp_path.glob("*/metrics.csv")]
    assert folder.name == "LoRA__r_2_1" and (tmp_path / "caches").is_dir()
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    assert len(rows) == 2 and result["AUPRC"] == float(rows[-1]["validation/auprc"])
    precisions = [float(rows[-1][f"validation/{name}/auprc"]) for name in ("theft", "hate")]
    assert result["category AP"] == pytest.approx(sum(precisions) / 2)
    config = json.loads((folder / "config.json").read_text())
    assert config["guard"]["lora_r"] == 2 and config["arguments"]["seed"] == 1
    assert commands[0][:2] == [model_folder, str(folder)] and "--resume" not in commands[0]
    assert ablation.train(tmp_path, "LoRA: r 2", 1, options, files) == result
    assert commands[1] == [*commands[0], "--resume"]


def test_the_full_path_keeps_no_caches(commands, tmp_path):
    """Kills: --cache-dir where train.py refuses it, a run that could keep caches and does not."""
    commands.append("the first")
    for variant in ("default", "guard path: full"):
        with pytest.raises(FileNotFoundError):  # nothing was trained
            ablation.train(tmp_path, variant, 0, ablation.VARIANTS[variant][1], ["train.jsonl"])
    assert ["--cache-dir" in command for command in commands[1:]] == [True, False]


def test_the_plain_template_is_saved_once(commands, tmp_path):
    """Kills: control tokens in the template, a folder that is written again, a variant with another model."""
    folder = tmp_path / "plain-template"
    ablation.save_plain_template(folder)
    assert [path.name for path in tmp_path.glob("plain*")] == ["plain-template"]
    _, tokenizer = ablation.load_chat_model(str(folder))
    assert tokenizer.decode(ids_of(tokenizer, "hi")) == "user: hi\n\nassistant: "
    history = [*user("a"), {"role": "assistant", "content": "b"}]
    wanted = "user: a\n\nassistant: b\n\nuser: hi\n\nassistant: safe"
    assert tokenizer.decode(ids_of(tokenizer, "hi", "safe", history)) == wanted
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    ablation.save_plain_template(folder)
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    commands.append("the first")
    with pytest.raises(FileNotFoundError):
        ablation.train(tmp_path, "template: plain", 0, [], ["train.jsonl"])
    assert commands[1][0] == str(folder)


def test_a_failed_training_ends_the_ablation(tmp_path, monkeypatch):
    """Kills: the figures of an earlier state in place of an error."""
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(ablation.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match=r"training of .* failed"):
        ablation.train(tmp_path, "default", 0, [], ["train.jsonl"])


@pytest.fixture(scope="module")
def mix(tmp_path_factory):
    """{file: rows} that guard_data.py writes from 300 rows in place of each data set."""
    folder, patch = tmp_path_factory.mktemp("mix"), pytest.MonkeyPatch()
    for n, (file, _, _) in enumerate(guard_data.SOURCES.values()):
        if isinstance(file, str):
            (folder / "data" / file).parent.mkdir(parents=True, exist_ok=True)
            rows = [row | {"prompt": f"{n} {row['prompt']}"} for row in make_rows(300)]
            rows = rows if "prompts" not in file else [row | {"response": None} for row in rows]
            write(folder / "data" / file, rows)
    patch.chdir(folder)
    patch.setattr(sys, "argv", ["guard_data.py", "data"])
    guard_data.main()
    patch.undo()
    return {path.stem: rows_of(path) for path in sorted((folder / "runs/mix").iterdir())}


def test_no_prompt_of_the_mix_is_in_two_splits(mix):
    """Kills: a copy in other clothes or in a conversation whose original is in the other split."""
    answers = {row["response"]: f"0 {row['prompt']}" for row in make_rows(300)}  # BeaverTails is the first
    assert len(answers) == 300
    tenths = {"train": set(), "validation": set(), "test": set()}
    for name, rows in mix.items():
        for row in rows:
            prompt = row.get("original", row.get("prompt"))
            prompt = answers.get(prompt, prompt) if "alone" in name else prompt
            tenths[name.partition("-")[0]].add(tenth_of(row | {"prompt": prompt, "response": None}))
    assert tenths == {"train": set(range(2, 10)), "validation": {0, 1}, "test": {2}}


def test_every_source_has_both_splits_and_keeps_its_limits(mix):
    """Kills: a source that is left out, a limit that only one class keeps, long rows."""
    assert {name.partition("-")[2] for name in mix if name != "test"} >= {
        *guard_data.SOURCES,
        "disguised",
        "alone",
    }
    for name, (_, *limits) in guard_data.SOURCES.items():
        for split, limit in zip(("train", "validation"), limits, strict=True):
            for is_safe in (True, False):
                rows = [row for row in mix[f"{split}-{name}"] if row["is_safe"] == is_safe]
                assert len(rows) <= limit
    sizes = [sum(len(m["content"]) for m in conversation(row)) for rows in mix.values() for row in rows]
    assert max(sizes) <= guard_data.LONGEST


def test_disguises_do_not_tell_the_label(mix):
    """Kills: a disguise that only harmful texts wear, so the guard learns the disguise."""
    kinds = {(row["disguise"], row["is_safe"]) for row in mix["train-disguised"]}
    names = {disguise.__name__ for disguise in guard_data.DISGUISES}
    assert kinds == {(name, is_safe) for name in names for is_safe in (True, False)}


@pytest.mark.parametrize(
    ("disguise", "wanted"),
    [
        ("capitals", "A BOMB, NOW?"),
        ("leet", "4 b0mb, n0w?"),
        ("look_alike", "а bоmb, nоw?"),  # noqa: RUF001
        ("zero_width", "a\u200b \u200bb\u200bo\u200bm\u200bb\u200b,\u200b \u200bn\u200bo\u200bw\u200b?"),
        ("soft_hyphens", "a\xad \xadb\xado\xadm\xadb\xad,\xad \xadn\xado\xadw\xad?"),
        ("full_width", "ａ ｂｏｍｂ， ｎｏｗ？"),  # noqa: RUF001
        ("spaced", "a  b o m b ,  n o w ?"),
        ("unpunctuated", "a bomb now"),
    ],
)
def test_disguises_by_hand(disguise, wanted):
    """Kills: a disguise that changes what is said, or nothing."""
    assert getattr(guard_data, disguise)("a bomb, now?") == wanted


def test_a_long_row_is_cut_or_left_out():
    """Kills: an answer that is dropped because it is long, a prompt that is cut."""
    assert guard_data.shortened({"prompt": "a" * 1001}) is None
    assert guard_data.shortened(row := {"prompt": "a" * 1000}) == row
    assert guard_data.shortened({"prompt": "a" * 100, "response": "b" * 900})["response"] == "b" * 600
    assert guard_data.shortened({"prompt": "a" * 500, "response": "b" * 900}) is None


@pytest.mark.parametrize(
    "script", [pytest.param("ablation.py", marks=pytest.mark.slow), "guard_data.py", "export_peft.py"]
)
def test_a_script_runs_from_the_root(script):
    """Kills: imports that work only under pytest, which puts the root on the path."""
    command = [sys.executable, f"tools/{script}", "--help"]
    assert "usage:" in subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
