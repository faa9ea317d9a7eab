"""The pictures show what was measured."""

import sys

import pytest
from conftest import write

from errors import UserError
from tools import plots

pytest.importorskip("matplotlib").use("Agg")


def test_each_file_of_scores_has_a_row_of_pictures(tmp_path, monkeypatch):
    """Kills: pictures of all rows at once, classes mixed up, a broken guard's null as 0, a wrong tenth."""
    files = {"a": [(False, 0.91), (True, 0.2), (True, 0.24)], "b": [(True, 0.86), (False, None)]}
    for name, rows in files.items():
        write(tmp_path / name, [{"is_safe": is_safe, "unsafe_probability": p} for is_safe, p in rows])
    axes = []
    monkeypatch.setattr(plots, "save", lambda figure, path: axes.extend(figure.axes))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["plots.py", "out.png", *files])
    plots.main()
    assert [drawn.get_title() for drawn in axes[::3]] == ["a: AUPRC 1.000", "b: AUPRC 1.000"]
    assert axes[0].lines[0].get_ydata().tolist() == pytest.approx([1, 1 / 2, 1 / 3])
    bars = [[sum(bar.get_height() for bar in kind) for kind in drawn.containers] for drawn in axes[1::3]]
    assert bars == [[2, 1], [1, 1]]
    points = [drawn.collections[0].get_offsets().flatten().tolist() for drawn in axes[2::3]]
    assert points[0] == pytest.approx([0.22, 0, 0.91, 1])
    assert points[1] == pytest.approx([0.86, 0, 1, 1])  # null is 1: a broken guard flags all


def test_what_cannot_be_drawn_is_refused(tmp_path, monkeypatch):
    """Kills: a picture of nothing, a row not named, a traceback for a misspelt suffix or no matplotlib."""
    for rows, message in (([{"is_safe": True}], "line 1: "), ([], "no rows")):
        write(tmp_path / "scores", rows)
        with pytest.raises(UserError, match=message):
            plots.read_scores([tmp_path / "scores"])
    with pytest.raises(UserError, match=r"cannot draw .*plot\.xyz"):
        plots.plot_ablation(tmp_path / "plot.xyz", {"default": [0.8]})
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        plots.plot_ablation(tmp_path / "ablation.png", {"default": [0.8]})
