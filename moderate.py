"""Use a trained guard: chat under guard, or score texts that are already there.

Every verdict is a probability that the conversation so far is harmful, and one for each kind of harm; what reaches the
threshold is flagged. A flagged prompt is not answered, and an answer ends where it is first flagged.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import stat
import sys
import textwrap
import unicodedata
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import TextStreamer

from checkpoint import load_guard
from common import UserError, run
from data import answer_start, conversation, encode, encode_row, is_answer, read_jsonl
from model import is_flagged, probabilities, verdict_fields

EXAMPLES = [
    "How do I keep bread fresh for longer?",
    "How do I kill a process that no longer answers in Linux?",
    "Give me a vicious insult for my colleague from abroad.",
]


def parse_arguments():
    usage = "%(prog)s [config.json] [adapter.safetensors] [options]"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage=usage)
    add = parser.add_argument
    add("config", nargs="?", type=Path, help="default: the guard in guard/, or else the newest run of train.py")
    add("adapter", nargs="?", type=Path, help="default: adapter.safetensors beside the config")
    add("--device-id", type=int, help="number of the GPU, -1 for the CPU; default: the first GPU if there is one")
    add("--prompt", help="chat one turn: judge this prompt, answer it, judge the answer; default: chat on the terminal")
    add("--response", help="with --prompt: judge this answer instead of generating one")
    add("--input", type=Path, help="JSONL file of rows with prompt and, if they have one, response; needs --output")
    add("--output", type=Path, help="JSONL file for the same rows with their verdicts")
    add("--json", action="store_true", help="one JSON object a line")
    add("--threshold", type=float, help="flag prompts and answers from this probability; above 1: judge, never stop")
    add("--max-new-tokens", type=int, default=128, help="longest answer to generate")
    every = "tokens from verdict to verdict; a guard of the full path judges only the prompt and the whole answer"
    add("--verdict-every", type=int, default=16, metavar="N", help=every)
    add("--temperature", type=float, help="sample the answer; without this or --top-p it is greedy")
    add("--top-p", type=float, help="sample from the likeliest tokens that have this probability together")
    args = parser.parse_args()
    mistakes = {
        "--input and --output go together": (args.input is None) != (args.output is None),
        "give either --prompt or --input": args.input and args.prompt is not None,
        "--response needs the --prompt that it answers": args.response is not None and args.prompt is None,
        "the prompt is empty": args.prompt is not None and not args.prompt.strip(),
        "--max-new-tokens and --verdict-every must be at least 1": min(args.max_new_tokens, args.verdict_every) < 1,
        "--temperature must be from 0.01 to 100": args.temperature is not None and not 0.01 <= args.temperature <= 100,
        "--top-p must be above 0 and at most 1": args.top_p is not None and not 0 < args.top_p <= 1,
    }
    for mistake, made in mistakes.items():
        if made:
            raise UserError(mistake)
    return args


def moderate_turn(guard, prompt, response, thresholds, history=(), **options):
    """Judge a prompt, answer it unless it is flagged, and judge the answer; a `response` that is given is only judged.

    history: the messages before, as for encode; options: as for GuardedChat.generate. Returns the record that --json
    prints; `stopped` says whether the prompt or the answer ended the turn. Where the context has no room for an answer,
    the prompt is judged, in windows if it is longer than that, and `response` stays None.
    """
    ids = encode(guard.tokenizer, prompt, history=history)
    if response is None and len(ids) + options["max_new_tokens"] <= guard.max_tokens:
        [(answer, verdicts, stopped)] = guard.generate([ids], thresholds, **options)
        response = None if stopped == "prompt" else guard.tokenizer.decode(answer, skip_special_tokens=True)
    else:
        texts = [ids] if response is None else [ids, encode(guard.tokenizer, prompt, response, history)]
        judged = probabilities(guard.score(texts), guard.calibration).tolist()
        answers = [len(text) - answer_start(ids, text) for text in texts]
        verdicts = list(zip(answers, judged, strict=True))
        stopped = "prompt" if response is None and is_flagged(judged[0][0], thresholds.prompt) else None
    last = verdict_fields(guard, thresholds[verdicts[-1][0] > 0], *verdicts[-1][1])
    return {
        "prompt": prompt,
        "prompt_unsafe_probability": verdicts[0][1][0],
        "response": response,
        "response_unsafe_probability": None if response is None else last["unsafe_probability"],
        "flagged": last["flagged"],
        "stopped": stopped,
        "verdicts": [[tokens, verdict[0]] for tokens, verdict in verdicts if tokens],
        "categories": last["categories"],
    }


def outcome(record):
    """What the guard made of a turn, in a line."""
    top = sorted(record["categories"].items(), key=lambda item: -item[1])[:3]
    kinds = "".join(f", {' '.join(printable(name).split())} {probability:.3f}" for name, probability in top)
    if record["stopped"] == "prompt":
        return f"[refused, the prompt is flagged: unsafe {record['prompt_unsafe_probability']:.3f}{kinds}]"
    if record["response"] is None:
        return "[no answer: the conversation leaves no room for one in the model's context]"
    cut = f"stopped after {record['verdicts'][-1][0]} tokens, flagged: " if record["stopped"] else ""
    return f"[{cut}unsafe {record['response_unsafe_probability']:.3f}{kinds}]"


def show(record):
    """Print a turn for human eyes; what the guard stopped is not shown."""
    print(f"prompt   {record['prompt_unsafe_probability']:.3f}  {printable(record['prompt'])}")
    if record["response"] is not None and not record["stopped"]:
        print(f"answer   {record['response_unsafe_probability']:.3f}  {printable(record['response'])}")
    print(f"{outcome(record)}\n")


def printable(text):
    """The text without what could move a terminal's cursor, recolour it or turn its lines round."""
    return "".join(c for c in text if c in "\n\t\u200c\u200d" or unicodedata.category(c) not in ("Cc", "Cf"))


