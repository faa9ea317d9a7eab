"""Choose a guard's thresholds anew: on rows of your own traffic, or for other places of verdicts.

    python tools/thresholds.py CONFIG.json OUT.json --dataset ROWS.jsonl ... [--verdict-every N]

OUT.json is the config with the thresholds of these rows. It fits the same adapter; put it beside that.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from checkpoint import load_guard, use_fast_dtype
from data import encode_row, read_rows
from errors import check_output, number, refuse, run
from metrics import DEFAULT_RATE, operating_points
from training_run import write_json


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dataset", nargs="+", required=True, help="labelled rows, as for evaluate.py")
    every = "tokens between two verdicts; 0: one verdict, at the end; default: as in the config"
    parser.add_argument("--verdict-every", type=number(int, -1), metavar="N", help=every)
    parser.add_argument("--base-model", help="where the chat model is, if it is not where the config says")
    args = parser.parse_args()
    check_output(args.out, ".json")
    rows = [row for _, _, rows in read_rows(args.dataset) for row in rows]
    guard = load_guard(args.config, base_model=args.base_model)
    if args.verdict_every is not None:
        guard.config.verdict_every = args.verdict_every
    print(use_fast_dtype(guard), file=sys.stderr)
    points = points_of(guard, rows)
    config = json.loads(args.config.read_text())
    config["guard"] |= {"verdict_every": guard.config.verdict_every} | thresholds(points)
    write_json(args.out, config | {"operating_points": points})
    print(json.dumps(thresholds(points)))


def points_of(guard, rows):
    """operating_points() of labelled rows."""
    texts = [encode_row(guard.tokenizer, row) for row in rows]
    unsafe = np.array([not row["is_safe"] for row in rows])
    scores = np.nan_to_num([verdict.unsafe for verdict in guard.verdicts(texts, "judging")], nan=1.0)
    return operating_points(unsafe, scores, np.array([text.is_answer for text in texts]))


def thresholds(points):
    """Those of the default rate. Raises UserError if the rows are too few for it."""
    rate = str(DEFAULT_RATE)
    refuse(not all(rate in points[kind] for kind in points), f"too few safe rows for a rate of {rate}")
    return {"threshold": points["answer"][rate][0], "prompt_threshold": points["prompt"][rate][0]}


if __name__ == "__main__":
    run(main)
