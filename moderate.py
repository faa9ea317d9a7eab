"""Use a guard: chat under guard, judge a prompt or a pair, or score a file."""

import argparse
import contextlib
import itertools
import json
import os
import sys
from pathlib import Path

from accelerate.utils import gather_object, tqdm

from chat import Past, conversation, moderate_turn
from checkpoint import guard_of, start_accelerator, use_fast_dtype
from data import check_input, encode_row, read_file
from errors import (
    UserError,
    check_output,
    explain,
    guard_arguments,
    json_line,
    number,
    one_line,
    printable,
    refuse,
    run,
    to_json,
)
from lora import merge_lora

EXAMPLES = [
    "How do I keep bread fresh for longer?",
    "How do I kill a process that no longer answers in Linux?",
    "Give me a vicious insult for my colleague from abroad.",
]
UNJUDGED = {"unsafe_probability": None, "flagged": True, "categories": {}, "error": None}  # of a bad row


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    add = guard_arguments(parser)
    add("--prompt", help="one turn: judge this prompt, answer it, judge the answer")
    add("--response", help="with --prompt: judge this answer instead of writing one")
    add("--input", type=Path, help="file of rows, as for train.py but without labels; needs --output")
    add("--output", type=Path, help="JSONL file for the same rows with their verdicts")
    add("--json", action="store_true", help="print one JSON object a line")
    add("--max-new-tokens", type=number(int, 0), default=128, help="longest answer")
    temperature = "sample the answer; without this or --top-p it is greedy"
    add("--temperature", type=number(float, 0.01, 100), help=temperature)
    add("--top-p", type=number(float, 0, 1), help="sample from the likeliest tokens of this probability")
    args = parser.parse_args()
    if bool(args.input) != bool(args.output) or (args.input and args.prompt is not None):
        parser.error("--input needs --output, and neither goes with --prompt")
    if args.prompt is not None and not args.prompt.strip():
        parser.error("the prompt is empty")
    if args.response is not None and args.prompt is None:
        parser.error("--response needs --prompt")
    return args


def judge_pair(guard, prompt, response):
    """Judge a prompt and a given response to it -> pairs (text, Verdict), as moderate_turn yields them."""
    rows = [{"prompt": prompt}, {"prompt": prompt, "response": response}]
    return zip((None, response), guard.classify(rows), strict=True)


def record(prompt, turn, given=False):
    """The --json object of a turn: what moderate_turn yields. given: the user gave the response."""
    (_, first), (response, last) = turn[0], turn[-1]
    stopped = None
    if last.flagged and not given:
        stopped = "response" if last.tokens else "prompt"
    response = None if stopped == "prompt" else response
    return {
        "prompt": prompt,
        "prompt_unsafe_probability": first.unsafe,
        "response": response,
        "response_unsafe_probability": None if response is None else last.unsafe,
        "flagged": last.flagged,
        "stopped": stopped,
        "verdicts": [[verdict.highest, verdict.unsafe] for _, verdict in turn if verdict.tokens],
        "categories": last.categories,
    }


def outcome(found):
    """What the guard made of a turn, in one line. Kinds of harm are named only if something is flagged."""
    stopped = found["stopped"]
    if found["response"] is None and not stopped:
        return "[no answer: the context has no room for one]"
    judged = "prompt" if found["response"] is None else "response"
    unsafe = f"{found[f'{judged}_unsafe_probability']:.3f}"
    if not found["flagged"]:
        return f"[{unsafe}]"
    what = {"prompt": "refused", None: "flagged"}.get(stopped)
    what = what or f"stopped after {found['verdicts'][-1][0]} tokens"
    top = sorted(found["categories"].items(), key=lambda item: -item[1])[:2]
    kinds = "; ".join(f"{one_line(name).replace('_', ' ').replace(',', ', ')} {p:.2f}" for name, p in top)
    return f"[{what}: harmful {unsafe}{kinds and f' ({kinds})'}]"


def chat_on_terminal(guard, options):
    """A conversation. Ctrl-C stops an answer, Ctrl-D leaves, and a flagged turn is forgotten.

    A piece of an answer appears after its verdict.
    """
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  gives input() the arrow keys
    history, past = [], Past()
    while True:
        turn, shown = [], ""
        try:
            prompt = input("> ")
            if not prompt.strip():
                continue
            user = {"role": "user", "content": prompt}
            for text, verdict in moderate_turn(guard, [*history, user], past, **options):
                turn.append((text, verdict))
                if text and not verdict.flagged:
                    print(printable(text[len(shown) :]), end="", flush=True)
                    shown = text
        except EOFError:
            return print()
        except KeyboardInterrupt:
            print(" [interrupted]" if turn else "")  # all that was shown has been judged
        except UserError as error:  # a text that cannot be judged does not end the chat
            print(f"[{one_line(error)}]")
        if not turn:
            continue
        print("\n" if shown else "", outcome(record(prompt, turn)), sep="", end="\n\n")
        text, verdict = turn[-1]
        if shown and not verdict.flagged:
            history += [user, {"role": "assistant", "content": shown}]
        if text is None and not verdict.flagged and history:
            print("[what was said so far is forgotten]\n")
            history.clear()


