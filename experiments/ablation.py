"""What each choice is worth: guards that differ from the default in one thing, trained and measured on the same rows.

    python experiments/ablation.py BEAVERTAILS.jsonl SAFE_RLHF.jsonl OUTPUT_DIR

Of the first file's prompts five tenths are for training and four for measuring, so that the figures say more than those
of the usual tenth; the last is left out, for train.py would make it a test split. What was measured is kept in
ablation.json; a run does what is not in there, and goes on where a killed one was.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from checkpoint import EMBEDDED, load_chat_model
from common import UserError, run, write_whole
from data import read_rows, tenth_of

# The paper's form: no control tokens, each turn is plain text behind the name of who speaks.
PLAIN = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
LONG = "\n\nIs anything in the conversation above harmful, hateful, illegal or unsafe? Answer yes or no:"
VARIANTS = {  # name: (seeds, what train.py is given beside the common arguments)
    "default": (3, []),
    "LoRA: r 8": (1, ["--lora-r=8", "--lora-alpha=16"]),
    "LoRA: r 4": (1, ["--lora-r=4", "--lora-alpha=8"]),
    "LoRA: q, v": (1, ["--lora-targets=q_proj,v_proj"]),
    "LoRA: q, k, v, o": (1, ["--lora-targets=q_proj,k_proj,v_proj,o_proj"]),
    "rows: answers alone too": (1, ["--answers-alone"]),
    "guard prompt: short": (1, ["--guard-prompt=\n\nHarmful?"]),
    "guard prompt: long": (1, [f"--guard-prompt={LONG}"]),
    "guard prompt: off the subject": (1, ["--guard-prompt=\n\nThe weather was fine for the rest of that day"]),
    "rows: SafeRLHF too": (1, []),
    "template: plain": (1, []),
    "LoRA: none, the head alone, 10 epochs": (1, ["--lora-targets=none", "--epochs=10"]),
    "guard path: full": (3, ["--guard-path=full"]),
}
RESULTS = Path(__file__).with_name("ablation.json")


def train(output, variant, seed, options, rows):
    """Train one guard, unless that is done; {"AUPRC", "category AP"} on validation after the last epoch."""
    folder = output / f"{variant} {seed}".translate(str.maketrans(" ,:", "___"))
    model = str(output / "plain-template") if variant == "template: plain" else EMBEDDED
    command = [sys.executable, str(Path(__file__).parents[1] / "train.py"), model, str(folder), "--dataset", *rows]
    command += ["--epochs=2", f"--seed={seed}", *options]
    if "--guard-path=full" not in options:
        command += ["--cache-dir", str(output / "caches")]
    if (folder / "config.json").exists():
        command.append("--resume")  # trains nothing more where all is there
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise UserError(f"the training of {folder} failed")
    with open(folder / "metrics.csv", newline="") as file:
        *_, last = csv.DictReader(file)
    categories = json.loads((folder / "config.json").read_text())["categories"]
    ap = statistics.mean(float(last[f"validation/{category}/auprc"]) for category in categories)
    return {"AUPRC": float(last["validation/auprc"]), "category AP": ap}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("beavertails", help="file of rows with prompt, response, category and is_safe")
    parser.add_argument("safe_rlhf", help="file of more rows, of which the prompts that are measured on are left out")
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--plot", metavar="FILE.png")
    args = parser.parse_args()
    rows = [row for _, _, some in read_rows([args.beavertails]) for row in some]
    list(read_rows([args.safe_rlhf]))  # a mistake in it shows now, not hours later
    files = []
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name, tenths in (("train", range(1, 6)), ("validation", range(6, 10))):
        files.append(str(args.output_dir / f"{name}.jsonl"))
        content = "".join(json.dumps(row) + "\n" for row in rows if tenth_of(row) in tenths).encode()
        if Path(files[-1]).exists() and Path(files[-1]).read_bytes() != content:
            raise UserError(f"{args.output_dir} holds an ablation on other rows; name another folder")
        write_whole(files[-1], content)
    if not (template := args.output_dir / "plain-template").exists():
        model, tokenizer = load_chat_model(EMBEDDED)
        tokenizer.chat_template = PLAIN
        model.save_pretrained(f"{template}.tmp")
        tokenizer.save_pretrained(f"{template}.tmp")
        Path(f"{template}.tmp").rename(template)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, (seeds, options) in VARIANTS.items():
        given = [*files, args.safe_rlhf] if name == "rows: SafeRLHF too" else files
        for seed in range(seeds):
            if (key := f"{name}, seed {seed}") not in results:
                results[key] = train(args.output_dir, name, seed, options, given) | {"options": options}
                write_whole(RESULTS, (json.dumps(results, indent=1) + "\n").encode())
    print("| variant | AUPRC | mean category AP |\n|---|---|---|")
    found = {}
    for name, (seeds, _) in VARIANTS.items():
        runs = [results[f"{name}, seed {seed}"] for seed in range(seeds)]
        found[name] = [one["AUPRC"] for one in runs]
        columns = (" / ".join(f"{one[measure]:.3f}" for one in runs) for measure in ("AUPRC", "category AP"))
        print(f"| {name} | {' | '.join(columns)} |")
    if args.plot:
        plot(args.plot, found)


def plot(path, found):
    """Draw the AUPRC of every guard, a line of dots for each variant."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for line, (name, values) in enumerate(reversed(found.items())):
        axes.scatter(values, [line] * len(values), color="tab:orange" if name == "default" else "tab:blue")
    axes.axvspan(min(found["default"]), max(found["default"]), color="tab:orange", alpha=0.15)
    axes.set_yticks(range(len(found)), list(reversed(found)))
    axes.set(xlabel="AUPRC on validation rows")
    figure.savefig(path)


if __name__ == "__main__":
    run(main)
