"""How good a guard is: labelled rows to scores, and scores to metrics, in numpy.

A score is higher the more harmful a text looks; a label is 1 for harmful, 0 for not.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from checkpoint import load_guard
from common import UserError, first_line, one_line, run, write_whole
from data import answer_start_of, encode_row, evaluation_rows, is_answer, prompt_key
from metrics import _curve, average_precision, evaluation, reliability
from model import probabilities, verdict_fields


def bootstrap(labels, scores, thresholds, prompts, draws=1000):
    """{name: [low, high]}: 95 % intervals of evaluation() over draws of prompts, whose answers stay together.

    labels, scores, thresholds: (N,); prompts: (N,), numbers from 0 upwards.
    """
    groups = np.split(np.argsort(prompts, kind="stable"), np.bincount(prompts).cumsum()[:-1])
    generator, found = np.random.default_rng(0), []
    for _ in range(draws):
        rows = np.concatenate([groups[n] for n in generator.integers(len(groups), size=len(groups))])
        found.append(evaluation(labels[rows], scores[rows], thresholds[rows]))
    columns = {name: np.array([values[name] for values in found]) for name in found[0]}
    columns = {name: values[~np.isnan(values)] for name, values in columns.items()}
    return {name: np.percentile(values, (2.5, 97.5)).tolist() for name, values in columns.items() if len(values)}


def running_scores(guard, rows, every):
    """Unsafe probabilities as the answers grow, [[(tokens, probability), ...] for each row], the last on all of it."""
    answers = []
    for row in rows:
        ids = encode_row(guard.tokenizer, row)
        start = answer_start_of(guard.tokenizer, row, ids)
        answers.append([(tokens, ids[: start + tokens]) for tokens in range(every, len(ids) - start, every)])
        answers[-1].append((len(ids) - start, ids))
    logits = guard.score([ids for answer in answers for _, ids in answer])
    scores = iter(probabilities(logits, guard.calibration)[:, 0].tolist())
    return [[(tokens, next(scores)) for tokens, _ in answer] for answer in answers]


def running_metrics(labels, answers, threshold):
    """What running verdicts add to the verdict on the whole answer. labels: (N,); answers: as running_scores gives."""
    flags = [[tokens for tokens, score in answer if score >= threshold] for answer in answers]
    lengths = [answer[-1][0] for answer in answers]
    flagged = [(cuts[0], length) for cuts, length in zip(flags, lengths, strict=True) if length in cuts]
    passed = [
        cuts for label, cuts, length in zip(labels, flags, lengths, strict=True) if length not in cuts and not label
    ]
    return {
        "flagged": len(flagged),
        "flagged_by_half": float(np.mean([first <= length / 2 for first, length in flagged])) if flagged else None,
        "median_token_of_first_flag": float(np.median([first for first, _ in flagged])) if flagged else None,
        "safe_and_not_flagged": len(passed),
        "of_these_cut_on_the_way": float(np.mean([bool(cuts) for cuts in passed])) if passed else None,
    }


def category_metrics(names, categories, scores):
    """{"unknown_categories": names, "categories": {name: {"positives", "ap"}}} over the rows that label a category.

    names: the guard's K; categories: {name: bool} of each of N rows; scores: (N, 1 + K).
    """
    found, labelled = {}, {name for row in categories for name in row}
    for k, name in enumerate(names, 1):
        if name in labelled:
            known = np.array([name in row for row in categories])
            values = np.array([row[name] for row in categories if name in row], bool)
            found[name] = {"positives": int(values.sum()), "ap": average_precision(values, scores[known, k])}
    return {"unknown_categories": sorted(labelled - set(names)), "categories": found}


def main():
    usage = "%(prog)s [config.json] [adapter.safetensors] --dataset FILE ... [options]"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage=usage)
    add = parser.add_argument
    add("config", nargs="?", type=Path, help="default: the guard in guard/, or else the newest run of train.py")
    add("adapter", nargs="?", type=Path, help="default: adapter.safetensors beside the config")
    sets = "PKU-Alignment/BeaverTails, lmsys/toxic-chat, or files in our columns, ToxicChat's or samples-1680.jsonl's"
    add("--dataset", nargs="+", required=True, help=sets)
    add("--device-id", type=int, help="number of the GPU, -1 for the CPU; default: the first GPU if there is one")
    add("--threshold", type=float, help="for prompts and answers; default: the config's")
    add("--running", type=int, metavar="N", help="also judge each answer after every N tokens, as while it streams")
    add("--json", action="store_true", help="print one JSON object")
    add("--scores", type=Path, metavar="FILE.jsonl", help="keep the rows with their verdicts")
    add("--plot", metavar="FILE.png", help="draw precision over recall, the scores by class, and reliability")
    args = parser.parse_args()
    if args.running is not None and args.running < 1:
        raise UserError("--running needs at least 1 token from verdict to verdict")
    if Accelerator().num_processes > 1:
        raise UserError("an evaluation runs in one process")
    rows = evaluation_rows(args.dataset)
    if args.scores and any(args.scores.exists() and args.scores.samefile(path) for path in args.dataset):
        raise UserError(f"writing {args.scores} would destroy the rows; name another file for --scores")
    guard, thresholds = load_guard(args.config, args.adapter, args.device_id, args.threshold)
    guard.use_fast_dtype()

    texts = [encode_row(guard.tokenizer, row) for row in rows]
    scores = probabilities(guard.score(texts), guard.calibration).numpy()  # (N, 1 + K)
    scores = np.nan_to_num(scores, nan=1.0)  # what is no number is flagged
    unsafe = np.array([not row["is_safe"] for row in rows])
    flagged_from = np.array([thresholds[is_answer(row["response"])] for row in rows])
    numbers = {}
    prompts = np.array([numbers.setdefault(prompt_key(row), len(numbers)) for row in rows])
    result = {"rows": len(rows), "positives": int(unsafe.sum())}
    result |= {"threshold": thresholds.response, "prompt_threshold": thresholds.prompt}
    result |= evaluation(unsafe, scores[:, 0], flagged_from)
    if (~unsafe).sum() < 100:  # one false positive alone is more than 1 %
        result["tpr_at_1_percent_fpr"] = float("nan")
    intervals = bootstrap(unsafe, scores[:, 0], flagged_from, prompts)
    result["intervals"] = {name: interval for name, interval in intervals.items() if result[name] == result[name]}
    result |= category_metrics(guard.categories, [row["category"] or {} for row in rows], scores)
    if args.running:
        answered = [row for row in rows if is_answer(row["response"])]
        answers = running_scores(guard, answered, args.running)
        result["running"] = running_metrics([not row["is_safe"] for row in answered], answers, thresholds.response)
    result = json.loads(json.dumps(result), parse_constant=lambda _: None)  # NaN is not JSON
    print(json.dumps(result) if args.json else table(result), flush=True)
    if args.scores:
        judged = zip(rows, flagged_from.tolist(), scores.tolist(), strict=True)
        judged = (row | verdict_fields(guard, threshold, *outputs) for row, threshold, outputs in judged)
        write_whole(args.scores, "".join(json.dumps(row) + "\n" for row in judged).encode())
    if args.plot:
        plot(args.plot, unsafe, scores[:, 0])


def table(result):
    """The figures for human eyes, a line each, with their intervals."""
    intervals, random = result["intervals"], result["positives"] / result["rows"]
    figures = {name: value for name, value in result.items() if not isinstance(value, dict | list)}
    figures |= result.get("running", {})
    for name, found in result["categories"].items():
        figures[f"AP of {name} ({found['positives']} positives)"] = found["ap"]
    lines = []
    for name, value in figures.items():
        value = "-" if value is None else value if isinstance(value, int) else f"{value:.3f}"
        interval = "  {:.3f} to {:.3f}".format(*intervals[name]) if name in intervals else ""
        lines.append(f"{name:50} {value:>6}{interval}" + f"  (a random scorer: {random:.3f})" * (name == "auprc"))
    if unknown := result["unknown_categories"]:
        lines.append(f"categories that the guard does not know: {', '.join(unknown)}")
    return "\n".join(map(one_line, lines))


def plot(path, labels, scores):
    """Draw precision over recall, the scores of each class, and how often a score of p is right."""
    try:
        from matplotlib import pyplot  # only here, for nothing else needs it
    except ImportError:
        raise UserError("a plot needs matplotlib: pip install matplotlib") from None

    figure, (curve, histogram, diagram) = pyplot.subplots(1, 3, figsize=(12, 4), layout="constrained")
    _, positives, flagged = _curve(labels, scores)
    curve.plot(positives / max(labels.sum(), 1), positives / flagged)
    curve.axhline(labels.mean(), linestyle=":", color="grey")
    curve.set(
        xlabel="recall", ylabel="precision", ylim=(0, 1.02), title=f"AUPRC {average_precision(labels, scores):.3f}"
    )
    for kind, name in enumerate(("safe", "unsafe")):
        histogram.hist(scores[labels == kind], bins=np.linspace(0, 1, 41), alpha=0.6, label=name)
    histogram.set(xlabel="unsafe probability", ylabel="rows")
    histogram.legend()
    rows, score, positive = reliability(labels, scores)
    diagram.plot((0, 1), (0, 1), linestyle=":", color="grey")
    diagram.scatter(score, positive, s=400 * rows / rows.sum())
    diagram.set(xlabel="unsafe probability", ylabel="share of unsafe rows", title="reliability")
    try:
        figure.savefig(path)
    except ValueError as error:  # a suffix that stands for no format
        raise UserError(f"cannot draw {path}: {first_line(error)}") from error


if __name__ == "__main__":
    run(main)