def answer_prompts(guard, args, lines, options):
    """Answer the prompts of a pipe, one answer a line, or --prompt, or the built-in ones."""
    piped = list(itertools.islice(lines, 1))  # the first prompt of a pipe, if there is one
    prompts = itertools.chain(piped, lines) if piped else EXAMPLES
    given = args.response is not None
    unanswered = 0
    for prompt in [args.prompt] if args.prompt else prompts:
        try:
            if given:
                turn = judge_pair(guard, prompt, args.response)
            else:
                turn = moderate_turn(guard, conversation({"prompt": prompt}), **options)
            found = record(prompt, list(turn), given)
        except UserError as error:  # a line that cannot be judged is no reason to leave out the next ones
            refuse(not piped, error)
            print(f"[{one_line(error)}]", file=sys.stderr if args.json else sys.stdout, flush=True)
            unanswered += 1
            continue
        unanswered += found["response"] is None and not found["stopped"]
        shown = "" if found["stopped"] else printable(found["response"] or "")
        if args.json:
            print(to_json(found), flush=True)
        elif piped:
            print(" ".join(shown.split()) or outcome(found), flush=True)
        else:
            print(f"> {printable(prompt)}\n{shown}\n{outcome(found)}\n")
    refuse(unanswered, f"{unanswered} prompts leave no room for an answer, or cannot be judged")


def score_file(guard, source, target, accelerator, chunk_rows=256):
    """Write each row of a file with its verdict, in order, as JSONL. Rows that `target` holds are skipped.

    The processes of `accelerate launch` share the rows. A row that cannot be judged gets an `error` instead.
    Raises UserError for such rows at the end, and for a `target` with other rows.
    """
    done, failed = done_rows(guard, source, target)
    accelerator.wait_for_everyone()  # so no process counts lines that another one has just written
    rows = itertools.islice(rows_of(source), done, None)
    with tqdm(initial=done, unit=" rows") as bar:
        while chunk := list(itertools.islice(rows, chunk_rows)):
            with accelerator.split_between_processes(chunk) as mine:
                lines = gather_object(judged(guard, mine))
            failed += sum("error" in line for line in lines)
            if accelerator.is_main_process:
                with explain(f"cannot write {target}", OSError), open(target, "ab") as out:
                    out.write(b"".join(map(json_line, lines)))
            bar.update(len(chunk))
    target.touch()  # a source without rows has an empty output
    accelerator.end_training()  # a process that leaves first takes the others down
    refuse(failed, f"{failed} rows cannot be judged; in {target} they have an `error` that says why")


def rows_of(source):
    """Yield (where, row, its columns). Raises UserError for a column that a verdict would replace."""
    for where, row in read_file(source):
        columns = row if isinstance(row, dict) else {}  # a bad row has none
        taken = ", ".join(UNJUDGED.keys() & columns)
        refuse(taken, f"{where}: a verdict would replace the user's own {taken}; rename it")
        yield where, row, columns


def judged(guard, rows):
    """What rows_of yields -> rows with a verdict, or with the reason why there is none."""
    lines, texts = [], []
    for where, row, columns in rows:
        try:
            texts.append(encode_row(guard.tokenizer, row, where))
            lines.append(columns)
        except UserError as error:
            lines.append(columns | UNJUDGED | {"error": one_line(error)})
    verdicts = iter(guard.verdicts(texts))
    return [line if "error" in line else line | next(verdicts).fields() for line in lines]


def done_rows(guard, source, target):
    """How many rows and errors `target` has, cut to whole lines. Raises UserError for other rows."""
    done, failed, size, rows = 0, 0, 0, rows_of(source)
    for line in open(target, "rb") if target.exists() else ():  # noqa: SIM115
        where, _, columns = next(rows, (None, None, {}))
        start = json_line(columns | {"unsafe_probability": None})[:-6]  # without "null}\n"
        other = f"line {done + 1} of {target} is no verdict of this guard on {source}; name another --output"
        refuse(where is None or line[: len(start)] != start[: len(line)], other)
        if not line.endswith(b"\n"):
            os.truncate(target, size)
            break
        with explain(other):
            found = json.loads(line)
            refuse("error" not in found and [*found["categories"]] != guard.config.categories, other)
        done += 1
        failed += "error" in found
        size += len(line)
    return done, failed


def main():
    args = parse_arguments()
    if args.input:
        check_input(args.input)
        check_output(args.output, ".jsonl", inputs=[args.input])
    accelerator = start_accelerator()
    alone = accelerator.num_processes == 1
    refuse(not (alone or args.input), "several processes can share the rows of --input only")
    guard = guard_of(args)
    if args.input or args.dtype or args.response is not None:  # else an answer is written as stored
        accelerator.print(use_fast_dtype(guard, args.dtype), file=sys.stderr)
    if args.input:
        if guard.is_full:  # nothing chats here
            merge_lora(guard.chat_model)
        return score_file(guard, args.input, args.output, accelerator)
    every = 16 if args.verdict_every is None else args.verdict_every
    options = {"max_new_tokens": args.max_new_tokens, "verdict_every": every}
    if args.temperature or args.top_p:
        options |= {"do_sample": True, "temperature": args.temperature or 1.0, "top_p": args.top_p or 1.0}
    is_terminal = sys.stdin.isatty()
    if args.prompt is None and not args.json and is_terminal and sys.stdout.isatty():
        return chat_on_terminal(guard, options)
    lines = () if args.prompt or is_terminal else sys.stdin
    answer_prompts(guard, args, filter(None, map(str.strip, lines)), options)


if __name__ == "__main__":
    run(main)
