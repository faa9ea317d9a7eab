"""Metrics of scores, calibration of logits, and choice of thresholds.

A score is higher the more harmful a text looks; a label is 1 for harmful. Both are numpy arrays (N,).
"""

import numpy as np

BINS = np.linspace(0, 1, 11)  # of probabilities, for the calibration error


def curve(labels, scores):
    """(scores, true positives, flagged) at each distinct score, highest first, so ties fall together."""
    order = np.argsort(-scores, kind="stable")
    scores = scores[order]
    last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)
    return scores[last], np.cumsum(labels[order])[last], last + 1


def average_precision(labels, scores):
    """Area under the precision-recall curve: the sum of (R_n - R_(n-1)) P_n. NaN without a positive label."""
    if not labels.any():
        return float("nan")
    _, positives, flagged = curve(labels, scores)
    return float(np.sum(np.diff(positives / labels.sum(), prepend=0) * positives / flagged))


def auroc(labels, scores):
    """Area under the ROC curve by trapezoids, so a tie counts half. NaN without both classes."""
    if len(np.unique(labels)) < 2:
        return float("nan")
    _, positives, flagged = curve(labels, scores)
    true, false = (np.append(0, counts) / counts[-1] for counts in (positives, flagged - positives))
    return float(np.trapezoid(true, false))


def best_threshold(labels, scores):
    """The threshold of the highest F1, half-way down to the next lower score."""
    thresholds, positives, flagged = curve(labels, scores)
    best = np.argmax(2 * positives / (flagged + labels.sum()))
    return float(thresholds[best : best + 2].mean())


def threshold_at_fpr(labels, scores, limit):
    """The threshold with the highest recall at a false positive rate of at most `limit`, and that recall.

    Of equal recalls the highest threshold counts, half-way down to the next score. Above 1: nothing passes.
    """
    thresholds, positives, flagged = curve(labels, scores)
    false, true = np.append(0, flagged - positives), np.append(0, positives)
    best = np.argmax(true * (false <= limit * (labels == 0).sum()))
    threshold = np.concatenate([[2], thresholds, thresholds[-1:]])[best : best + 2].mean()
    return float(threshold), float(true[best] / labels.sum()) if labels.any() else float("nan")


def reliability(labels, scores):
    """Per bin of scores that has any: (rows, mean score, share of positives), each (bins,)."""
    bins = np.clip(np.digitize(scores, BINS) - 1, 0, len(BINS) - 2)
    sums = np.stack([np.bincount(bins, weights, len(BINS) - 1) for weights in (None, scores, labels)])
    rows, score, positive = sums[:, sums[0] > 0]
    return rows, score / rows, positive / rows


def metrics(labels, scores, threshold):
    """{name: value} if scores from `threshold`, a number or (N,), are flagged. A ratio of nothing is NaN."""
    labels, flagged = labels.astype(bool), scores >= threshold

    def share(part, whole):
        return float(part.sum() / whole.sum()) if whole.any() else float("nan")

    return {
        "accuracy": float((labels == flagged).mean()) if len(labels) else float("nan"),
        "precision": share(labels & flagged, flagged),
        "recall": share(labels & flagged, labels),
        "f1": 2 * share(labels & flagged, np.append(labels, flagged)),
        "fpr": share(~labels & flagged, ~labels),
        "auprc": average_precision(labels, scores),
    }


def evaluation(labels, scores, threshold):
    """metrics(), and AUROC, recall at 1 % FPR and the calibration error."""
    rows, score, positive = reliability(labels, scores)
    return metrics(labels, scores, threshold) | {
        "auroc": auroc(labels, scores),
        "tpr_at_1_percent_fpr": threshold_at_fpr(labels, scores, 0.01)[1],
        "calibration_error": float((rows * abs(score - positive)).sum() / len(labels)),
    }


def fit_temperature(labels, logits):
    """The T that makes sigmoid(logits / T) likeliest, to 1 % (Guo et al., arXiv 1706.04599, section 4.2)."""

    def loss(temperature):
        z = logits.astype(np.float64) / temperature
        return (np.logaddexp(0, z) - labels * z).sum()

    return float(min(np.geomspace(0.05, 20, 603), key=loss))


def calibrate(logits, labels, pos_weight):
    """(shift, temperature), each (outputs,): sigmoid((z - shift) / temperature) is a probability.

    logits, labels: (N, outputs), NaN where unknown; pos_weight: (outputs,). Training with it shifts each
    logit by its log; `shift` undoes this. One temperature for unsafe and one for the categories correct
    over-confidence.
    """
    shift = np.log(np.maximum(pos_weight, 1e-3))
    temperature = np.ones_like(shift)
    for columns in (slice(0, 1), slice(1, None)):
        known = ~np.isnan(labels[:, columns])
        if known.any():
            z = (logits - shift)[:, columns][known]
            temperature[columns] = fit_temperature(labels[:, columns][known], z)
    return shift, temperature


def unsafe_score(logits, calibration, unsafe_head):
    """Unsafe probabilities (N,) of logits (N, 1 + K). Without an unsafe head, of the likeliest category."""
    shift, temperature = calibration
    z = (logits.astype(np.float64) - shift) / temperature
    return 1 / (1 + np.exp(-(z[:, 0] if unsafe_head else z[:, 1:].max(1))))


def choose_thresholds(labels, scores, answered, prompt_fpr, max_fpr):
    """(prompt threshold, answer threshold): prompts keep to prompt_fpr, answers have the best F1.

    answered: bool (N,). If max_fpr is given, both keep to it. No prompt is refused without both kinds.
    """
    prompt, answer = ((labels[rows], scores[rows]) for rows in (~answered, answered))
    answer = answer if len(np.unique(answer[0])) == 2 else (labels, scores)
    threshold = best_threshold(*answer) if max_fpr is None else threshold_at_fpr(*answer, max_fpr)[0]
    if len(np.unique(prompt[0])) < 2:
        return 2.0, threshold
    return threshold_at_fpr(*prompt, prompt_fpr if max_fpr is None else max_fpr)[0], threshold
