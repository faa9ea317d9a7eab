"""The command that people use: a turn, a file, a pipe and a chat."""

import contextlib
import io
import itertools
import json
import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import CHATML, ids_of, make_guard, make_tokenizer, plain, score, user, verdict_on, write

import moderate
from chat import Past, conversation, encode, shown_text
from errors import UserError
from lora import LoRALinear
from model import Verdict
from moderate import chat_on_terminal, outcome, record, score_file

ROWS = [
    {"prompt": "hi", "response": "the answer", "response_0": "or"},
    {"prompt": "how is the bread?", "response": None, "response_0": "a\nb"},
    {"prompt": "a", "response": "", "response_0": None},
]
CHAT = {"messages": [*user("hi"), {"role": "assistant", "content": "the answer"}, *user("and?")], "id": 1}
BARE = re.compile(r"\[\d\.\d{3}\]")  # the outcome of a turn that is not flagged
LONG = "how is the bread? " * 60  # longer than the context
ODD = "{{ raise_exception('an odd one') if messages[-1]['content'] == 'odd' }}"
EVIL = "a\x1b[2Jb\x07\r\x9b\u202ec"  # moves a terminal's cursor
TAMED = "a[2Jbc"


@pytest.fixture
def files(saved):
    """The options that name a small guard as train.py leaves it."""
    return [str(saved[0]), "--device-id=-1"]


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


def scripted(guard, *answers, unsafe=lambda prompt, tokens: 0.1):
    """Let the guard give these answers in turn. Returns a list that gets every conversation and its Past.

    unsafe(last prompt, tokens of the answer so far): how harmful that is.
    """
    queue, asked = itertools.cycle(answers), []

    def stream(prompt, past, max_new_tokens, verdict_every):
        text = guard.tokenizer.decode(prompt.ids)
        last = text.splitlines()[-2].removesuffix("<|im_end|>")
        asked.append((text, past))
        answer = guard.tokenizer(next(queue)).input_ids[:max_new_tokens]
        for tokens in sorted({*range(0, len(answer), verdict_every), len(answer)}):
            logits = torch.full((3,), unsafe(last, tokens)).logit()
            yield answer[:tokens], verdict_on(guard, logits, tokens)

    guard.stream = stream
    return asked


@pytest.fixture
def talk(monkeypatch, capsys):
    """A chat as a function: its guard, its lines, which may be exceptions to raise -> what it prints."""

    def call(guard, *lines):
        monkeypatch.setattr("builtins.input", Mock(side_effect=[*lines, EOFError()]))
        chat_on_terminal(guard, {"max_new_tokens": 6, "verdict_every": 2})
        return capsys.readouterr().out

    return call


def test_a_given_pair_is_judged_and_nothing_generated(command):
    """Kills: a verdict on the prompt alone, a field left out or misnamed, other text on standard output."""
    guard = both(0.4)
    guard.stream = None
    texts = [ids_of(guard.tokenizer, "hi"), ids_of(guard.tokenizer, "hi", "the answer")]
    (prompt, *_), (unsafe, theft, hate) = score(guard, texts).double().sigmoid().tolist()
    assert json.loads(command(guard, "--prompt", "hi", "--response", "the answer", "--json")) == {
        "prompt": "hi",
        "prompt_unsafe_probability": pytest.approx(prompt, abs=1e-6),
        "response": "the answer",
        "response_unsafe_probability": pytest.approx(unsafe, abs=1e-6),
        "flagged": unsafe >= 0.4,
        "stopped": None,
        "verdicts": [[len(texts[1]) - len(texts[0]), pytest.approx(unsafe, abs=1e-6)]],
        "categories": pytest.approx({"theft": theft, "hate": hate}, abs=1e-6),
    }


def test_an_answer_is_generated_and_judged_as_it_grows(files, command):
    """Kills: a lost option, an answer that is not the chat model's own, the prompt among the verdicts."""
    options = ["--prompt=hi", "--threshold=2", "--max-new-tokens=12", "--verdict-every=5", "--json"]
    found, tokenizer = json.loads(command(None, *files, *options)), make_tokenizer()
    answer = plain("llama", ids_of(tokenizer, "hi"), max_new_tokens=12)
    assert found["response"] == shown_text(tokenizer, answer) != ""
    assert [tokens for tokens, _ in found["verdicts"]] == [5, 10, 12]
    assert found["stopped"] is None and not found["flagged"]
    refused = json.loads(command(None, *files, "--prompt=hi", "--threshold=0", "--json"))
    assert refused["stopped"] == "prompt"


