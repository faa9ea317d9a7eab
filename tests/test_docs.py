"""The documents hold what they promise: their code runs, and what they name exists."""

import re
from pathlib import Path

import nbformat
import pytest
from conftest import make_guard, user
from nbclient import NotebookClient

import checkpoint
from chat import moderate_turn

ROOT = Path(__file__).parents[1]
TOUR = ROOT / "tour.ipynb"
DOCUMENTS = [str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *ROOT.glob("[deg]*/**/*.md"), TOUR)]


def run_tour():
    """The tour with new outputs, without warnings. `PYTHONPATH=. python tests/test_docs.py` saves it."""
    notebook = nbformat.read(TOUR, as_version=4)
    place = {"metadata": {"path": str(ROOT)}}
    options = {"timeout": 600, "record_timing": False, "coalesce_streams": True}
    NotebookClient(notebook, resources=place, **options).execute()
    for cell in code_cells(notebook):
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata.language_info = {"name": "python"}  # its version would change with every machine
    return notebook


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


@pytest.mark.slow
def test_the_tour_prints_what_it_says():
    """Kills: a block that no longer runs, and a shape or number in the tour that the code does not print."""
    saved, executed = nbformat.read(TOUR, as_version=4), run_tour()
    for cell, again in zip(code_cells(saved), code_cells(executed), strict=True):
        if "differs" not in cell.metadata.get("tags", []):  # with the processor
            assert printed(again) == printed(cell)


def test_the_tour_is_saved_with_its_pictures():
    """Kills: a tour without its pictures, one that shows the paths and warnings of a machine."""
    outputs = [output for cell in code_cells(nbformat.read(TOUR, as_version=4)) for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert not any(output.get("name") == "stderr" or "/site-packages" in str(output) for output in outputs)


@pytest.mark.parametrize("name", ["README.md", "docs/USAGE.md"])
def test_python_examples_show_no_flagged_text(name, monkeypatch, capsys):
    """Kills: a name that the code no longer has, and an example that prints a piece before its verdict."""
    guard = make_guard()
    verdict = guard.verdict
    guard.verdict = lambda *given: (found := verdict(*given))._replace(flagged=found.tokens > 16)
    monkeypatch.setattr(checkpoint, "load_guard", lambda: guard)
    *_, (shown, _), (flagged, _) = moderate_turn(guard, user("How do I keep bread fresh?"))
    assert shown and flagged.startswith(shown) and flagged != shown
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.S)
    exec(code, {"__name__": "document"})
    text = capsys.readouterr().out
    assert f"{shown}[blocked]" in text and flagged not in text


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_to_files_and_headings(name):
    """Kills: a link to a file that was moved, and to a heading that was renamed."""
    for target in re.findall(r"\]\((?!https?:)([^)]*)\)", (ROOT / name).read_text()):
        file, _, heading = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", path.read_text().lower(), re.M)
            links = [re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles]  # as GitHub does
            assert heading in links, target


def test_the_table_of_attacks_names_tests():
    """Kills: a test that was renamed, so that the command of the table runs nothing."""
    code = "".join(path.read_text() for path in ROOT.glob("tests/*.py"))
    names = " ".join(re.findall(r"^def (test_\w+)", code, re.M))
    table = (ROOT / "docs/RESULTS.md").read_text().partition("## Attacks")[2]
    commands = re.findall(r"\| \d[\d,]* \| \d+ \| `(\w+)` \|", table)
    assert commands and not [command for command in commands if command not in names]


if __name__ == "__main__":
    nbformat.write(run_tour(), TOUR)
