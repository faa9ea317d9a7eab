"""Metrics of scores, calibration of logits, and choice of thresholds.

A score is higher the more harmful a text looks; a label is 1 for harmful. Both are numpy arrays (N,).
"""

import numpy as np

RATES = (0.005, 0.01, 0.02, 0.05, 0.1)  # false positive rates that a guard keeps thresholds for
DEFAULT_RATE = 0.05  # a guard flags from the thresholds of this rate


def curve(labels, scores):
    """(scores, true positives, flagged) at each distinct score, highest first, so ties fall together."""
    order = np.argsort(-scores, kind="stable")
    scores = scores[order]
    changes = np.flatnonzero(np.diff(scores))
    last = np.append(changes, len(scores) - 1)  # the last place of each distinct score
    positives = np.cumsum(labels[order])
    return scores[last], positives[last], last + 1


def average_precision(labels, scores):
    """Area under the precision-recall curve: the sum of (R_n - R_(n-1)) P_n. NaN without a positive label."""
    if not labels.any():
        return float("nan")
    _, positives, flagged = curve(labels, scores)
    steps = np.diff(positives / labels.sum(), prepend=0)
    return float(np.sum(steps * positives / flagged))


def auroc(labels, scores):
    """Area under the ROC curve by trapezoids, so a tie counts half. NaN without both classes."""
    if len(np.unique(labels)) < 2:
        return float("nan")
    _, positives, flagged = curve(labels, scores)
    false = flagged - positives
    recall = np.append(0, positives) / positives[-1]
    fpr = np.append(0, false) / false[-1]
    return float(np.trapezoid(recall, fpr))


def has_enough(labels, rate):
    """Whether one false positive among these rows stays within the rate. With fewer no threshold has it."""
    return round(rate * (labels == 0).sum(), 9) >= 1


def threshold_at_fpr(labels, scores, rate):
    """The threshold with the highest recall at a false positive rate of at most `rate`, and that recall.

    Of equal recalls the highest threshold counts, half-way down to the next score. One above 1 flags nothing.
    """
    thresholds, positives, flagged = curve(labels, scores)
    false = np.append(0, flagged - positives)
    true = np.append(0, positives)
    is_allowed = false <= rate * (labels == 0).sum()
    best = np.argmax(true * is_allowed)  # the first one of equal recalls
    padded = np.concatenate([[2], thresholds, thresholds[-1:]])  # 2 flags nothing; the last one has no next
    threshold = padded[best : best + 2].mean()
    recall = true[best] / labels.sum() if labels.any() else float("nan")
    return float(threshold), float(recall)


def metrics(labels, scores, flagged):
    """{name: value}. flagged: bool (N,). A ratio of nothing is NaN."""
    labels = labels.astype(bool)

    def share(part, whole):
        if not whole.any():
            return float("nan")
        return float(part.sum() / whole.sum())

    return {
        "accuracy": share(labels == flagged, np.ones_like(labels)),
        "precision": share(labels & flagged, flagged),
        "recall": share(labels & flagged, labels),
        "f1": 2 * share(labels & flagged, np.append(labels, flagged)),
        "fpr": share(~labels & flagged, ~labels),
        "auprc": average_precision(labels, scores),
    }


def evaluation(labels, scores, flagged):
    """metrics(), AUROC, recall at 1, 2 and 5 % FPR, and the calibration error in ten equal bins."""
    found = metrics(labels, scores, flagged)
    found["auroc"] = auroc(labels, scores)
    for percent in (1, 2, 5):
        recall = float("nan")
        if has_enough(labels, percent / 100):
            _, recall = threshold_at_fpr(labels, scores, percent / 100)
        found[f"tpr_at_{percent}_percent_fpr"] = recall
    bins = np.minimum((scores * 10).astype(int), 9)
    gaps = np.bincount(bins, scores - labels)  # of each bin: its rows times (mean score - share of positives)
    found["calibration_error"] = float(abs(gaps).sum() / len(labels))
    return found


def fit_temperature(labels, logits):
    """The T that makes sigmoid(logits / T) likeliest, to 1 % (Guo et al., arXiv 1706.04599, section 4.2).

    From 1/4 to 4: rows that a guard separates without a mistake would call for a T of 0.
    """

    def loss(temperature):
        z = logits.astype(np.float64) / temperature
        return (np.logaddexp(0, z) - labels * z).sum()

    return float(min(np.geomspace(0.25, 4, 280), key=loss))


def calibrate(logits, labels, pos_weight):
    """(shift, temperature), each (outputs,): sigmoid((z - shift) / temperature) is a probability.

    logits, labels: (N, outputs), NaN where unknown; pos_weight: (outputs,). Training with it shifts each
    logit by its log; `shift` undoes this. One temperature for unsafe and one for the categories correct
    over-confidence.
    """
    shift = np.log(pos_weight)
    temperature = np.ones_like(shift)
    z = logits - shift
    for columns in (slice(0, 1), slice(1, None)):
        targets = labels[:, columns]
        known = ~np.isnan(targets)
        if known.any():
            temperature[columns] = fit_temperature(targets[known], z[:, columns][known])
    return shift, temperature


def unsafe_score(logits, calibration, unsafe_head):
    """Unsafe probabilities (N,) of logits (N, 1 + K). Without an unsafe head, of the likeliest category."""
    shift, temperature = calibration
    z = (logits.astype(np.float64) - shift) / temperature
    z = z[:, 0] if unsafe_head else z[:, 1:].max(1)
    return 1 / (1 + np.exp(-z))


def operating_points(labels, scores, answered):
    """{"prompt" or "answer": {false positive rate: (threshold, recall)}} on N validation rows.

    answered: bool (N,). Without answers of both classes all rows count. A rate that needs more rows than a
    kind has is left out.
    """
    points = {}
    for kind, rows in (("prompt", ~answered), ("answer", answered)):
        if kind == "answer" and len(np.unique(labels[rows])) < 2:
            rows = np.ones_like(rows)
        of_kind = labels[rows]
        points[kind] = {}
        for rate in RATES:
            if of_kind.any() and has_enough(of_kind, rate):
                points[kind][str(rate)] = threshold_at_fpr(of_kind, scores[rows], rate)
    return points
