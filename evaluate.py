"""How good a guard is: labelled rows to scores, and scores to metrics, in numpy.

A score is higher the more harmful a text looks; a label is 1 for harmful, 0 for not.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from data import answer_start_of, encode_row, evaluation_rows, is_answer, prompt_key
from lora import UserError, first_line, one_line, run
from model import load_guard, probabilities, verdict_fields, write_whole

BINS = np.linspace(0, 1, 11)  # of probabilities, for the calibration error and its diagram


def _curve(labels, scores):
    """Counts at each distinct score, highest first: (scores, true positives, flagged), so that ties fall together."""
    order = np.argsort(-scores, kind="stable")
    scores = scores[order]
    last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)
    return scores[last], np.cumsum(labels[order])[last], last + 1


def average_precision(labels, scores):
    """Area under the precision-recall curve, as the sum of (R_n - R_(n-1)) P_n; NaN without a positive label.

    A random scorer gets the share of positives. labels, scores: (N,).
    """
    if not labels.any():
        return float("nan")
    _, positives, flagged = _curve(labels, scores)
    recall = positives / labels.sum()
    return float(np.sum(np.diff(recall, prepend=0) * positives / flagged))


def auroc(labels, scores):
    """Area under the ROC curve by trapezoids, so that a tie counts half; NaN without both classes. (N,), (N,)."""
    if len(np.unique(labels)) < 2:
        return float("nan")
    _, positives, flagged = _curve(labels, scores)
    true, false = (np.append(0, counts) / counts[-1] for counts in (positives, flagged - positives))
    return float(np.trapezoid(true, false))


def best_threshold(labels, scores):
    """The score from which flagging gives the highest F1, half-way to the next lower score that there is.

    labels, scores: (N,). With calibrated probabilities for labels, it is the highest F1 that is to be expected.
    """
    thresholds, positives, flagged = _curve(labels, scores)
    best = np.argmax(2 * positives / (flagged + labels.sum()))
    return float(thresholds[best : best + 2].mean())


def threshold_at_fpr(labels, scores, limit):
    """(threshold, recall) with the highest recall that a false positive rate of at most `limit` allows.

    Of several such thresholds, the highest; half-way to the next lower score, and above 1 where nothing can be flagged.
    """
    thresholds, positives, flagged = _curve(labels, scores)
    false, true = np.append(0, flagged - positives), np.append(0, positives)
    best = np.argmax(true * (false <= limit * (labels == 0).sum()))
    threshold = np.concatenate([[2], thresholds, thresholds[-1:]])[best : best + 2].mean()
    return float(threshold), float(true[best] / labels.sum()) if labels.any() else float("nan")


def fit_temperature(labels, logits):
    """The T that makes sigmoid(logits / T) likeliest, to 1 % (Guo et al., arXiv 1706.04599, section 4.2). Both (N,)."""
    logits = logits.astype(np.float64)

    def loss(temperature):
        return (np.logaddexp(0, logits / temperature) - labels * logits / temperature).sum()

    return float(min(np.geomspace(0.05, 20, 603), key=loss))


def reliability(labels, scores):
    """Per bin of scores that has any: (rows, mean score, share of positives), each (bins,)."""
    bins = np.clip(np.digitize(scores, BINS) - 1, 0, len(BINS) - 2)
    sums = np.stack([np.bincount(bins, weights, len(BINS) - 1) for weights in (None, scores, labels)])
    rows, score, positive = sums[:, sums[0] > 0]
    return rows, score / rows, positive / rows


def metrics(labels, scores, threshold):
    """{name: value}, flagging from `threshold` upwards; a ratio of nothing is NaN. labels, scores: (N,).

    threshold: a number, or one for each row, (N,).
    """
    labels, flagged = labels.astype(bool), scores >= threshold

    def share(part, whole):
        return float(part.sum() / whole.sum()) if whole.any() else float("nan")

    precision, recall = share(labels & flagged, flagged), share(labels & flagged, labels)
    return {
        "accuracy": float((labels == flagged).mean()) if len(labels) else float("nan"),
        "precision": precision,
        "recall": recall,
        "f1": 2 * share(labels & flagged, np.append(labels, flagged)),
        "fpr": share(~labels & flagged, ~labels),
        "auprc": average_precision(labels, scores),
    }


def evaluation(labels, scores, threshold):
    """metrics() and what guards are compared by beside them. labels, scores: (N,)."""
    rows, score, positive = reliability(labels, scores)
    return metrics(labels, scores, threshold) | {
        "auroc": auroc(labels, scores),
        "tpr_at_1_percent_fpr": threshold_at_fpr(labels, scores, 0.01)[1],
        "calibration_error": float((rows * abs(score - positive)).sum() / len(labels)),
    }


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
