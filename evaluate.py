"""How good a guard is: labelled rows to scores, and scores to metrics, in numpy.

A score is higher the more harmful a text looks; a label is 1 for harmful, 0 for not.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from data import answer_start, encode, read_rows
from lora import UserError, run
from model import load_guard, probabilities


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


def best_threshold(labels, scores):
    """The score from which flagging gives the highest F1, half-way to the next lower score that there is."""
    thresholds, positives, flagged = _curve(labels, scores)
    best = np.argmax(2 * positives / (flagged + labels.sum()))
    return float(thresholds[best : best + 2].mean())


def metrics(labels, scores, threshold):
    """{name: value}, flagging from `threshold` upwards; a ratio of nothing is NaN. labels, scores: (N,)."""
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


def running_scores(guard, rows, every):
    """Unsafe probabilities as the answers grow, [[(tokens, probability), ...] for each row], the last on all of it."""
    answers = []
    for row in rows:
        ids = encode(guard.tokenizer, row["prompt"], row["response"])
        start = answer_start(encode(guard.tokenizer, row["prompt"]), ids)
        answers.append([(tokens, ids[: start + tokens]) for tokens in range(every, len(ids) - start, every)])
        answers[-1].append((len(ids) - start, ids))
    scores = iter(probabilities(guard.score([ids for answer in answers for _, ids in answer]))[:, 0].tolist())
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


def main():
    usage = "%(prog)s [config.json] [adapter.safetensors] --dataset FILE ... [options]"
    parser = argparse.ArgumentParser(description="Score labelled rows with a trained guard.", usage=usage)
    add = parser.add_argument
    add("config", nargs="?", type=Path, help="default: the guard in guard/, or else the newest run of train.py")
    add("adapter", nargs="?", type=Path, help="default: adapter.safetensors beside the config")
    add("--dataset", nargs="+", required=True, help="files or a hub id, as for train.py")
    add("--device-id", type=int, help="number of the GPU, -1 for the CPU; default: the first GPU if there is one")
    add("--threshold", type=float, help="default: the config's")
    add("--verdict-every", type=int, default=16, metavar="N", help="tokens from verdict to verdict")
    add("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    given = [row for _, _, some in read_rows(args.dataset) for row in some]
    rows = [row for row in given if row["response"] and row["response"].strip()]
    if not rows or args.verdict_every < 1:
        raise UserError("there must be rows with a response, and at least 1 token from verdict to verdict")
    guard, threshold = load_guard(args.config, args.adapter, args.device_id)
    threshold = threshold if args.threshold is None else args.threshold
    labels, answers = np.array([not row["is_safe"] for row in rows]), running_scores(guard, rows, args.verdict_every)
    result = {
        "rows": len(rows),
        "without_response_left_out": len(given) - len(rows),
        "positives": int(labels.sum()),
        "threshold": threshold,
    }
    result |= metrics(labels, np.array([answer[-1][1] for answer in answers]), threshold)
    result |= running_metrics(labels, answers, threshold)
    result = {name: None if value != value else value for name, value in result.items()}  # NaN is not JSON
    print(json.dumps(result) if args.json else "\n".join(f"{name:28} {value}" for name, value in result.items()))


if __name__ == "__main__":
    run(main)
