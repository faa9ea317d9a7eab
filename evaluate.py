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
    names = {name for row in rows for name in row}
    taken = ", ".join(sorted(names & {"unsafe_probability", "flagged", "categories"}))
    refuse(args.scores and taken, f"--scores would replace the rows' own {taken}; rename it")
    guard = guard_of(args)
    print(use_fast_dtype(guard, args.dtype), file=sys.stderr)
    if guard.is_full:  # nothing chats here
        merge_lora(guard.chat_model)
    texts = []
    for row in tqdm(rows, desc="tokenising", leave=False):
        texts.append(encode_row(guard.tokenizer, row))
    verdicts = guard.verdicts(texts, "judging")
    result = measure(guard.config, rows, sources, verdicts)
    if args.running:
        guard.config.verdict_every = args.running
        result["running"] = running(guard, rows, texts)
    result = to_json(result)
    print(result if args.json else table(json.loads(result)), flush=True)
    if args.scores:
        pairs = zip(rows, verdicts, strict=True)
        lines = [json_line(row | verdict.fields()) for row, verdict in pairs]
        write_whole(args.scores, b"".join(lines))


def evaluation_rows(names):
    """(checked rows, the name of each one's file) of all files, or of a hub id's test split if it has one."""
    parts = list(read_rows(names))
    if not Path(names[0]).exists():  # a hub id
        parts = [part for part in parts if part[1] == "test"] or parts
    rows, sources = [], []
    for name, _, part_rows in parts:
        rows += part_rows
        sources += [name] * len(part_rows)
    refuse(not rows, f"{' '.join(names)}: there are no rows to evaluate on")
    return rows, np.array(sources)


def measure(config, rows, sources, verdicts):
    """The figures of N rows. sources: the name of each one's file (N,)."""
    targets = labels(rows, config.categories).numpy()  # (N, 1 + K), NaN where unknown
    scores = [[verdict.unsafe, *verdict.categories.values()] for verdict in verdicts]
    scores = np.nan_to_num(scores, nan=1.0)  # (N, 1 + K)
    flagged = np.array([verdict.flagged for verdict in verdicts])
    columns = (targets[:, 0] == 1, scores[:, 0], flagged)  # each (N,)
    result = {"threshold": config.threshold, "prompt_threshold": config.prompt_threshold}
    result |= counts(columns) | {"sources": {}, "categories": {}}
    if len(set(sources)) > 1:
        for name in dict.fromkeys(sources):
            result["sources"][name] = counts(picked(columns, sources == name))
    keys = [prompt_key(row) for row in rows]
    _, prompts = np.unique(keys, return_inverse=True)
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


def counts(columns):
    """The numbers of rows and of unsafe ones, and evaluation() of these columns (N,)."""
    unsafe, _, _ = columns
    return {"rows": len(unsafe), "positives": int(unsafe.sum())} | evaluation(*columns)


def picked(columns, rows):
    """Some rows of each column."""
    return [column[rows] for column in columns]


def bootstrap(columns, prompts, draws=1000):
    """{name: [low, high]}: 95 % intervals of evaluation() over draws of prompts, whose answers stay together.

    columns: what evaluation() takes, each (N,). prompts: (N,), numbers from 0. Many rows get fewer draws.
    """
    draws = min(draws, max(100, 10**7 // len(prompts)))
    generator = np.random.default_rng(0)
    by_prompt = np.argsort(prompts, kind="stable")
    ends = np.bincount(prompts).cumsum()
    groups = np.split(by_prompt, ends[:-1])  # the rows of each prompt
    found = []
    for _ in tqdm(range(draws), desc="intervals", leave=False):
        drawn = generator.integers(len(groups), size=len(groups))
        rows = np.concatenate([groups[n] for n in drawn])
        found.append(evaluation(*picked(columns, rows)))
    intervals = {}
    for name, value in evaluation(*columns).items():
        if not np.isnan(value):
            values = [figures[name] for figures in found]
            intervals[name] = np.nanpercentile(values, (2.5, 97.5)).tolist()
    return intervals


def running(guard, rows, texts):
    """What verdicts on the way add to those at the ends of answers."""
    pairs = zip(texts, rows, strict=True)
    answers = [(text, row["is_safe"]) for text, row in pairs if text.is_answer]
    judged = guard.judge([text for text, _ in answers], progress="judging on the way")
    first_flags, by_half = [], []  # of flagged answers: the token of the first flag; is it by half?
    passed = []  # of the other safe answers: cut on the way?
    for (text, is_safe), (cuts, logits) in zip(answers, judged, strict=True):
        at_each_cut = zip(cuts.split(1), logits.split(1), strict=True)
        verdicts = [guard.verdict(text, *cut_and_logits) for cut_and_logits in at_each_cut]
        flags = [verdict.highest for verdict in verdicts if verdict.flagged]
        if verdicts[-1].flagged:
            half = verdicts[-1].tokens / 2
            first_flags.append(flags[0])
            by_half.append(flags[0] <= half)
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
    figures = {}
    for name, value in result.items():
        if not isinstance(value, dict | list):
            figures[name] = value
    figures |= result.get("running", {})
    for name, found in result["categories"].items():
        figures[f"AP of {name} ({found['positives']} positives)"] = found["ap"]
    notes = {}
    for name, (low, high) in result["intervals"].items():
        notes[name] = f"{low:.3f} to {high:.3f}"
    base_rate = result["positives"] / result["rows"]
    notes["auprc"] = f"{notes.get('auprc', '')}  (a random scorer: {base_rate:.3f})"
    lines = []
    for name, value in figures.items():
        lines.append(f"{name:50} {cell(value):>6}  {notes.get(name, '')}")
    shown = ["rows", "positives", "auprc", "auroc", "f1", "fpr", "recall"]
    shown += [name for name in result if name.startswith("tpr_at_")]
    for name, found in result["sources"].items():
        cells = [f"{column} {cell(found[column])}" for column in shown]
        lines += [f"{name}:", "  ".join(cells)]
    if unknown := result["unknown_categories"]:
        lines.append(f"categories that the guard does not know: {', '.join(unknown)}")
    return "\n".join(one_line(line) for line in lines)


def cell(value):
    if isinstance(value, float):
        return f"{value:.3f}"
    return "-" if value is None else str(value)


if __name__ == "__main__":
    run(main)
