"""Use a trained guard: chat under guard, or score texts that are already there.

Every verdict is a probability that the conversation so far is harmful, and one for each kind of harm; what reaches the
threshold is flagged. A flagged prompt is not answered, and a flagged answer is not shown.
"""

import argparse
import itertools
import json
import math
import os
from pathlib import Path

import torch
from tqdm.auto import tqdm

from data import check_text, encode, read_jsonl
from lora import UserError, run
from model import load_guard

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
    add("--prompt", help="chat one turn: judge this prompt, answer it, judge the answer")
    add("--response", help="with --prompt: judge this answer instead of generating one")
    add("--input", type=Path, help="JSONL file of rows with prompt and, if they have one, response; needs --output")
    add("--output", type=Path, help="JSONL file for the same rows with their verdicts")
    add("--json", action="store_true", help="one JSON object a line")
    add("--threshold", type=float, help="flag from this probability; above 1: judge, never stop; default: the config's")
    add("--max-new-tokens", type=int, default=128, help="longest answer to generate")
    args = parser.parse_args()
    mistakes = {
        "--input and --output go together": (args.input is None) != (args.output is None),
        "give either --prompt or --input": args.input and args.prompt is not None,
        "--response needs the --prompt that it answers": args.response is not None and args.prompt is None,
        "--max-new-tokens must be at least 1": args.max_new_tokens < 1,
    }
    for mistake, made in mistakes.items():
        if made:
            raise UserError(mistake)
    args.config = args.config or find_config()
    args.adapter = args.adapter or args.config.with_name("adapter.safetensors")
    return args


def find_config():
    shipped = Path(__file__).parent / "guard/config.json"
    runs = sorted(Path("runs").glob("*/adapter.safetensors"), key=lambda path: path.stat().st_mtime)
    if not (shipped.exists() or runs):
        raise UserError("there is no trained guard yet: run `python train.py`, or name a config.json and its adapter")
    return shipped if shipped.exists() else runs[-1].with_name("config.json")


def find_device(number):
    count = torch.cuda.device_count()
    if number is None:
        number = 0 if count else -1
    if not -1 <= number < count:
        raise UserError(f"there is no device {number}: this machine has {count} GPUs; -1 is the CPU")
    return f"cuda:{number}" if number >= 0 else "cpu"


def probabilities(guard, conversations):
    """[(unsafe probability, {category: probability})] for conversations, lists of token ids."""
    rows = guard.score(conversations).double().sigmoid().tolist()
    return [(unsafe, dict(zip(guard.categories, others, strict=True))) for unsafe, *others in rows]


def moderate_turn(guard, prompt, response, threshold, max_new_tokens):
    """Judge a prompt, answer it unless it is flagged, and judge the answer; a `response` that is given is only judged.

    Returns the record that --json prints; its `stopped` says whether the prompt or the answer ended the turn.
    """
    prompt_ids = encode(guard.tokenizer, prompt)
    [(unsafe, categories)] = probabilities(guard, [prompt_ids])
    record = {"prompt": prompt, "prompt_unsafe_probability": unsafe, "response": response}
    record |= {"response_unsafe_probability": None, "flagged": unsafe >= threshold, "stopped": None, "verdicts": []}
    if response is None:
        if record["flagged"]:
            return record | {"stopped": "prompt", "categories": categories}
        response = answer(guard, prompt_ids, max_new_tokens)
    ids = encode(guard.tokenizer, prompt, response)
    [(unsafe, categories)] = probabilities(guard, [ids])
    if unsafe >= threshold and record["response"] is None:
        record["stopped"] = "response"
    record |= {"response": response, "response_unsafe_probability": unsafe, "flagged": unsafe >= threshold}
    return record | {"verdicts": [[len(ids) - len(prompt_ids), unsafe]], "categories": categories}


def answer(guard, prompt_ids, max_new_tokens):
    """What the chat model answers, greedily: the plain chat path, for the gate is shut."""
    if len(prompt_ids) + max_new_tokens > guard.max_tokens:
        raise UserError(f"a prompt of {len(prompt_ids)} tokens leaves no room for {max_new_tokens} more in the context")
    ids = torch.tensor([prompt_ids], device=guard.chat_model.device)  # (1, T)
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "pad_token_id": guard.tokenizer.pad_token_id}
    output = guard.chat_model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    return guard.tokenizer.decode(output[0, len(prompt_ids) :], skip_special_tokens=True)


def score_file(guard, source, target, threshold, chunk_rows=512):
    """Write each row of a JSONL file with its verdict added, in the same order; `target` appears when all are done."""
    aside = target.with_name(f"{target.name}.tmp")
    if any(path.exists() and path.samefile(source) for path in (target, aside)):
        raise UserError(f"writing {target} would destroy the input {source}; name another --output")
    with open(aside, "w", encoding="utf-8") as out, tqdm(unit=" rows") as bar:
        lines = read_jsonl(source)
        while chunk := list(itertools.islice(lines, chunk_rows)):
            texts = [check_text(row, f"{source}, line {number}") for number, row in chunk]
            judged = probabilities(guard, [encode(guard.tokenizer, *pair) for pair in texts])
            for (_, row), (unsafe, categories) in zip(chunk, judged, strict=True):
                row |= {"unsafe_probability": unsafe, "flagged": unsafe >= threshold, "categories": categories}
                out.write(json.dumps(row) + "\n")
            bar.update(len(chunk))
    os.replace(aside, target)


def show(record):
    """Print a turn for human eyes; what the guard stopped is not shown."""
    top = sorted(record["categories"].items(), key=lambda item: -item[1])[:3]
    print(f"prompt   {record['prompt_unsafe_probability']:.3f}  {record['prompt']}")
    if record["stopped"] == "prompt":
        print("answer          refused, for the prompt is flagged")
    else:
        text = "withheld, for it is flagged" if record["stopped"] else record["response"]
        print(f"answer   {record['response_unsafe_probability']:.3f}  {text}")
    print(f"categories      {', '.join(f'{name} {probability:.3f}' for name, probability in top)}\n")


def main():
    args = parse_arguments()
    guard, threshold = load_guard(args.config, args.adapter, find_device(args.device_id))
    threshold = threshold if args.threshold is None else args.threshold
    if math.isnan(threshold):
        raise UserError("the threshold is not a number, so nothing would ever be flagged")
    if args.input:
        return score_file(guard, args.input, args.output, threshold)
    for prompt in EXAMPLES if args.prompt is None else [args.prompt]:
        record = moderate_turn(guard, prompt, args.response, threshold, args.max_new_tokens)
        print(json.dumps(record), flush=True) if args.json else show(record)


if __name__ == "__main__":
    run(main)
