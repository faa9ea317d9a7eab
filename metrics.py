"""How good scores are, in numpy. A score is higher the more harmful a text looks; a label is 1 for harmful."""

import numpy as np

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
