"""The pictures show what was measured. Each test names the mutations that it kills."""

import sys

import pytest
from conftest import write

from errors import UserError
from tools import plots

pytest.importorskip("matplotlib").use("Agg")


@pytest.fixture
def axes(monkeypatch):
    """The axes of the figure that was saved."""
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path, **_: drawn.extend(figure.axes))
    return drawn


def curves(drawn):
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in drawn.lines}


def test_each_file_of_scores_has_a_row_of_pictures(axes, tmp_path, monkeypatch):
    """Kills: pictures of all rows at once, classes mixed up, a broken guard's null as 0, a wrong tenth."""
    files = {"a": [(False, 0.91), (True, 0.2), (True, 0.24)], "b": [(True, 0.86), (False, None)]}
    files["safe"] = [(True, 0.3)]
    for name, rows in files.items():
        write(tmp_path / name, [{"is_safe": is_safe, "unsafe_probability": p} for is_safe, p in rows])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["plots.py", "out.png", *files])
    plots.main()
    assert len(axes) == 9
    heights = [[line.get_ydata().tolist() for line in drawn.lines[:-1]] for drawn in axes[::3]]
    assert heights == [[pytest.approx([1, 1 / 2, 1 / 3])], [pytest.approx([1, 1 / 2])], []]
    titles = [drawn.get_title() for drawn in axes[::3]]
    assert titles == ["a: AUPRC 1.000", "b: AUPRC 1.000", "safe: AUPRC nan"]
    bars = [[sum(bar.get_height() for bar in kind) for kind in drawn.containers] for drawn in axes[1::3]]
    assert bars == [[2, 1], [1, 1], [1, 0]]
    points = [drawn.collections[0].get_offsets().flatten().tolist() for drawn in axes[2::3]]
    assert points[0] == pytest.approx([0.22, 0, 0.91, 1])
    assert points[1] == pytest.approx([0.86, 0, 1, 1])  # null is 1: a broken guard flags all


def test_rows_without_a_score_are_refused(tmp_path):
    """Kills: a traceback, a picture of nothing, a message that names no row."""
    for rows, message in (([{"is_safe": True}], "line 1: "), (["text"], "line 1: "), ([], "no rows")):
        write(tmp_path / "scores", rows)
        with pytest.raises(UserError, match=message):
            plots.read_scores([tmp_path / "scores"])


def test_growth_shows_its_curves_whole_above_zero(axes):
    """Kills: a limit that the first curve or column sets, an axis that starts above zero."""
    low, high = [(4, 0.5, 1e9), (8, 1.0, 2e9)], [(64, 1.0, 2e9), (512, 12.0, 5e9)]
    plots.plot_growth("growth.png", {"rows": {"train": low}, "rank": {"train": low, "score": high}})
    for drawn, top in zip(axes, (12, 12, 5, 5), strict=True):
        assert drawn.get_ylim()[0] == 0 and top < drawn.get_ylim()[1] < 1.3 * top
    assert curves(axes[3]) == {"train": ([4, 8], [1, 2]), "score": ([64, 512], [2, 5])}


def test_verdicts_show_every_length_and_contestant(axes):
    """Kills: a curve under another's name, lengths in place of times."""
    times = {n: {"decode step": n + 1, "activated": n + 2, "full": n + 3} for n in (128, 512)}
    plots.plot_verdicts("verdict.png", times, "One verdict")
    assert curves(axes[0]) == {name: ([128, 512], [times[n][name] for n in times]) for name in times[128]}


def test_an_ablation_has_a_dot_for_every_guard(axes):
    """Kills: dots in another variant's line, a band that is not the default's."""
    plots.plot_ablation("ablation.png", {"default": [0.8, 0.9], "other": [0.7]})
    names = [label.get_text() for label in axes[0].get_yticklabels()]
    dots = [(names[int(y)], x) for part in axes[0].collections for x, y in part.get_offsets()]
    assert sorted(dots) == [("default", 0.8), ("default", 0.9), ("other", 0.7)]
    assert axes[0].patches[0].get_x() == pytest.approx(0.8)


def test_a_picture_that_cannot_be_drawn_is_refused(tmp_path, monkeypatch):
    """Kills: a traceback for an optional package or a misspelt suffix."""
    with pytest.raises(UserError, match=r"cannot draw .*plot\.xyz"):
        plots.plot_ablation(tmp_path / "plot.xyz", {"default": [0.8]})
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        plots.plot_ablation(tmp_path / "ablation.png", {"default": [0.8]})
