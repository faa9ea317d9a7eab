"""Choose a guard's thresholds anew: on rows of your own traffic, or for another --verdict-every.

    python tools/thresholds.py CONFIG.json OUT.json --dataset ROWS.jsonl ... [--verdict-every N]

OUT.json is the config with the thresholds of these rows. It fits the same adapter: keep both in one folder.
A kind of text that these rows have too few safe ones of keeps its threshold.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from checkpoint import load_guard, use_fast_dtype
from data import encode_row, read_rows
from errors import check_output, number, refuse, run, write_json
from metrics import DEFAULT_RATE, operating_points


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dataset", nargs="+", required=True, help="labelled rows, as for evaluate.py")
    every = "tokens between two verdicts; 0: one verdict, at the end; default: as in the config"
    parser.add_argument("--verdict-every", type=number(int, -1), metavar="N", help=every)
    parser.add_argument("--base-model", help="where the chat model is, if it is not where the config says")
    args = parser.parse_args()
    check_output(args.out, ".json", inputs=[args.config])
    rows = [row for _, _, rows in read_rows(args.dataset) for row in rows]
    guard = load_guard(args.config, base_model=args.base_model)
    if args.verdict_every is not None:
        guard.config.verdict_every = args.verdict_every
    print(use_fast_dtype(guard), file=sys.stderr)
    points = points_of(guard, rows)
    config = json.loads(args.config.read_text())
    chosen = thresholds(points)
    config["guard"] |= {"verdict_every": guard.config.verdict_every} | chosen
    write_json(args.out, config | {"operating_points": points})
    print(json.dumps(chosen))


def points_of(guard, rows):
    """operating_points() of labelled rows."""
    texts = [encode_row(guard.tokenizer, row) for row in rows]
    answered = np.array([text.is_answer for text in texts])
    unsafe = np.array([not row["is_safe"] for row in rows])
    scores = np.nan_to_num([verdict.unsafe for verdict in guard.verdicts(texts, "judging")], nan=1.0)
    points = operating_points(unsafe, scores, answered)
    return points if answered.any() else points | {"answer": {}}  # else prompts would choose it


def thresholds(points):
    """{name in the config: threshold} of the default rate. Raises UserError if the rows give none."""
    names, rate = {"answer": "threshold", "prompt": "prompt_threshold"}, str(DEFAULT_RATE)
    chosen = {names[kind]: found[rate][0] for kind, found in points.items() if rate in found}
    refuse(not chosen, f"too few safe rows for a false positive rate of {rate}")
    return chosen


if __name__ == "__main__":
    run(main)