def test_sampling_is_off_until_asked_for(command):
    """Kills: an option that does not arrive, an option that switches sampling on by its default."""
    guard = make_guard()
    guard.stream = Mock(return_value=[([], Verdict(0, 0.1, {}, False, 1))])
    for options in ([], ["--temperature=0.5"], ["--top-p=0.9"], ["--verdict-every=0"]):
        command(guard, "--prompt=a", *options)
    given = [call.kwargs for call in guard.stream.call_args_list]
    always = {"max_new_tokens": 128, "verdict_every": 16}
    sampled = always | {"do_sample": True, "temperature": 1.0, "top_p": 1.0}
    at_end = always | {"verdict_every": 0}
    assert given == [always, sampled | {"temperature": 0.5}, sampled | {"top_p": 0.9}, at_end]


def test_only_judging_is_made_fast(command, monkeypatch, tmp_path):
    """Kills: a file or a pair in a slow dtype, an answer not in the stored one, merged weights in a chat."""
    monkeypatch.setattr("checkpoint.product_seconds", lambda _, kind: {"float32": 1.0}.get(kind, 2.0))
    file = ["--input", write(tmp_path / "rows.jsonl", ROWS[1:2]), "--output", tmp_path / "out.jsonl"]
    turn, pair = ["--prompt=hi", "--max-new-tokens=2"], ["--prompt=hi", "--response=you"]
    for path, options, is_fast, is_merged in (
        ("full", turn, False, False),
        ("full", pair, True, False),
        ("full", file, True, True),
        ("activated", file, True, False),
        ("activated", [*turn, "--dtype=float32"], True, False),
    ):
        guard = make_guard(guard_path=path)
        guard.chat_model.to(torch.bfloat16)
        command(guard, *options)
        assert guard.chat_model.model.norm.weight.dtype == (torch.float32 if is_fast else torch.bfloat16)
        assert is_merged == (not any(isinstance(module, LoRALinear) for module in guard.modules()))


def scored(guard, source, target, errors=0, **options):
    """The rows that score_file leaves in `target`."""
    message = f"{errors} rows cannot be judged; in {target}"
    with pytest.raises(UserError, match=message) if errors else contextlib.nullcontext():
        score_file(guard, Path(source), target, moderate.start_accelerator(), **options)
    return [json.loads(line) for line in target.read_text().splitlines()]


def test_a_file_comes_back_in_order_with_its_verdicts(command, tmp_path):
    """Kills: rows in another order, lost or changed columns, an unread answer or history, a lost chunk."""
    guard, given = make_guard(prompt_threshold=2.0, threshold=0.0), [*ROWS * 3, CHAT]
    source = write(tmp_path / "in.jsonl", given)
    command(guard, "--input", source, "--output", tmp_path / "1.jsonl")
    for target in (tmp_path / "1.jsonl", tmp_path / "2.jsonl"):  # the command's, and one in small chunks
        for row, wanted in zip(scored(guard, source, target, chunk_rows=2), given, strict=True):
            text = encode(guard.tokenizer, conversation(wanted))
            unsafe, theft, hate = score(guard, [text.ids])[0].double().sigmoid().tolist()
            assert list(row) == [*wanted, "unsafe_probability", "flagged", "categories"]
            assert row.pop("unsafe_probability") == pytest.approx(unsafe, abs=1e-6)
            assert row.pop("categories") == pytest.approx({"theft": theft, "hate": hate}, abs=1e-6)
            assert row == wanted | {"flagged": text.is_answer}


def test_a_bad_row_gets_an_error_and_the_others_their_verdicts(tmp_path):
    """Kills: a row skipped in silence, a file that one row stops, a refused row that passes as harmless."""
    guard = both(0.99, ODD)
    bad = [b"[]", b"[" * 10**5, b'{"response": "a"}', b'{"prompt": "\xff"}', b'{"id": 7, "prompt": "odd"}']
    source, target, good = tmp_path / "in.jsonl", tmp_path / "out.jsonl", b'{"prompt": "a"}\n'
    source.write_bytes(b"".join(good + line + b"\n" for line in bad) + good)
    rows = scored(guard, source, target, errors=len(bad), chunk_rows=4)
    assert [row["flagged"] for row in rows] == [False, *[True, False] * len(bad)]
    for number, row in enumerate(rows[1::2]):
        assert row["error"].startswith(f"{source}, line {2 * number + 2}: ")
        assert row["unsafe_probability"] is None and row["categories"] == {}
    assert rows[-2]["id"] == 7 and "an odd one" in rows[-2]["error"]


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


