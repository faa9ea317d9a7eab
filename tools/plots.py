"""Draw precision over recall, the scores by class, and reliability. Only this file imports matplotlib.

    python tools/plots.py OUT.png SCORES.jsonl [SCORES.jsonl ...]

`evaluate.py --scores` writes SCORES.jsonl. The pictures of tools/bench.py and tools/ablation.py are here too.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from data import read_file
from errors import UserError, check_output, explain, refuse, run
from metrics import average_precision, curve


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path, metavar="OUT.png")
    parser.add_argument("scores", type=Path, nargs="+", metavar="SCORES.jsonl")
    args = parser.parse_args()
    check_output(args.picture)
    plot_evaluation(args.picture, *read_scores(args.scores))


def read_scores(paths):
    """(whether each row is unsafe, its score, its file), each (N,). Raises UserError for other rows."""
    rows = []
    for path in paths:
        for where, row in read_file(path):
            refuse(isinstance(row, UserError), f"{where}: {row}")
            with explain(f"{where}: `evaluate.py --scores` writes other rows"):
                score = np.nan if row["unsafe_probability"] is None else float(row["unsafe_probability"])
                rows.append((not row["is_safe"], score, str(path)))
    refuse(not rows, "there are no rows to draw")
    unsafe, scores, sources = map(np.array, zip(*rows, strict=True))
    return unsafe, np.nan_to_num(scores, nan=1.0), sources  # a broken guard flags all


def plot_evaluation(path, labels, scores, sources):
    """Draw a row of three for each file on one page.

    labels, scores, sources: whether each row is unsafe, its score, and its file; each (N,).
    """
    names = list(dict.fromkeys(sources))
    figure, rows = figure_of(len(names), 3, figsize=(12, 4 * len(names)), squeeze=False)
    for axes, name in zip(rows, names, strict=True):
        draw_file(axes, str(name), labels[sources == name], scores[sources == name])
    save(figure, path)


def draw_file(axes, name, labels, scores):
    """Draw one file's three pictures. Precision and recall need unsafe rows."""
    precision, histogram, diagram = axes
    if labels.any():
        _, positives, flagged = curve(labels, scores)
        precision.plot(positives / positives[-1], positives / flagged)
    precision.axhline(labels.mean(), linestyle=":", color="grey")
    precision.set(xlabel="recall", ylabel="precision", xlim=(-0.02, 1.02), ylim=(0, 1.02))
    precision.set_title(f"{name[-40:]}: AUPRC {average_precision(labels, scores):.3f}")
    for kind, label in enumerate(("safe", "unsafe")):
        histogram.hist(scores[labels == kind], bins=np.linspace(0, 1, 41), alpha=0.6, label=label)
    histogram.set(xlabel="unsafe probability", ylabel="rows")
    histogram.legend()
    rows, score, positive = reliability(labels, scores)
    diagram.plot((0, 1), (0, 1), linestyle=":", color="grey")
    diagram.scatter(score, positive, s=400 * rows / rows.sum())
    diagram.set(xlabel="unsafe probability", ylabel="share of unsafe rows", title="reliability")


def reliability(labels, scores):
    """Per tenth of the scores that has any: (rows, mean score, share of positives), each (tenths,)."""
    tenths = np.minimum((scores * 10).astype(int), 9)  # (N,)
    sums = np.stack([np.bincount(tenths, weights) for weights in (None, scores, labels)])
    rows, score, positive = sums[:, sums[0] > 0]
    return rows, score / rows, positive / rows


def plot_ablation(path, found):
    """Draw the AUPRC of every guard, one row of dots per variant. found: {variant: [AUPRC of each seed]}."""
    figure, axes = figure_of(figsize=(8, 4.5))
    for height, (name, values) in enumerate(reversed(found.items())):
        color = "tab:orange" if name == "default" else "tab:blue"
        axes.scatter(values, [height] * len(values), color=color)
    axes.axvspan(min(found["default"]), max(found["default"]), color="tab:orange", alpha=0.15)
    axes.set_yticks(range(len(found)), list(reversed(found)))
    axes.set(xlabel="AUPRC on validation rows")
    save(figure, path)


def plot_verdicts(path, verdicts, caption):
    """Draw the time of a verdict over the length. verdicts: {tokens: {contestant: milliseconds}}."""
    figure, axes = figure_of(figsize=(6, 4))
    for name, marker in (("full", "s"), ("activated", "o"), ("decode step", "x")):
        axes.plot(list(verdicts), [times[name] for times in verdicts.values()], marker=marker, label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens of the conversation", ylabel="ms", title=caption)
    axes.set_xticks(list(verdicts), map(str, verdicts))
    axes.legend()
    save(figure, path, dpi=110)


def plot_growth(path, found):
    """Draw time and peak memory of training and scoring over what grows.

    found: {"rows", "length" or "rank": {"train" or "score": [(value, seconds, bytes), ...]}}.
    """
    labels = {"rows": "rows", "length": "tokens a row", "rank": "rank"}
    figure, axes = figure_of(2, len(found), figsize=(10, 5), sharey="row", squeeze=False)
    for (time, memory), (name, measured) in zip(axes.T, found.items(), strict=True):
        for what, points in measured.items():
            values, seconds, peaks = zip(*points, strict=True)
            time.plot(values, seconds, marker="o", label=what)
            memory.plot(values, [peak / 1e9 for peak in peaks], marker="o", label=what)
        memory.set(xlabel=labels[name])
    time, memory = axes[:, 0]
    time.set(ylabel="seconds")
    memory.set(ylabel="peak memory, GB")
    time.legend()
    for first in (time, memory):
        first.set_ylim(bottom=0)  # last, because this fixes the top for all curves of the row
    save(figure, path, dpi=90)


def figure_of(*shape, **options):
    """matplotlib's (figure, axes). Raises UserError if it is not installed."""
    with explain("a plot needs matplotlib: pip install matplotlib", ImportError):
        from matplotlib import pyplot
    return pyplot.subplots(*shape, layout="constrained", **options)


def save(figure, path, **options):
    with explain(f"cannot draw {path}", ValueError):  # for a suffix that is not a format
        figure.savefig(path, **options)


if __name__ == "__main__":
    run(main)
