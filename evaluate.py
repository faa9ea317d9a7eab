"""Measure a guard on labelled rows."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from accelerate.utils import tqdm

from checkpoint import guard_of, start_accelerator, use_fast_dtype
from data import encode_row, labels, prompt_key, read_rows
from errors import (
    check_output,
    guard_arguments,
    json_line,
    number,
    one_line,
    refuse,
    run,
    to_json,
    write_whole,
)
from lora import merge_lora
from metrics import average_precision, evaluation


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    add = guard_arguments(parser)
    add("--dataset", nargs="+", required=True, help="hub id, or files in our columns")
    add("--running", type=number(int, 0), metavar="N", help="also judge each answer after every N tokens")
    add("--json", action="store_true", help="print one JSON object")
    add("--scores", type=Path, metavar="FILE.jsonl", help="keep the rows with their verdicts")
    args = parser.parse_args()
    refuse(start_accelerator().num_processes > 1, "an evaluation runs in one process")
    if args.scores:
        check_output(args.scores, ".jsonl", inputs=args.dataset)
    rows, sources = evaluation_rows(args.dataset)
    taken = {name for row in rows for name in row} & {"unsafe_probability", "flagged", "categories"}
    refuse(
        args.scores and taken, f"--scores would replace the rows' own {', '.join(sorted(taken))}; rename it"
    )
    guard = guard_of(args)
    print(use_fast_dtype(guard, args.dtype), file=sys.stderr)
    if guard.is_full:  # nothing chats here
        merge_lora(guard.chat_model)
    texts = [encode_row(guard.tokenizer, row) for row in tqdm(rows, desc="tokenising", leave=False)]
    verdicts = guard.verdicts(texts, "judging")
    result = measure(guard.config, rows, sources, verdicts)
    if args.running:
        guard.config.verdict_every = args.running
        result["running"] = running(guard, rows, texts)
    result = to_json(result)
    print(result if args.json else table(json.loads(result)), flush=True)
    if args.scores:
        lines = [json_line(row | verdict.fields()) for row, verdict in zip(rows, verdicts, strict=True)]
        write_whole(args.scores, b"".join(lines))


def evaluation_rows(names):
    """(checked rows, the name of each one's file) of all files, or of a hub id's test split if it has one."""
    parts = list(read_rows(names))
    if not Path(names[0]).exists():  # a hub id
        parts = [part for part in parts if part[1] == "test"] or parts
    rows = [row for _, _, rows in parts for row in rows]
    refuse(not rows, f"{' '.join(names)}: there are no rows to evaluate on")
    return rows, np.array([name for name, _, rows in parts for _ in rows])


def measure(config, rows, sources, verdicts):
    """The figures of N rows. sources: the name of each one's file (N,)."""
    targets = labels(rows, config.categories).numpy()  # (N, 1 + K), NaN where unknown
    scores = np.nan_to_num([[v.unsafe, *v.categories.values()] for v in verdicts], nan=1.0)  # (N, 1 + K)
    columns = (targets[:, 0] == 1, scores[:, 0], np.array([v.flagged for v in verdicts]))  # each (N,)
    result = {"threshold": config.threshold, "prompt_threshold": config.prompt_threshold}
    result |= counts(*columns) | {"sources": {}, "categories": {}}
    for name in dict.fromkeys(sources) if len(set(sources)) > 1 else ():
        result["sources"][name] = counts(*(column[sources == name] for column in columns))
    _, prompts = np.unique([prompt_key(row) for row in rows], return_inverse=True)
    result["intervals"] = bootstrap(columns, prompts)
    labelled = {name for row in rows for name in row["category"]}
    result["unknown_categories"] = sorted(labelled - set(config.categories))
    for k, name in enumerate(config.categories, 1):
        known = ~np.isnan(targets[:, k])
        if known.any():
            harmful = targets[known, k] == 1
            ap = average_precision(harmful, scores[known, k])
            result["categories"][name] = {"positives": int(harmful.sum()), "ap": ap}
    return result


def counts(unsafe, scores, flagged):
    """evaluation() with the number of rows and of unsafe ones. Each column: (N,)."""
    found = {"rows": len(unsafe), "positives": int(unsafe.sum())}
    return found | evaluation(unsafe, scores, flagged)


def bootstrap(columns, prompts, draws=1000):
    """{name: [low, high]}: 95 % intervals of evaluation() over draws of prompts, whose answers stay together.

    columns: what evaluation() takes, each (N,). prompts: (N,), numbers from 0. Many rows get fewer draws.
    """
    draws = min(draws, max(100, 10**7 // len(prompts)))
    generator = np.random.default_rng(0)
    groups = np.split(np.argsort(prompts, kind="stable"), np.bincount(prompts).cumsum()[:-1])
    found = []
    for _ in tqdm(range(draws), desc="intervals", leave=False):
        rows = np.concatenate([groups[n] for n in generator.integers(len(groups), size=len(groups))])
        found.append(evaluation(*(column[rows] for column in columns)))
    known = [name for name, value in evaluation(*columns).items() if not np.isnan(value)]
    return {name: np.nanpercentile([each[name] for each in found], (2.5, 97.5)).tolist() for name in known}


def running(guard, rows, texts):
    """What verdicts on the way add to those at the ends of answers."""
    answers = [(text, row["is_safe"]) for text, row in zip(texts, rows, strict=True) if text.is_answer]
    judged = guard.judge([text for text, _ in answers], progress="judging on the way")
    first_flags, by_half = [], []  # of flagged answers: the token of the first flag; is it by half?
    passed = []  # of the other safe answers: cut on the way?
    for (text, is_safe), (cuts, logits) in zip(answers, judged, strict=True):
        verdicts = [guard.verdict(text, *one) for one in zip(cuts.split(1), logits.split(1), strict=True)]
        flags = [verdict.highest for verdict in verdicts if verdict.flagged]
        if verdicts[-1].flagged:
            first_flags.append(flags[0])
            by_half.append(flags[0] <= verdicts[-1].tokens / 2)
        elif is_safe:
            passed.append(bool(flags))
    return {
        "flagged": len(first_flags),
        "flagged_by_half": np.mean(by_half).item() if by_half else None,
        "median_token_of_first_flag": np.median(first_flags).item() if by_half else None,
        "safe_and_not_flagged": len(passed),
        "of_these_cut_on_the_way": np.mean(passed).item() if passed else None,
    }


def table(result):
    """The figures with their intervals, a line each."""
    figures = {name: value for name, value in result.items() if not isinstance(value, dict | list)}
    figures |= result.get("running", {})
    for name, found in result["categories"].items():
        figures[f"AP of {name} ({found['positives']} positives)"] = found["ap"]
    notes = {name: "{:.3f} to {:.3f}".format(*pair) for name, pair in result["intervals"].items()}
    base_rate = result["positives"] / result["rows"]
    notes["auprc"] = f"{notes.get('auprc', '')}  (a random scorer: {base_rate:.3f})"
    lines = [f"{name:50} {cell(value):>6}  {notes.get(name, '')}" for name, value in figures.items()]
    shown = ("rows", "positives", "auprc", "auroc", "f1", "fpr", "recall")
    shown += tuple(name for name in result if name.startswith("tpr_at_"))
    for name, found in result["sources"].items():
        lines += [f"{name}:", "  ".join(f"{column} {cell(found[column])}" for column in shown)]
    if unknown := result["unknown_categories"]:
        lines.append(f"categories that the guard does not know: {', '.join(unknown)}")
    return "\n".join(one_line(line) for line in lines)


def cell(value):
    if isinstance(value, float):
        return f"{value:.3f}"
    return "-" if value is None else str(value)


if __name__ == "__main__":
    run(main)
