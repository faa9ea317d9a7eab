"""The documents hold what they promise: their code runs, and what they name exists."""

import re
from pathlib import Path

import pytest
import torch
from conftest import make_guard, user

import checkpoint
from chat import moderate_turn

ROOT = Path(__file__).parents[1]
DOCUMENTS = [str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *ROOT.glob("[dg]*/**/*.md"))]


def test_the_tour_prints_what_it_says(capsys):
    """Kills: a block that no longer runs, and a shape or number in the tour that the code does not print."""
    tour, namespace = (ROOT / "docs/TOUR.md").read_text(), {"__name__": "tour"}
    blocks = re.findall(r"```python\n(.*?)```\n```text\n(.*?)```", tour, re.S)
    assert len(blocks) == tour.count("```python") > 0
    with torch.random.fork_rng():
        for code, text in blocks:
            exec(code, namespace)
            assert capsys.readouterr().out == text


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
        headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M) if heading else []
        slugs = [re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings]  # GitHub's
        assert not heading or heading in slugs, target


def test_the_table_of_attacks_names_tests():
    """Kills: a test that was renamed, so that the command of the table runs nothing."""
    code = "".join(path.read_text() for path in ROOT.glob("tests/*.py"))
    names = " ".join(re.findall(r"^def (test_\w+)", code, re.M))
    table = (ROOT / "docs/RESULTS.md").read_text().partition("## Attacks")[2]
    commands = re.findall(r"\| \d[\d,]* \| \d+ \| `(\w+)` \|", table)
    assert commands and not [command for command in commands if command not in names]
