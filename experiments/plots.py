"""Pictures of what the commands measured. matplotlib is imported only here."""

import numpy as np

from common import UserError, one_line
from metrics import average_precision, curve, reliability


def plot_evaluation(path, labels, scores):
    """Draw precision over recall, the scores of each class, and how often a probability is right. (N,), (N,)."""
    figure, (precision, histogram, diagram) = figure_of(1, 3, figsize=(12, 4))
    _, positives, flagged = curve(labels, scores)
    precision.plot(positives / max(labels.sum(), 1), positives / flagged)
    precision.axhline(labels.mean(), linestyle=":", color="grey")
    precision.set(xlabel="recall", ylabel="precision", ylim=(0, 1.02))
    precision.set_title(f"AUPRC {average_precision(labels, scores):.3f}")
    for kind, name in enumerate(("safe", "unsafe")):
        histogram.hist(scores[labels == kind], bins=np.linspace(0, 1, 41), alpha=0.6, label=name)
    histogram.set(xlabel="unsafe probability", ylabel="rows")
    histogram.legend()
    rows, score, positive = reliability(labels, scores)
    diagram.plot((0, 1), (0, 1), linestyle=":", color="grey")
    diagram.scatter(score, positive, s=400 * rows / rows.sum())
    diagram.set(xlabel="unsafe probability", ylabel="share of unsafe rows", title="reliability")
    save(figure, path)


def figure_of(*shape, **options):
    try:
        from matplotlib import pyplot
    except ImportError:
        raise UserError("a plot needs matplotlib: pip install matplotlib") from None
    return pyplot.subplots(*shape, layout="constrained", **options)


def save(figure, path, **options):
    try:
        figure.savefig(path, **options)
    except ValueError as error:  # a suffix that is not a format
        raise UserError(f"cannot draw {path}: {one_line(error)}") from error
