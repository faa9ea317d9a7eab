"""The command that people use. Each test names the mutation that it kills."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moderate
from conftest import make_guard
from data import encode
from lora import UserError
from moderate import moderate_turn, score_file

FIELDS = ["prompt", "prompt_unsafe_probability", "response", "response_unsafe_probability", "flagged", "stopped"]
FIELDS += ["verdicts", "categories"]
ROWS = [
    {"prompt": "hi", "response": "the answer"},
    {"prompt": "how is the bread?", "id": 7},
    {"prompt": "a", "response": ""},
]


@pytest.fixture
def files(tmp_path, model_folder):
    """config.json and adapter.safetensors of a small guard, as train.py leaves them."""
    guard = make_guard()
    config = {"base_model": model_folder, "dtype": "float32", "threshold": 0.4, **guard.settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    guard.save_adapter(tmp_path / "adapter.safetensors")
    return [str(tmp_path / "config.json"), str(tmp_path / "adapter.safetensors"), "--device-id", "-1"]


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["moderate.py", *map(str, arguments)])
    moderate.main()
    return capsys.readouterr().out


def probabilities(guard, *texts):
    return torch.sigmoid(guard.score([encode(guard.tokenizer, *texts)])[0].double()).tolist()


def test_a_given_pair_is_scored_and_nothing_generated(files, monkeypatch, capsys):
    """Kills: a verdict on the prompt alone, a field that is left out or misnamed, anything else on standard output."""
    guard = make_guard()
    monkeypatch.setattr(moderate, "answer", None)
    record = json.loads(run(monkeypatch, capsys, *files, "--prompt", "hi", "--response", "the answer", "--json"))
    assert list(record) == FIELDS
    unsafe, *kinds = probabilities(guard, "hi", "the answer")
    assert record["response_unsafe_probability"] == pytest.approx(unsafe, abs=1e-6)
    assert record["prompt_unsafe_probability"] == pytest.approx(probabilities(guard, "hi")[0], abs=1e-6)
    assert record["categories"] == pytest.approx(dict(zip(["theft", "hate"], kinds, strict=True)), abs=1e-6)
    assert record["flagged"] == (unsafe >= 0.4) and record["stopped"] is None
    count = len(encode(guard.tokenizer, "hi", "the answer")) - len(encode(guard.tokenizer, "hi"))
    assert record["verdicts"] == [[count, record["response_unsafe_probability"]]]


def test_the_answer_is_the_chat_models_own():
    """Kills: an answer generated with the gate open, a bound that is not kept."""
    guard, plain = make_guard(), make_guard(trained=False)
    ours = moderate_turn(guard, "hi", None, 2.0, 12)
    ids = encode(plain.tokenizer, "hi")
    output = plain.chat_model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
    assert ours["response"] == plain.tokenizer.decode(output, skip_special_tokens=True) != ""
    assert ours["stopped"] is None and not ours["flagged"]


@pytest.mark.parametrize(
    "prompt, response, stopped", [(3.0, 3.0, "prompt"), (-3.0, 3.0, "response"), (-3.0, -3.0, None)]
)
def test_what_stops_a_turn(monkeypatch, prompt, response, stopped):
    """Kills: an answer to a flagged prompt, a flagged answer that passes, a threshold that is not read."""
    guard = make_guard()
    length = len(encode(guard.tokenizer, "hi"))
    scores = {True: prompt, False: response}
    monkeypatch.setattr(guard, "score", lambda rows: torch.tensor([[scores[len(ids) == length]] * 3 for ids in rows]))
    record = moderate_turn(guard, "hi", None, 0.5, 5)
    assert record["stopped"] == stopped and record["flagged"] == (stopped is not None)
    assert (record["response"] is None) == (stopped == "prompt")
    assert moderate_turn(guard, "hi", None, 1.1, 5)["stopped"] is None
    assert moderate_turn(guard, "hi", "the answer", 0.5, 5)["stopped"] is None


def test_a_file_comes_back_in_order_with_its_verdicts(files, monkeypatch, capsys, tmp_path):
    """Kills: rows in another order, other fields lost, an answer that is not judged, a chunk or its rest left out."""
    guard = make_guard()
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS * 3) + "\n")
    score_file(guard, tmp_path / "in.jsonl", tmp_path / "chunks.jsonl", 0.4, chunk_rows=2)
    run(monkeypatch, capsys, *files, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    assert not list(tmp_path.glob("*.tmp"))
    for name in ("chunks.jsonl", "out.jsonl"):
        found = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        assert len(found) == 9
        for row, wanted in zip(found, ROWS * 3, strict=True):
            unsafe, *kinds = probabilities(guard, wanted["prompt"], wanted.get("response"))
            assert row.pop("unsafe_probability") == pytest.approx(unsafe, abs=1e-6)
            assert row.pop("categories") == pytest.approx(dict(zip(["theft", "hate"], kinds, strict=True)), abs=1e-6)
            assert row.pop("flagged") == (unsafe >= 0.4)
            assert row == wanted


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "3",
        "[" * 100_000,
        "9" * 5_000,
        "\udcff",
        '{"response": "a"}',
        '{"prompt": null}',
        '{"prompt": "a", "response": 1}',
    ],
)
def test_a_bad_line_is_refused_by_number_and_no_output_appears(line, tmp_path):
    """Kills: a line skipped in silence, an output that is cut off there, an earlier output that is lost."""
    (tmp_path / "in.jsonl").write_text(json.dumps(ROWS[0]) + "\n\n" + line + "\n", errors="surrogateescape")
    (tmp_path / "out.jsonl").write_text("earlier\n")
    with pytest.raises(UserError, match="line 3"):
        score_file(make_guard(), tmp_path / "in.jsonl", tmp_path / "out.jsonl", 0.5)
    assert (tmp_path / "out.jsonl").read_text() == "earlier\n"


def test_an_output_that_would_destroy_the_input_is_refused(tmp_path):
    """Kills: writing over the input, or over it by the file that is written aside."""
    for name, output in (("in.jsonl", "in.jsonl"), ("out.jsonl.tmp", "out.jsonl")):
        (tmp_path / name).write_text(json.dumps(ROWS[0]) + "\n")
        with pytest.raises(UserError, match="destroy"):
            score_file(make_guard(), tmp_path / name, tmp_path / output, 0.5)
        assert json.loads((tmp_path / name).read_text()) == ROWS[0]


def test_a_probability_at_the_threshold_is_flagged(monkeypatch, tmp_path):
    """Kills: > for >=."""
    guard = make_guard()
    monkeypatch.setattr(guard, "score", lambda rows: torch.zeros(len(rows), 3))
    assert moderate_turn(guard, "hi", "the answer", 0.5, 5)["flagged"]
    assert moderate_turn(guard, "hi", None, 0.5, 5)["stopped"] == "prompt"
    (tmp_path / "in.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    score_file(guard, tmp_path / "in.jsonl", tmp_path / "out.jsonl", 0.5)
    assert json.loads((tmp_path / "out.jsonl").read_text())["flagged"]


def test_without_text_the_built_in_prompts_are_shown(files, monkeypatch, capsys):
    """Kills: a command that needs arguments, a threshold option that is not read, output that --json does not own."""
    monkeypatch.setattr(moderate, "answer", lambda guard, ids, count: "the answer")
    lines = run(monkeypatch, capsys, *files, "--json", "--threshold=1.1").splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == moderate.EXAMPLES
    assert run(monkeypatch, capsys, *files, "--threshold=1.1").count("the answer") == len(moderate.EXAMPLES)
    refused = run(monkeypatch, capsys, *files, "--threshold=0")
    assert refused.count("refused") == len(moderate.EXAMPLES) and "the answer" not in refused


def test_a_flagged_answer_is_not_shown(monkeypatch, capsys):
    """Kills: printing what the guard stopped."""
    record = moderate_turn(make_guard(), "hi", "how is the bread?", 0.0, 5) | {"stopped": "response"}
    moderate.show(record)
    assert "bread" not in capsys.readouterr().out


def test_the_newest_run_is_found_and_its_absence_explained(files, monkeypatch, tmp_path):
    """Kills: the oldest run, a run without an adapter, one before the shipped guard, a traceback for none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(moderate, "__file__", str(tmp_path / "moderate.py"))
    with pytest.raises(UserError, match=r"python train\.py"):
        moderate.find_config()
    for number in (2, 10, 1):
        Path(f"runs/{number}").mkdir(parents=True)
        Path(f"runs/{number}/adapter.safetensors").touch()
    Path("runs/3").mkdir()
    os.utime("runs/10/adapter.safetensors", (2e9, 2e9))
    assert moderate.find_config() == Path("runs/10/config.json")
    Path("guard").mkdir()
    Path("guard/config.json").touch()
    assert moderate.find_config() == tmp_path / "guard/config.json"


BAD_ARGUMENTS = {
    "device": ["--device-id=7"],
    "input alone": ["--input=in.jsonl"],
    "response alone": ["--response=a"],
    "two uses": ["--prompt=a", "--input=in.jsonl", "--output=out.jsonl"],
    "no tokens": ["--prompt=a", "--max-new-tokens=0"],
    "a threshold that is no number": ["--threshold=nan"],
    "no room": ["--prompt=a", "--threshold=2", "--max-new-tokens=999"],
}


@pytest.mark.parametrize("arguments", BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments_are_refused(files, monkeypatch, capsys, arguments):
    """Kills: a check left out."""
    with pytest.raises(UserError):
        run(monkeypatch, capsys, *files, *arguments)


def test_a_mistake_is_one_line_and_exit_status_2(files, tmp_path):
    """Kills: a traceback for a user's mistake, and exit status 1, which means a crash."""
    for arguments in ([files[0], "none.safetensors"], [*files, "--input=none.jsonl", f"--output={tmp_path}/out"]):
        command = [sys.executable, moderate.__file__, *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        last = result.stderr.strip().splitlines()[-1]
        assert result.returncode == 2 and "moderate.py: " in last and "none." in last
        assert "Traceback" not in result.stderr
