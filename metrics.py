"""Metrics of scores, calibration of logits, and choice of thresholds.

A score is higher the more harmful a text looks; a label is 1 for harmful. Both are numpy arrays (N,).
"""

import numpy as np

BINS = np.linspace(0, 1, 11)  # of probabilities, for the calibration error
RATES = (0.005, 0.01, 0.02, 0.05, 0.1)  # false positive rates that a guard keeps thresholds for
DEFAULT_RATE = 0.05  # a guard flags from the thresholds of this rate


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


def threshold_at_fpr(labels, scores, limit):
    """The threshold with the highest recall at a false positive rate of at most `limit`, and that recall.

    Of equal recalls the highest threshold counts, half-way down to the next score. One above 1 flags nothing.
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
    """metrics(), AUROC, recall at 1, 2 and 5 % FPR, and the calibration error."""
    rows, score, positive = reliability(labels, scores)
    found = metrics(labels, scores, threshold) | {"auroc": auroc(labels, scores)}
    for percent in (1, 2, 5):
        enough = percent * (labels == 0).sum() >= 100  # or one false positive alone would be above the rate
        recall = threshold_at_fpr(labels, scores, percent / 100)[1] if enough else float("nan")
        found[f"tpr_at_{percent}_percent_fpr"] = recall
    return found | {"calibration_error": float((rows * abs(score - positive)).sum() / len(labels))}


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


def operating_points(labels, scores, answered):
    """{"prompt" or "answer": {false positive rate: (threshold, recall)}} on N validation rows.

    answered: bool (N,). Without answers of both kinds all rows count; without such prompts none is refused.
    """
    points = {}
    for kind, rows in (("prompt", ~answered), ("answer", answered)):
        known = len(np.unique(labels[rows])) == 2
        if kind == "prompt" and not known:
            points[kind] = dict.fromkeys(map(str, RATES), (2.0, 0.0))
            continue
        rows = rows if known else np.ones_like(rows)
        points[kind] = {str(rate): threshold_at_fpr(labels[rows], scores[rows], rate) for rate in RATES}
    return points
