"""Measure a guard on labelled rows."""

import argparse
import json
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from checkpoint import load_guard, use_fast_dtype
from common import UserError, add_guard_arguments, one_line, run, write_whole
from data import encode_row, prompt_key, read_rows
from metrics import average_precision, evaluation


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    add_guard_arguments(parser)
    add = parser.add_argument
    sets = "PKU-Alignment/BeaverTails, lmsys/toxic-chat, or files in our columns, ToxicChat's or OpenAI's"
    add("--dataset", nargs="+", required=True, help=sets)
    add(
        "--running",
        type=int,
        metavar="N",
        help="also judge each answer after every N tokens, as while it streams",
    )
    add("--json", action="store_true", help="print one JSON object")
    add("--scores", type=Path, metavar="FILE.jsonl", help="keep the rows with their verdicts")
    add("--plot", metavar="FILE.png", help="draw precision over recall, the scores by class, and reliability")
    args = parser.parse_args()
    if args.running is not None and args.running < 1:
        parser.error("--running must be at least 1")
    return args


def main():
    args = parse_arguments()
    if Accelerator().num_processes > 1:
        raise UserError("an evaluation runs in one process")
    parts = list(read_rows(args.dataset))
    is_hub = not Path(args.dataset[0]).exists()
    rows = [row for _, split, part in parts for row in part if split == "test" or not is_hub]
    if not rows:
        raise UserError(f"{' '.join(args.dataset)}: there are no rows to evaluate on")
    if args.scores and any(args.scores.exists() and args.scores.samefile(path) for path in args.dataset):
        raise UserError(f"writing {args.scores} would destroy the rows; name another file for --scores")
    guard = load_guard(args.config, args.adapter, args.device_id, args.threshold)
    use_fast_dtype(guard)
    encoded = [encode_row(guard.tokenizer, row) for row in rows]
    logits = guard.score([ids for ids, _ in encoded])  # (N, 1 + K)
    verdicts = [guard.verdict(z, len(ids) - start) for z, (ids, start) in zip(logits, encoded, strict=True)]
    scores = np.nan_to_num(logits.double().sigmoid().numpy(), nan=1.0)  # NaN is flagged
    unsafe = np.array([not row["is_safe"] for row in rows])
    answered = np.array([start < len(ids) for ids, start in encoded])
    result = measure(guard.config, rows, answered, unsafe, scores)
    if args.running:
        answers = running_scores(guard, [pair for pair in encoded if pair[1] < len(pair[0])], args.running)
        result["running"] = running_metrics(unsafe[answered], answers, guard.config.threshold)
    result = json.loads(json.dumps(result), parse_constant=lambda _: None)  # NaN is not JSON
    print(json.dumps(result) if args.json else table(result), flush=True)
    if args.scores:
        lines = (json.dumps(row | v.fields()) + "\n" for row, v in zip(rows, verdicts, strict=True))
        write_whole(args.scores, "".join(lines).encode())
    if args.plot:
        from experiments.plots import plot_evaluation

        plot_evaluation(args.plot, unsafe, scores[:, 0])


def measure(config, rows, answered, unsafe, scores):
    """The figures of probabilities (N, 1 + K) on N rows with labels `unsafe`. unsafe, answered: bool (N,)."""
    flag_from = np.where(answered, config.threshold, config.prompt_threshold)
    numbers = {}
    prompts = np.array([numbers.setdefault(prompt_key(row), len(numbers)) for row in rows])
    result = {"rows": len(rows), "positives": int(unsafe.sum())}
    result |= {"threshold": config.threshold, "prompt_threshold": config.prompt_threshold}
    result |= evaluation(unsafe, scores[:, 0], flag_from)
    if (~unsafe).sum() < 100:  # one false positive alone is more than 1 %
        result["tpr_at_1_percent_fpr"] = float("nan")
    intervals = bootstrap(unsafe, scores[:, 0], flag_from, prompts)
    result["intervals"] = {
        name: interval for name, interval in intervals.items() if result[name] == result[name]
    }
    return result | category_metrics(config.categories, [row["category"] or {} for row in rows], scores)