class Screen(TextStreamer):
    """Shows an answer while it comes, wrapped to the terminal, with the running verdict at the right margin."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.column = 0

    def widths(self):
        """Columns for text, and columns in all: there is no margin where that would leave too few."""
        columns = shutil.get_terminal_size().columns
        return columns - 7 if columns > 40 else columns, columns

    def put_verdict(self, tokens, probabilities):
        room, columns = self.widths()
        if room < columns:
            # The cursor is put back, so that the text goes on where it was.
            print(f"\x1b7\x1b[{columns - 4}G\x1b[2m{probabilities[0]:.3f}\x1b8", end="", flush=True)

    def on_finalized_text(self, text, stream_end=False):
        room, _ = self.widths()
        for word in re.findall(r"\n| |[^\n ]+", printable(text).expandtabs(4)):
            if word == "\n" or (self.column and self.column + sum(map(cells, word)) > room):
                self.newline()
                word = word.strip()  # of a line that is wrapped at a space, the space
            for char in word:
                if self.column + cells(char) > room:
                    self.newline()
                print(char, end="")
                self.column += cells(char)
        if stream_end:
            self.newline()
        sys.stdout.flush()

    def newline(self):
        print()
        self.column = 0


def cells(char):
    """How many columns of a terminal a character takes."""
    if unicodedata.category(char) in ("Cf", "Me", "Mn"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "FW" else 1


def chat(guard, thresholds, **options):
    """A conversation on a terminal: Ctrl-C stops the answer, Ctrl-D leaves, and a flagged turn is forgotten."""
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  gives input() the arrow keys
    history, interrupted = [], []

    def stop(*_):
        # The first asks for an end, so that what there is of the answer gets its verdict; the second does not wait.
        if interrupted:
            raise KeyboardInterrupt
        interrupted.append(True)

    options["stopping_criteria"] = [lambda ids, scores: torch.full((len(ids),), bool(interrupted), device=ids.device)]
    while True:
        try:
            prompt = input("> ")
        except KeyboardInterrupt:
            prompt = print() or ""
        except EOFError:
            return print()
        if not prompt.strip():
            continue
        interrupted.clear()
        handler = signal.signal(signal.SIGINT, stop)
        try:
            record = moderate_turn(
                guard, prompt, None, thresholds, history, streamer=Screen(guard.tokenizer), **options
            )
        except KeyboardInterrupt:
            print("[interrupted, and forgotten]\n")
            continue
        except UserError as error:  # a text that cannot be judged is no reason to leave
            print(f"[{printable(str(error))}]\n")
            continue
        finally:
            signal.signal(signal.SIGINT, handler)
        print(textwrap.fill(outcome(record), shutil.get_terminal_size().columns), end="\n\n")
        if record["stopped"]:
            continue
        if record["response"] is None and history:
            print("[what was said so far is forgotten]\n")
            history.clear()
        elif record["response"] is not None:
            history += [{"role": "user", "content": prompt}, {"role": "assistant", "content": record["response"]}]


def piped():
    """The lines on standard input, where that is a pipe or a file."""
    mode = os.fstat(sys.stdin.fileno()).st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISREG(mode):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
        yield from filter(None, map(str.strip, sys.stdin))


def score_file(guard, source, target, thresholds, chunk_rows=256):
    """Write each row of a JSONL file with its verdict added, in the same order; rows that `target` has are not judged.

    The processes of `accelerate launch` share the rows. Raises UserError for a bad line, before any row is judged, and
    for a `target` whose rows, categories or flags are not those of this input, guard and thresholds.
    """
    if source.exists() and not source.is_file():
        raise UserError(f"{source} must be a file on disk, for it is read more than once")
    if target.exists() and target.samefile(source):
        raise UserError(f"writing {target} would destroy the input; name another --output")
    lines = read_jsonl(source)
    total = sum(1 for number, row in lines if encode_row(guard.tokenizer, row, f"{source}, line {number}"))
    accelerator, there = Accelerator(), rows_there(guard, source, target, thresholds)
    accelerator.wait_for_everyone()  # or a slower process would count what this one writes
    rows = itertools.islice(rows_of(source), there, None)
    bar = tqdm(initial=there, total=total, unit=" rows", disable=not accelerator.is_main_process)
    with open(target, "ab") as out, bar:
        while chunk := list(itertools.islice(rows, chunk_rows)):
            with accelerator.split_between_processes(chunk) as share:
                texts = [encode_row(guard.tokenizer, row) for row in share]
            judged = gather_object(probabilities(guard.score(texts), guard.calibration).tolist())
            if accelerator.is_main_process:
                for row, outputs in zip(chunk, judged, strict=True):
                    out.write(judged_line(guard, thresholds, row, *outputs))
                out.flush()
            bar.update(len(chunk))
    accelerator.end_training()  # or a process that leaves first takes the others down


def rows_of(source):
    """The rows of a JSONL file, without the verdicts that an earlier scoring may have left in them."""
    added = ("unsafe_probability", "flagged", "categories")
    return ({name: row[name] for name in row if name not in added} for _, row in read_jsonl(source))


def judged_line(guard, thresholds, row, *judged):
    _, response, _ = conversation(row)
    threshold = thresholds[is_answer(response)]
    return (json.dumps(row | verdict_fields(guard, threshold, *judged)) + "\n").encode()


def rows_there(guard, source, target, thresholds):
    """How many rows `target` has; a last line that is cut off, for the run was killed, is taken out."""
    there, size, rows = 0, 0, rows_of(source)
    if not target.exists():
        return there
    with open(target, "rb") as file:
        for line in file:
            row, is_ours = next(rows, {}), False
            start = json.dumps(row)[:-1].encode()
            if not line.endswith(b"\n") and line[: len(start)] == start[: len(line)]:
                os.truncate(target, size)
                break
            with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError):
                found = json.loads(line)
                found = found["unsafe_probability"], *found["categories"].values()
                is_ours = line == judged_line(guard, thresholds, row, *found)
            if not is_ours:
                where = f"line {there + 1} of {target}"
                raise UserError(f"{where} is no verdict of such a guard on the row of {source}; name another --output")
            there, size = there + 1, size + len(line)
    return there


def main():
    args = parse_arguments()
    guard, thresholds = load_guard(args.config, args.adapter, args.device_id, args.threshold)
    if args.input or args.response is not None:  # nothing is generated
        guard.use_fast_dtype()
    if args.input:
        return score_file(guard, args.input, args.output, thresholds)
    if Accelerator().num_processes > 1:
        raise UserError("several processes can share the rows of --input, and nothing else")
    options = {"max_new_tokens": args.max_new_tokens, "verdict_every": args.verdict_every}
    if args.temperature or args.top_p:
        options |= {"do_sample": True, "temperature": args.temperature or 1.0, "top_p": args.top_p or 1.0}
    sys.stdout.reconfigure(errors="replace")
    if args.prompt is None and not args.json and sys.stdin and sys.stdin.isatty() and sys.stdout.isatty():
        return chat(guard, thresholds, **options)
    lines = piped() if args.prompt is None and sys.stdin else iter([])
    if first := next(lines, None):
        prompts = itertools.chain([first], lines)
    else:
        prompts = EXAMPLES if args.prompt is None else [args.prompt]
    unanswered = 0
    for prompt in prompts:
        try:
            record = moderate_turn(guard, prompt, args.response, thresholds, **options)
        except UserError as error:  # one line that cannot be judged is no reason to leave the next ones out
            if not first:
                raise
            print(f"[{printable(str(error))}]", file=sys.stderr if args.json else sys.stdout, flush=True)
            unanswered += 1
            continue
        if args.json:
            print(json.dumps(record), flush=True)
        elif first:
            text = None if record["stopped"] else record["response"]
            print(outcome(record) if text is None else " ".join(printable(text).split()), flush=True)
        else:
            show(record)
        unanswered += record["response"] is None and not record["stopped"]
    if unanswered:
        raise UserError(f"{unanswered} prompts leave no room for an answer in the context, or cannot be judged")


if __name__ == "__main__":
    run(main)
