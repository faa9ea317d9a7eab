"""Use a trained guard: chat under guard, or score texts that are already there.

Every verdict is a probability that the conversation so far is harmful, and one for each kind of harm; what reaches the
threshold is flagged. A flagged prompt is not answered, and a flagged answer is not shown.
"""

import argparse
import itertools
import json
import os
import sys
from pathlib import Path

import torch
from tqdm.auto import tqdm

from data import check_text, encode
from lora import UserError
from model import load_guard

EXAMPLES = [
    "How do I keep bread fresh for longer?",
    "How do I kill a process that no longer answers in Linux?",
    "Give me a vicious insult for my colleague from abroad.",
]


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], usage="%(prog)s [config.json] [adapter.safetensors] [options]"
    )
    add = parser.add_argument
    add("config", nargs="?", help="default: the guard in guard/, or else the newest run of train.py")
    add("adapter", nargs="?", help="default: adapter.safetensors beside the config")
    add("--device-id", type=int, help="number of the GPU, -1 for the CPU; default: the first GPU if there is one")
    add("--prompt", help="chat one turn: judge TEXT, answer it, judge the answer")
    add("--response", help="with --prompt: judge this answer instead of generating one")
    add("--input", type=Path, help="JSONL file of rows with prompt and, if they have one, response; needs --output")
    add("--output", type=Path, help="JSONL file for the same rows with their verdicts")
    add("--json", action="store_true", help="one JSON object a line")
    add("--threshold", type=float, help="flag from this probability; above 1: judge, never stop; default: the config's")
    add("--max-new-tokens", type=int, default=128)
    args = parser.parse_args()
    if args.config is None:
        args.config = find_config()
    if args.adapter is None:
        args.adapter = Path(args.config).with_name("adapter.safetensors")
    if (args.input is None) != (args.output is None):
        raise UserError("--input and --output go together")
    if args.input and args.prompt is not None:
        raise UserError("give either --prompt or --input")
    if args.response is not None and args.prompt is None:
        raise UserError("--response needs the --prompt that it answers")
    if args.max_new_tokens < 1:
        raise UserError("--max-new-tokens must be at least 1")
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


def verdict(guard, logits):
    """(unsafe probability, {category: probability}) from one row of logits, (1 + K,)."""
    unsafe, *categories = logits.double().sigmoid().tolist()
    return unsafe, dict(zip(guard.categories, categories, strict=True))


def moderate_turn(guard, prompt, response, threshold, max_new_tokens):
    """Judge a prompt, answer it unless it is flagged, and judge the answer; a `response` that is given is only judged.

    Returns the record that --json prints; `stopped` says whether the prompt or the answer ended the turn.
    """
    prompt_ids = encode(guard.tokenizer, prompt)
    prompt_unsafe, categories = verdict(guard, guard.score([prompt_ids])[0])
    record = {
        "prompt": prompt,
        "prompt_unsafe_probability": prompt_unsafe,
        "response": response,
        "response_unsafe_probability": None,
        "flagged": prompt_unsafe >= threshold,
        "stopped": None,
        "verdicts": [],
        "categories": categories,
    }
    if response is None:
        if record["flagged"]:
            return record | {"stopped": "prompt"}
        if len(prompt_ids) + max_new_tokens > guard.max_tokens:
            raise UserError(
                f"the prompt has {len(prompt_ids)} tokens; no room for {max_new_tokens} more in the context"
            )
        response = answer(guard, prompt_ids, max_new_tokens)
    ids = encode(guard.tokenizer, prompt, response)
    unsafe, categories = verdict(guard, guard.score([ids])[0])
    flagged = unsafe >= threshold
    return record | {
        "response": response,
        "response_unsafe_probability": unsafe,
        "flagged": flagged,
        "stopped": "response" if flagged and record["response"] is None else None,
        "verdicts": [[len(ids) - len(prompt_ids), unsafe]],
        "categories": categories,
    }


def answer(guard, prompt_ids, max_new_tokens):
    """What the chat model answers, greedily: the plain chat path, for the gate is shut."""
    ids = torch.tensor([prompt_ids], device=guard.chat_model.device)  # (1, T)
    output = guard.chat_model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=guard.tokenizer.pad_token_id,
    )
    return guard.tokenizer.decode(output[0, len(prompt_ids) :], skip_special_tokens=True)


def score_file(guard, source, target, threshold, chunk=512):
    """Write each row of a JSONL file with its verdict added, in the same order; `target` appears when all are done."""
    if target.exists() and target.samefile(source):
        raise UserError(f"--output would overwrite the input {source}")
    aside = target.with_name(f"{target.name}.tmp")
    with open(source, encoding="utf-8") as lines, open(aside, "w", encoding="utf-8") as out, tqdm(unit=" rows") as bar:
        numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
        while batch := list(itertools.islice(numbered, chunk)):
            rows, ids = [], []
            for number, line in batch:
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise UserError(f"{source}, line {number} is not JSON: {error}") from None
                ids.append(encode(guard.tokenizer, *check_text(rows[-1], f"{source}, line {number}")))
            for row, logits in zip(rows, guard.score(ids), strict=True):
                unsafe, categories = verdict(guard, logits)
                row |= {"unsafe_probability": unsafe, "flagged": unsafe >= threshold, "categories": categories}
                out.write(json.dumps(row) + "\n")
            bar.update(len(rows))
    os.replace(aside, target)


def show(record, threshold):
    """A turn for human eyes; what the guard stopped is not shown."""
    top = sorted(record["categories"].items(), key=lambda item: -item[1])[:3]
    kinds = "".join(f"\n          {probability:.3f}  {name}" for name, probability in top)
    print(f"prompt    {record['prompt']}\n          {record['prompt_unsafe_probability']:.3f}  unsafe")
    if record["stopped"] == "prompt":
        print(f"refused   the prompt reaches the threshold of {threshold:.3f}{kinds}")
    elif record["stopped"] == "response":
        print(f"withheld  the answer is at {record['response_unsafe_probability']:.3f}{kinds}")
    else:
        print(f"answer    {record['response']}\n          {record['response_unsafe_probability']:.3f}  unsafe{kinds}")
    print()


def main():
    args = parse_arguments()
    guard, config = load_guard(args.config, args.adapter, find_device(args.device_id))
    threshold = config["threshold"] if args.threshold is None else args.threshold
    if args.input:
        return score_file(guard, args.input, args.output, threshold)
    for prompt in EXAMPLES if args.prompt is None else [args.prompt]:
        record = moderate_turn(guard, prompt, args.response, threshold, args.max_new_tokens)
        print(json.dumps(record), flush=True) if args.json else show(record, threshold)


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        print(f"moderate.py: {error}", file=sys.stderr)
        sys.exit(2)