def bootstrap(labels, scores, thresholds, prompts, draws=1000):
    """{name: [low, high]}: 95 % intervals of evaluation() over draws of prompts, whose answers stay together.

    labels, scores, thresholds: (N,). prompts: (N,), numbers from 0 upwards.
    """
    groups = np.split(np.argsort(prompts, kind="stable"), np.bincount(prompts).cumsum()[:-1])
    generator, found = np.random.default_rng(0), []
    for _ in range(draws):
        rows = np.concatenate([groups[n] for n in generator.integers(len(groups), size=len(groups))])
        found.append(evaluation(labels[rows], scores[rows], thresholds[rows]))
    columns = {name: np.array([values[name] for values in found]) for name in found[0]}
    columns = {name: values[~np.isnan(values)] for name, values in columns.items()}
    return {
        name: np.percentile(values, (2.5, 97.5)).tolist() for name, values in columns.items() if len(values)
    }


def running_scores(guard, encoded, every):
    """[[(tokens, unsafe probability), ...] for each (ids, start)] as the answers grow, the last on all."""
    cuts = [[*range(every, len(ids) - start, every), len(ids) - start] for ids, start in encoded]
    texts = [ids[: start + n] for (ids, start), tokens in zip(encoded, cuts, strict=True) for n in tokens]
    scores = iter(guard.score(texts)[:, 0].double().sigmoid().tolist())
    return [[(n, next(scores)) for n in tokens] for tokens in cuts]


def running_metrics(labels, answers, threshold):
    """What running verdicts add to the one on the whole answer. labels: (N,); answers: of running_scores."""
    flags = [[tokens for tokens, score in answer if score >= threshold] for answer in answers]
    lengths = [answer[-1][0] for answer in answers]
    rows = list(zip(labels, flags, lengths, strict=True))
    flagged = [(cuts[0], length) for _, cuts, length in rows if length in cuts]
    passed = [cuts for label, cuts, length in rows if length not in cuts and not label]
    return {
        "flagged": len(flagged),
        "flagged_by_half": float(np.mean([first <= length / 2 for first, length in flagged]))
        if flagged
        else None,
        "median_token_of_first_flag": float(np.median([first for first, _ in flagged])) if flagged else None,
        "safe_and_not_flagged": len(passed),
        "of_these_cut_on_the_way": float(np.mean([bool(cuts) for cuts in passed])) if passed else None,
    }


def category_metrics(names, categories, scores):
    """{"unknown_categories": names, "categories": {name: {"positives", "ap"}}} over rows that label it.

    names: the guard's K. categories: {name: bool} of each of N rows. scores: (N, 1 + K).
    """
    found, labelled = {}, {name for row in categories for name in row}
    for k, name in [(k, name) for k, name in enumerate(names, 1) if name in labelled]:
        known = np.array([name in row for row in categories])
        values = np.array([row[name] for row in categories if name in row], bool)
        found[name] = {"positives": int(values.sum()), "ap": average_precision(values, scores[known, k])}
    return {"unknown_categories": sorted(labelled - set(names)), "categories": found}


def table(result):
    """The figures with their intervals, a line each."""
    intervals, random = result["intervals"], result["positives"] / result["rows"]
    figures = {name: value for name, value in result.items() if not isinstance(value, dict | list)}
    figures |= result.get("running", {})
    for name, found in result["categories"].items():
        figures[f"AP of {name} ({found['positives']} positives)"] = found["ap"]
    lines = []
    for name, value in figures.items():
        value = "-" if value is None else value if isinstance(value, int) else f"{value:.3f}"
        interval = "  {:.3f} to {:.3f}".format(*intervals[name]) if name in intervals else ""
        lines.append(
            f"{name:50} {value:>6}{interval}" + f"  (a random scorer: {random:.3f})" * (name == "auprc")
        )
    if unknown := result["unknown_categories"]:
        lines.append(f"categories that the guard does not know: {', '.join(unknown)}")
    return "\n".join(one_line(line) for line in lines)


if __name__ == "__main__":
    run(main)
