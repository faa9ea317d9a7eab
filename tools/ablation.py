"""What each choice is worth: guards that differ from the default in one thing, measured on the same rows.

    python tools/ablation.py BEAVERTAILS.jsonl SAFE_RLHF.jsonl OUTPUT_DIR

Five tenths of BeaverTails' prompts are for training and four for measuring. That is more than
train.py's usual tenth, so the figures vary less. The last tenth is the test split of the one variant that
needs one.
All guards but those of another guard prompt have the ten tokens of QUESTION, then the default of train.py.
ablation.json keeps what was measured. A run trains only what is not in there, and a killed run goes on.
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
from data import read_rows, tenth_of
from errors import UserError, run, write_whole
from tools.guard_data import answers_alone, jsonl
from tools.plots import plot_ablation

# The paper's form has no control tokens: each turn is plain text behind the name of its speaker.
PLAIN = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
QUESTION = "\n\nIs the conversation above harmful? Answer:"
LONG = "\n\nIs anything in the conversation above harmful, hateful, illegal or unsafe? Answer yes or no:"
WEATHER = "\n\nThe weather was fine for the rest of that day"
VARIANTS = {  # {name: (seeds, the options of train.py that differ from the default's)}
    "default": (3, []),
    "LoRA: r 8": (1, ["--lora-r=8", "--lora-alpha=16"]),
    "LoRA: r 4": (1, ["--lora-r=4", "--lora-alpha=8"]),
    "LoRA: q, v": (1, ["--lora-targets=q_proj,v_proj"]),
    "LoRA: q, k, v, o": (1, ["--lora-targets=q_proj,k_proj,v_proj,o_proj"]),
    "rows: answers alone too": (1, []),
    "guard prompt: short": (1, ["--guard-prompt=\n\nHarmful?"]),
    "guard prompt: long": (1, [f"--guard-prompt={LONG}"]),
    "guard prompt: off the subject": (1, [f"--guard-prompt={WEATHER}"]),
    "rows: SafeRLHF too": (1, []),
    "template: plain": (1, []),
    "LoRA: none, the head alone, 10 epochs": (1, ["--lora-targets=none", "--epochs=10"]),
    "guard path: full": (3, ["--guard-path=full"]),
}
MORE_ROWS = {
    # Without a test split, train.py would cut one out of the answers, so fewer would be learnt.
    "rows: answers alone too": ("alone", "test"),
    "rows: SafeRLHF too": ("safe_rlhf",),
}
TENTHS = {"train": range(1, 6), "validation": range(6, 10), "test": range(1)}  # of BeaverTails' prompts
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "tools/ablation.json"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("beavertails", help="file of rows with prompt, response, category and is_safe")
    parser.add_argument(
        "safe_rlhf", help="file of more training rows; those of validation prompts are left out"
    )
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--plot", metavar="FILE.png", help="draw the AUPRC of every guard")
    args = parser.parse_args()
    list(read_rows([args.safe_rlhf]))  # a mistake in it shows now and not hours later
    files = write_files(args.beavertails, args.output_dir) | {"safe_rlhf": args.safe_rlhf}
    save_plain_template(args.output_dir / "plain-template")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, (seeds, options) in VARIANTS.items():
        rows = [files[part] for part in ("train", "validation", *MORE_ROWS.get(name, ()))]
        for seed in range(seeds):
            if (key := f"{name}, seed {seed}") not in results:
                results[key] = train(args.output_dir, name, seed, options, rows) | {"options": options}
                write_whole(RESULTS, (json.dumps(results, indent=1) + "\n").encode())
    found = {v: [results[f"{v}, seed {s}"] for s in range(seeds)] for v, (seeds, _) in VARIANTS.items()}
    print(table(found))
    if args.plot:
        plot_ablation(args.plot, {v: [result["AUPRC"] for result in runs] for v, runs in found.items()})


def write_files(beavertails, folder):
    """Write the data files of the variants; {name: path}. Raises UserError if `folder` holds other rows."""
    rows = [row for _, _, part in read_rows([beavertails]) for row in part]
    contents = {name: [row for row in rows if tenth_of(row) in tenths] for name, tenths in TENTHS.items()}
    contents["alone"] = answers_alone(contents["train"])
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.jsonl" for name in contents}
    for name, path in paths.items():
        content = jsonl(contents[name])
        if path.exists() and path.read_bytes() != content:
            raise UserError(f"{folder} holds an ablation on other rows; name another folder")
        write_whole(path, content)
    return {name: str(path) for name, path in paths.items()}


def save_plain_template(folder):
    """The embedded chat model as a local folder, with the plain template. The folder appears whole."""
    if folder.exists():
        return
    model, tokenizer = load_chat_model(EMBEDDED)
    tokenizer.chat_template = PLAIN
    for part in (model, tokenizer):
        part.save_pretrained(f"{folder}.tmp")
    Path(f"{folder}.tmp").rename(folder)


def train(output, variant, seed, options, rows):
    """Train one guard, or go on with it; {"AUPRC", "category AP"} on validation after the last epoch."""
    folder = output / f"{variant} {seed}".translate(str.maketrans(" ,:", "___"))
    model = str(output / "plain-template") if variant == "template: plain" else EMBEDDED
    script = [str(ROOT / "tools/train_cached.py"), str(output / "caches")]
    if "--guard-path=full" in options:  # it has no caches to keep
        script = [str(ROOT / "train.py")]
    command = [sys.executable, *script, model, str(folder), "--dataset", *rows]
    command += ["--epochs=2", f"--seed={seed}", f"--guard-prompt={QUESTION}", *options]
    if (folder / "config.json").exists():
        command.append("--resume")  # a run that has ended trains no further
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise UserError(f"the training of {folder} failed")
    with open(folder / "metrics.csv", newline="") as file:
        *_, last = csv.DictReader(file)
    categories = json.loads((folder / "config.json").read_text())["guard"]["categories"]
    precisions = [float(last[f"validation/{category}/auprc"]) for category in categories]
    return {"AUPRC": float(last["validation/auprc"]), "category AP": statistics.mean(precisions)}


def table(found):
    """The results in Markdown. found: {variant: [result of each seed]}."""
    lines = ["| variant | AUPRC | mean category AP |", "|---|---|---|"]
    for name, runs in found.items():
        columns = [
            " / ".join(f"{result[figure]:.3f}" for result in runs) for figure in ("AUPRC", "category AP")
        ]
        lines.append(f"| {name} | {' | '.join(columns)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
