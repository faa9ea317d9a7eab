"""The pictures show what was measured. Each test names the mutations that it kills."""

import sys

import pytest

from common import UserError
from tools import plots

pytest.importorskip("matplotlib").use("Agg")


@pytest.fixture
def axes(monkeypatch):
    """The axes of the last figure: {y label: axes}, and those without a label by their place."""
    found = {}
    save = plots.save

    def spy(figure, path, **options):
        found.update({drawn.get_ylabel() or place: drawn for place, drawn in enumerate(figure.axes)})
        save(figure, path, **options)

    monkeypatch.setattr(plots, "save", spy)
    return found


GROWTH = {  # the highest curve is not the first one
    "rows": {"train": [(4, 0.5, 1e9), (8, 1.0, 2e9)], "score": [(4, 0.4, 1e9), (8, 0.8, 1e9)]},
    "length": {"train": [(64, 1.0, 2e9), (512, 9.0, 5e9)], "score": [(64, 1.0, 1e9), (512, 12.0, 1e9)]},
    "rank": {"train": [(4, 1.0, 1e9), (64, 2.0, 2e9)], "score": [(4, 1.0, 1e9), (64, 1.0, 1e9)]},
}


def test_growth_shows_its_curves_whole_above_zero(axes, tmp_path):
    """Kills: a limit that the first curve sets, which cuts the others off; an axis that starts above zero."""
    plots.plot_growth(tmp_path / "growth.png", GROWTH)
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert len(axes) == 6
    heights = [[y for line in drawn.lines for y in line.get_ydata()] for drawn in axes.values()]
    assert max(map(max, heights[:3])) == 12 and max(map(max, heights[3:])) == 5  # seconds, GB
    for row in (list(axes.values())[:3], list(axes.values())[3:]):
        low, high = row[0].get_ylim()
        tops = [y for drawn in row for line in drawn.lines for y in line.get_ydata()]
        assert low == 0 and 1.03 * max(tops) < high < 1.3 * max(tops)
        assert all(drawn.get_ylim() == (low, high) for drawn in row)


def test_growth_may_be_of_one_thing(axes, tmp_path):
    """Kills: axes that are taken for a table when they are a column."""
    plots.plot_growth(tmp_path / "growth.png", {"length": GROWTH["length"]})
    assert len(axes) == 2 and axes["peak memory, GB"].get_xlabel() == "tokens a row"


def test_verdicts_show_every_length_and_contestant(axes, tmp_path):
    """Kills: a curve under another's name, lengths in place of times."""
    times = {
        128: {"decode step": 20, "activated": 30, "full": 90},
        512: {"decode step": 21, "activated": 31, "full": 400},
    }
    plots.plot_verdicts(tmp_path / "verdict.png", times, "One verdict")
    drawn = axes["ms"]
    curves = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in drawn.lines}
    assert curves == {name: ([128, 512], [times[128][name], times[512][name]]) for name in times[128]}
    assert drawn.get_title() == "One verdict"
    assert [label.get_text() for label in drawn.get_xticklabels()] == ["128", "512"]


def test_an_ablation_has_a_dot_for_every_guard(axes, tmp_path):
    """Kills: dots in another variant's line, a band that is not the default's."""
    plots.plot_ablation(tmp_path / "ablation.png", {"default": [0.8, 0.9], "other": [0.7]})
    [drawn] = axes.values()
    names = [label.get_text() for label in drawn.get_yticklabels()]
    dots = [(names[int(y)], x) for part in drawn.collections for x, y in part.get_offsets()]
    assert sorted(dots) == [("default", 0.8), ("default", 0.9), ("other", 0.7)] and names[-1] == "default"
    assert drawn.patches[0].get_extents().transformed(drawn.transData.inverted()).x0 == pytest.approx(0.8)


def test_a_picture_without_matplotlib_is_refused_in_one_line(tmp_path, monkeypatch):
    """Kills: a traceback for an optional package."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        plots.plot_ablation(tmp_path / "ablation.png", {"default": [0.8]})


def test_a_format_that_matplotlib_does_not_know_is_refused(tmp_path):
    """Kills: a traceback for a misspelt suffix."""
    with pytest.raises(UserError, match=r"cannot draw .*plot\.xyz"):
        plots.plot_ablation(tmp_path / "plot.xyz", {"default": [0.8]})
