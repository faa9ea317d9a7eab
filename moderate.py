"""Use a guard: chat under guard, judge a prompt or a pair, or score a file."""

import argparse
import contextlib
import itertools
import os
import stat
import sys
from pathlib import Path

from chat import Past, encode
from checkpoint import load_guard, start_accelerator, use_fast_dtype
from common import (
    UserError,
    add_guard_arguments,
    explain,
    one_line,
    printable,
    refuse,
    run,
    text_lines,
    to_json,
)
from data import conversation
from runs import score_file

EXAMPLES = [
    "How do I keep bread fresh for longer?",
    "How do I kill a process that no longer answers in Linux?",
    "Give me a vicious insult for my colleague from abroad.",
]


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    add = add_guard_arguments(parser)
    add("--prompt", help="one turn: judge this prompt, answer it, judge the answer")
    add("--response", help="with --prompt: judge this answer instead of writing one")
    add("--input", type=Path, help="file of rows, as for train.py but without labels; needs --output")
    add("--output", type=Path, help="JSONL file for the same rows with their verdicts")
    add("--strict", action="store_true", help="stop at the first row of --input that cannot be judged")
    add("--json", action="store_true", help="print one JSON object a line")
    add("--max-new-tokens", type=int, default=128, help="longest answer")
    add("--verdict-every", type=int, default=16, metavar="N", help="tokens from one verdict to the next")
    add("--temperature", type=float, help="sample the answer; without this or --top-p it is greedy")
    add("--top-p", type=float, help="sample from the fewest tokens whose probabilities add up to this")
    args = parser.parse_args()
    if bool(args.input) != bool(args.output) or (args.input and args.prompt is not None):
        parser.error("--input needs --output, and neither goes with --prompt")
    if args.prompt is not None and not args.prompt.strip():
        parser.error("the prompt is empty")
    if args.response is not None and args.prompt is None:
        parser.error("--response needs a --prompt")
    if min(args.max_new_tokens, args.verdict_every) < 1:
        parser.error("--max-new-tokens and --verdict-every must be at least 1")
    temperature, top_p = (1 if x is None else x for x in (args.temperature, args.top_p))
    if not (0.01 <= temperature <= 100 and 0 < top_p <= 1):
        parser.error("--temperature must be from 0.01 to 100, and --top-p above 0 and at most 1")
    return args


def moderate_turn(guard, messages, past=None, max_new_tokens=128, **options):
    """Judge a prompt and answer it: yield (answer so far, Verdict), and stop after the first flagged one.

    messages: a conversation up to the prompt. past, options: as for GuardedChat.stream.
    Without room for an answer in the context, only (None, Verdict) on the prompt is yielded.
    """
    ids, _ = encode(guard.tokenizer, messages)
    if len(ids) + max_new_tokens > guard.max_tokens:
        yield None, guard.verdict(guard.score([ids])[0], 0)
        return
    for answer, verdict in guard.stream(ids, past, max_new_tokens=max_new_tokens, **options):
        yield whole_characters(guard.tokenizer, answer), verdict
        if verdict.flagged:
            return


def whole_characters(tokenizer, ids):
    """Decode ids, without a last character that lacks some of its tokens; a character has up to four."""
    ends = range(len(ids), max(len(ids) - 4, -1), -1)
    texts = [tokenizer.decode(ids[:end], skip_special_tokens=True) for end in ends]
    return next((text for text in texts if not text.endswith("\ufffd")), texts[0].rstrip("\ufffd"))


def judge_pair(guard, prompt, response):
    """Judge a prompt and the user's response to it -> the same pairs as moderate_turn's."""
    rows = [{"prompt": prompt}, {"prompt": prompt, "response": response}]
    return zip((None, response), guard.classify(rows), strict=True)


def record(prompt, turn, given=False):
    """The --json object of a turn, moderate_turn's pairs. given: the user gave the response."""
    (_, first), (response, last) = turn[0], turn[-1]
    stopped = None if given or not last.flagged else "response" if last.tokens else "prompt"
    response = None if stopped == "prompt" else response
    return {
        "prompt": prompt,
        "prompt_unsafe_probability": first.unsafe,
        "response": response,
        "response_unsafe_probability": None if response is None else last.unsafe,
        "flagged": last.flagged,
        "stopped": stopped,
        "verdicts": [[verdict.tokens, verdict.unsafe] for _, verdict in turn if verdict.tokens],
        "categories": last.categories,
    }