def test_an_output_of_something_else_is_refused_and_kept(tmp_path):
    """Kills: rows appended to another file, a file that is cut, two guards in one file, 12 taken for 1."""
    guard, target = make_guard(), tmp_path / "out.jsonl"
    source = write(tmp_path / "in.jsonl", [{"prompt": "a", "id": 1}, {"prompt": "b", "id": 2}])
    scored(guard, source, target)
    whole = target.read_bytes()
    others = [b"earlier\n", b"earlier", whole + whole]
    others += [whole.replace(b'"theft"', b'"arson"'), whole.replace(b'"id": 1', b'"id": 12')]
    for content in others:
        assert content != whole
        target.write_bytes(content)
        with pytest.raises(UserError, match=r"line \d of .*out\.jsonl.*another --output"):
            scored(guard, source, target)
        assert target.read_bytes() == content


@pytest.mark.parametrize("column", ["unsafe_probability", "flagged", "categories", "error"])
def test_a_column_that_a_verdict_would_replace_is_refused(column, tmp_path):
    """Kills: a user's own label that is lost."""
    source = write(tmp_path / "in.jsonl", [{"prompt": "a"}, {"prompt": "b", column: None}])
    with pytest.raises(UserError, match=f"line 2: .*own {column}; rename"):
        scored(make_guard(), source, tmp_path / "out.jsonl")
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_two_processes_share_the_rows_of_a_file(files, tmp_path):
    """Kills: rows judged twice, in another order or by nobody, two processes that write."""
    rows = [row | {"n": n} for n, row in enumerate((ROWS * 86)[:257])]  # the second chunk has one row for two
    source, target = write(tmp_path / "in.jsonl", rows), tmp_path / "two.jsonl"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi-gpu", "--num-processes=2"]
    launch += ["--main_process_port=0", moderate.__file__, *files, "--input", source, "--output", target]
    assert subprocess.run(launch, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300).returncode == 0
    found = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["n"] for row in found] == list(range(257))
    unsafe = [row["unsafe_probability"] for row in found]
    assert unsafe == pytest.approx((unsafe[:3] * 86)[:257], abs=1e-6) and len(set(unsafe[:3])) == 3


def test_without_text_the_built_in_prompts_are_shown(command):
    """Kills: a command that needs arguments, a stopped answer that is shown, a text that moves the cursor."""
    guard = both(0.5)
    scripted(guard, EVIL, unsafe=lambda prompt, tokens: 0.9 if tokens and "Linux" in prompt else 0.1)
    shown = command(guard)
    assert all(f"> {prompt}\n" in shown for prompt in moderate.EXAMPLES)
    assert shown.count(TAMED) == len(BARE.findall(shown)) == len(moderate.EXAMPLES) - 1
    assert shown.count("[stopped after") == shown.count("theft") == 1


def test_a_pipe_gives_one_answer_a_line(command, capsys):
    """Kills: an answer with line breaks, a blank or bad line as the end, exit status 0."""
    guard, shown = both(0.95, ODD), []
    scripted(guard, "the answer\nis  long", "", EVIL, unsafe=lambda text, _: 0.99 if text == "evil" else 0.1)
    for options in ([], ["--json"]):
        with pytest.raises(UserError, match="3 prompts"):
            command(guard, *options, lines=f"hi\n\n  \n\udcff how?\nodd\n{LONG}\nevil\nso?\n")
        shown.append(capsys.readouterr())
    first, byte, odd, room, refused, last = shown[0].out.splitlines()
    assert first == "the answer is long" and last == TAMED
    assert byte[0] == "[" and "an odd one" in odd and "no room" in room and refused[:8] == "[refused"
    assert shown[1].err.splitlines() == [byte, odd]
    rows = [json.loads(line) for line in shown[1].out.splitlines()]
    assert [row["prompt"] for row in rows] == ["hi", LONG.strip(), "evil", "so?"]
    assert rows[1]["response"] is None


def test_the_outcome_of_a_turn_in_words():
    """Kills: the least likely kinds of harm, a given answer that is stopped, a name that moves the cursor."""
    kinds = {"violence": 0.01, "slur,stereotype": 0.8123, "animal_abuse": 0.3}
    safe = Verdict(0, 0.01449, kinds, flagged=False, highest=1)
    harmful = Verdict(32, 0.9, kinds, flagged=True, highest=32)
    turn = [("", safe), ("bread", harmful)]
    words = "[flagged: harmful 0.900 (slur, stereotype 0.81; animal abuse 0.30)]"
    assert outcome(record("hi", turn, given=True)) == words
    stopped = record("hi", turn)
    assert (stopped["stopped"], stopped["response"]) == ("response", "bread")
    refused = record("hi", [("", harmful._replace(tokens=0, categories={"\x1b]0;x\x07\n\t!\u202e": 0.1}))])
    assert refused["response"] is refused["response_unsafe_probability"] is None
    assert refused["stopped"] == "prompt" and outcome(refused).isprintable()


