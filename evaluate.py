"""Scores to metrics, in numpy. A score is higher the more harmful a text looks; a label is 1 for harmful, 0 for not."""

import numpy as np


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
