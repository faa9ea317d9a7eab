"""Exercise 5: the threshold at a false positive rate.

A guard flags a row whose score is at least the threshold. Users do not think in thresholds but in false
alarms: "flag at most 5 in 100 harmless rows". So find the threshold on labelled rows:

- At most `rate` of the harmless rows (label 0) are flagged.
- Among such thresholds, it flags the largest share of the harmful rows (label 1). That share is the recall.
- Among those of equal recall, it flags the fewest harmless rows.
- If even the highest score as threshold flags too many, return a threshold above 1, and recall 0.

Rows with equal scores are flagged together or not at all.

Check yourself: pytest exercises -k 5_threshold. The project has `threshold_at_fpr` in metrics.py.
"""


def threshold_at_fpr(labels, scores, rate):
    """(threshold, recall). labels, scores: numpy arrays (N,); scores from 0 to 1; both labels occur."""
    raise NotImplementedError