def test_a_chat_shows_and_keeps_what_was_not_flagged(talk):
    """Kills: flagged, unjudged or raw text shown, refused text kept, one turn alone, a line that ends it."""
    guard, answer = both(0.5, ODD), "ZYXWV\x07"  # six tokens; the last one rings a bell

    def unsafe(prompt, tokens):
        if (prompt, tokens) in (("wait", 0), ("cut", 4)):
            raise KeyboardInterrupt
        return 0.9 if (prompt, tokens) in (("two", 0), ("four", 4)) else 0.1

    asked = scripted(guard, answer, unsafe=unsafe)
    turns = ["one", "  ", KeyboardInterrupt(), "two", "three", "four", "wait", "cut", "odd", "\udcff", "five"]
    lines = [line for line in talk(guard, *turns).splitlines() if line.strip()]
    history = []
    for prompt, kept in (("one", answer), ("three", answer), ("cut", "ZY")):
        history += [*user(prompt), {"role": "assistant", "content": kept}]
    assert asked[-1][0] == guard.tokenizer.decode(ids_of(guard.tokenizer, "five", None, history))
    past = asked[0][1]  # with it a turn reads only what is new
    assert isinstance(past, Past) and all(kept is past for _, kept in asked)
    whole, kinds = ["ZYXWV", "[0.100]"], "harmful 0.900 (theft 0.90; hate 0.90)]"
    stopped = ["ZY", f"[stopped after 4 tokens: {kinds}", "ZY [interrupted]", "[0.100]"]
    odd, byte = lines[-4:-2]
    assert lines == [*whole, f"[refused: {kinds}", *whole, *stopped, odd, byte, *whole]
    assert "an odd one" in odd and byte.startswith("[")


def test_a_conversation_that_fills_the_context_starts_anew(talk):
    """Kills: a chat that ends there, or that nobody can go on with."""
    guard = both(2.0)
    scripted(guard, "the answer")
    shown = talk(guard, *["how is the bread? " * 5] * 9)
    full, anew = shown.split("said so far is forgotten]")[:2]
    assert "no answer" in full and BARE.search(anew)


def test_on_a_terminal_the_command_is_a_chat(files):
    """Kills: a chat that does not start, ends at a byte that is no text or not at Ctrl-D, progress bars."""
    leader, follower = pty.openpty()
    command = [sys.executable, moderate.__file__, *files, "--max-new-tokens=4", "--threshold=2"]
    streams = {"stdin": follower, "stdout": follower, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"}, **streams)
    os.close(follower)
    os.write(leader, b"\xff?\nhi\n")
    shown = b""
    while not re.search(rb"\[.*\]\r\n.*" + BARE.pattern.encode() + b".*> ", shown, re.DOTALL):
        assert select.select([leader], [], [], 60)[0], shown
        shown += os.read(leader, 1000)
    os.write(leader, b"\4")
    assert process.wait(60) == 0 and b"%|" not in process.stderr.read()
    assert moderate.EXAMPLES[0].encode() not in shown
    os.close(leader)


BAD = ["--input=in.jsonl", "--response=a", "--prompt=a --input=in.jsonl --output=x.jsonl", "--prompt="]
BAD += ["--max-new-tokens=0", "--temperature=nan", "--top-p=1.1", "--input=none.jsonl --output=x.jsonl"]
BAD += ["--input=in.jsonl --output=in.jsonl", "--input=in.jsonl --output=x.csv"]
BAD += ["--verdict-every=-1", "--threshold=0.5 --max-fpr=0.05"]


@pytest.mark.parametrize("options", BAD)
def test_bad_arguments_are_refused_before_the_guard_is_loaded(options, command, monkeypatch, tmp_path):
    """Kills: a check left out, a guard that is loaded for nothing, an output that destroys the input."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.jsonl", ROWS)
    monkeypatch.setattr(moderate, "guard_of", None)
    with pytest.raises((SystemExit, UserError)):
        command(None, *options.split())
    assert os.listdir() == ["in.jsonl"] and Path("in.jsonl").read_text().count("\n") == len(ROWS)


def test_a_reader_that_leaves_is_no_crash(files):
    """Kills: a traceback for a broken pipe, exit status 0 for answers that nobody read."""
    command = [sys.executable, moderate.__file__, *files, "--json", "--max-new-tokens=2"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(command, text=True, **pipes)
    process.stdout.close()
    _, errors = process.communicate("hi\n" * 50, timeout=120)
    assert process.returncode == 1 and "Traceback" not in errors and "BrokenPipe" not in errors
