import numpy as np


def threshold_at_fpr(labels, scores, rate):
    order = np.argsort(-scores)
    labels, scores = labels[order], scores[order]
    last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)  # where a run of equal scores ends
    thresholds, positives, flagged = scores[last], np.cumsum(labels)[last], last + 1
    false = np.append(0, flagged - positives)  # the first threshold, 2, flags nothing
    true = np.append(0, positives)
    best = np.argmax(true * (false <= rate * (labels == 0).sum()))
    return np.append(2, thresholds)[best], true[best] / labels.sum()