def outcome(found):
    """What the guard made of a turn, in one line. Kinds of harm are named only if something is flagged."""
    stopped, answered = found["stopped"], found["response"] is not None
    if not (answered or stopped):
        return "[no answer: the context has no room for one]"
    unsafe = f"{found['response_unsafe_probability' if answered else 'prompt_unsafe_probability']:.3f}"
    if not found["flagged"]:
        return f"[{unsafe}]"
    what = "refused" if stopped == "prompt" else "flagged"
    if stopped == "response":
        what = f"stopped after {found['verdicts'][-1][0]} tokens"
    top = sorted(found["categories"].items(), key=lambda item: -item[1])[:2]
    kinds = "; ".join(f"{one_line(name).replace('_', ' ').replace(',', ', ')} {p:.2f}" for name, p in top)
    return f"[{what}: harmful {unsafe}{kinds and f' ({kinds})'}]"


def chat_on_terminal(guard, **options):
    """A conversation. Ctrl-C stops an answer, Ctrl-D leaves, and a flagged turn is forgotten.

    A piece of an answer appears after its verdict.
    """
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  gives input() the arrow keys
    history, past = [], Past()
    while True:
        try:
            prompt = input("> ")
        except KeyboardInterrupt:
            prompt = print() or ""
        except EOFError:
            return print()
        if not prompt.strip():
            continue
        user, turn, shown = {"role": "user", "content": prompt}, [], ""
        try:
            for text, verdict in moderate_turn(guard, [*history, user], past, **options):
                turn.append((text, verdict))
                if text and not verdict.flagged:
                    print(printable(text[len(shown) :]), end="", flush=True)
                    shown = text
        except KeyboardInterrupt:
            print(" [interrupted]", end="")  # all that was shown has been judged
        except UserError as error:  # a text that cannot be judged is no reason to leave
            print(f"[{one_line(error)}]")
        print("\n" * bool(shown) + (outcome(record(prompt, turn)) if turn else ""), end="\n\n")
        if turn and turn[-1][0] is None and not turn[-1][1].flagged and history:
            print("[what was said so far is forgotten]\n")
            history.clear()
        elif shown and not turn[-1][1].flagged:
            history += [user, {"role": "assistant", "content": shown}]


def piped():
    """The lines on standard input, if that is a pipe, a file or a socket."""
    mode = os.fstat(sys.stdin.fileno()).st_mode if sys.stdin else 0
    if stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode):
        # UTF-16 without a mark looks like text with NUL characters. Half of a surrogate pair is refused.
        lines = (line.strip().replace("\0", "\udc00") for line in text_lines(sys.stdin.buffer))
        with explain("standard input is not text in the encoding of its byte-order mark", UnicodeError):
            yield from filter(None, lines)


def main():
    args = parse_arguments()
    several = start_accelerator().num_processes > 1
    chosen = (args.config, args.adapter, args.device_id, args.threshold, args.max_fpr, args.base_model)
    guard = load_guard(*chosen)
    given = args.response is not None
    if args.input or given or args.dtype:  # without --dtype, an answer is written in the stored one
        computing = use_fast_dtype(guard, args.dtype)
        if not several:
            print(computing, file=sys.stderr)
    if args.input:
        return score_file(guard, args.input, args.output, args.strict)
    refuse(several, "several processes can share the rows of --input only")
    options = {"max_new_tokens": args.max_new_tokens, "verdict_every": args.verdict_every}
    if args.temperature or args.top_p:
        options |= {"do_sample": True, "temperature": args.temperature or 1.0, "top_p": args.top_p or 1.0}
    if args.prompt is None and not args.json and sys.stdin and sys.stdin.isatty() and sys.stdout.isatty():
        return chat_on_terminal(guard, **options)
    lines, unanswered = piped() if args.prompt is None else iter(()), 0
    is_pipe = (first := next(lines, None)) is not None
    alone = EXAMPLES if args.prompt is None else [args.prompt]
    for prompt in itertools.chain([first], lines) if is_pipe else alone:
        try:
            turn = moderate_turn(guard, conversation({"prompt": prompt}), **options)
            found = record(prompt, list(judge_pair(guard, prompt, args.response) if given else turn), given)
        except UserError as error:  # a line that cannot be judged is no reason to leave out the next ones
            if not is_pipe:
                raise
            print(f"[{one_line(error)}]", file=sys.stderr if args.json else sys.stdout, flush=True)
            unanswered += 1
            continue
        unanswered += found["response"] is None and not found["stopped"]
        shown = "" if found["stopped"] else printable(found["response"] or "")
        if args.json:
            print(to_json(found), flush=True)
        elif is_pipe:  # one answer a line
            print(" ".join(shown.split()) or outcome(found), flush=True)
        else:
            print(f"> {printable(prompt)}\n{shown}\n{outcome(found)}\n")
    refuse(unanswered, f"{unanswered} prompts leave no room for an answer, or cannot be judged")


if __name__ == "__main__":
    run(main)
