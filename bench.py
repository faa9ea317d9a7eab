"""The measurements behind the README's figures of speed.

What is compared runs in turns in one process, and the medians of several rounds are set side by side: the clock of a
shared machine is not to be trusted from one run to the next, but ratios from within one run are.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
import transformers

from data import encode
from lora import UserError, run
from model import EMBEDDED, NEVER, GuardedChat, lend, load_chat_model

PROMPT = "Write a long story about a lighthouse keeper who teaches the children of the village to read the stars."
LENGTHS = (128, 512, 2048, 8192)  # tokens of a conversation
STEPS = (16, 8, 32)  # tokens from verdict to verdict, the default first


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=EMBEDDED, help="chat model, as for train.py")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16 or float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the time of a verdict over the length")
    args = parser.parse_args()
    if args.rounds < 1:
        raise UserError("--rounds must be at least 1")
    return args


def medians(contestants, rounds):
    """{name: median seconds} of functions that take turns of half a second or one call, whichever is longer."""
    times = {name: [] for name in contestants}
    for contestant in contestants.values():  # warms up
        contestant()
    for _ in range(rounds):
        for name, contestant in contestants.items():
            turn = []
            while sum(turn) < 0.5:
                started = time.perf_counter()
                contestant()
                turn.append(time.perf_counter() - started)
            times[name] += turn
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def time_stream(guard, rounds, tokens=128):
    """Seconds for an answer of 128 tokens: by plain generate, and with a verdict after every so many of them."""
    prompt = encode(guard.tokenizer, PROMPT)
    ids = torch.tensor([prompt])

    def plain():
        options = {"attention_mask": torch.ones_like(ids), "pad_token_id": guard.tokenizer.pad_token_id}
        output = guard.chat_model.generate(ids, max_new_tokens=tokens, do_sample=False, **options)
        assert output.shape[1] == len(prompt) + tokens, "the answer ended early"

    def moderated(every):
        return lambda: guard.generate([prompt], NEVER, max_new_tokens=tokens, verdict_every=every)

    return medians({"plain": plain} | {every: moderated(every) for every in STEPS}, rounds)


@torch.no_grad()
def time_verdicts(activated, full, length, rounds):
    """Seconds for a verdict on a conversation of `length` tokens, and for one decode step of the chat behind it."""
    ids = (encode(activated.tokenizer, PROMPT) * length)[:length]
    token = torch.tensor([ids[:1]])
    cache = activated.chat_model.base_model(input_ids=torch.tensor([ids]), use_cache=True).past_key_values
    contestants = {
        "decode step": lambda: activated.chat_model(input_ids=token, past_key_values=lend(cache)),
        "activated": lambda: activated.judge(cache),
        "full": lambda: full([ids]),
    }
    return medians(contestants, rounds)


def draw(verdicts, path, caption):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, marker in (("full", "s"), ("activated", "o"), ("decode step", "x")):
        axes.plot(list(verdicts), [times[name] * 1000 for times in verdicts.values()], marker=marker, label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens of the conversation", ylabel="ms", title=caption)
    axes.set_xticks(list(verdicts), map(str, verdicts))
    axes.legend()
    figure.savefig(path, dpi=110)


def main():
    args = parse_arguments()
    if args.plot:
        import matplotlib.pyplot  # noqa: F401  before all is measured in vain
    torch.manual_seed(0)  # weights of a trained guard would take the same time
    settings = {"categories": [f"category {number}" for number in range(14)]}
    activated, full = (
        GuardedChat(*load_chat_model(args.model, args.dtype), guard_path=path, **settings)
        for path in ("activated", "full")
    )
    activated.cast_for_use()
    full.cast_for_use()
    stream = time_stream(activated, args.rounds)
    verdicts = {length: time_verdicts(activated, full, length, args.rounds) for length in LENGTHS}
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    result = {"processor": processor(), "threads": torch.get_num_threads(), "dtype": args.dtype, "versions": versions}
    result["plain_seconds"] = stream["plain"]
    result |= {f"stream_over_plain_every_{every}": stream[every] / stream["plain"] for every in STEPS}
    for length, times in verdicts.items():
        result[f"milliseconds_{length}"] = {name: 1000 * seconds for name, seconds in times.items()}
        result[f"verdict_speedup_{length}"] = times["full"] / times["activated"]
        result[f"verdict_over_decode_step_{length}"] = times["activated"] / times["decode step"]
    if args.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:32}", value if isinstance(value, (str, int, dict)) else f"{value:.3f}")
    if args.plot:
        draw(verdicts, args.plot, f"One verdict, {args.model} in {args.dtype}, {torch.get_num_threads()} CPU threads")


def processor():
    info = Path("/proc/cpuinfo")  # where there is none, platform knows more
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    run(main)
