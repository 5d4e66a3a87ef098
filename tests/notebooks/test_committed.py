"""The notebooks as they lie in the repository: what a reader on the web sees."""

import re
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "notebooks"
# in the order in which they are read, and the one beside them
NAMES = re.search(r"^NOTEBOOKS := (.*)$", (ROOT / "Makefile").read_text(), re.M)
NAMES = [*NAMES[1].split(), "your_own_data"]


@pytest.fixture(params=NAMES)
def path(request):
    return FOLDER / f"{request.param}.ipynb"


@pytest.fixture
def content(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code(content):
    return [c for c in content.cells if c.cell_type == "code" and c.source.strip()]


def printed(content) -> str:
    """All text of the outputs."""
    parts = []
    for output in (output for cell in code(content) for output in cell.outputs):
        assert output.output_type != "error"
        parts.append(str(output.get("text", "")))
        data = output.get("data", {})
        parts += [str(v) for k, v in data.items() if k.startswith("text/")]
    return "\n".join(parts)


def test_it_was_executed_from_top_to_bottom_without_an_error_or_a_warning(content):
    counts = [c.execution_count for c in code(content)]
    assert counts == list(range(1, len(counts) + 1))
    text = printed(content)
    assert "Warning" not in text and "Traceback" not in text
    path = re.search(r"(?<![\w.:/])/(?:home|root|work|tmp|Users|usr|opt)/\S*", text)
    assert path is None, path


def test_it_has_one_parameters_cell_with_a_comment_on_every_value(content):
    cells = [c for c in content.cells if "parameters" in c.metadata.get("tags", [])]
    assert len(cells) == 1
    values = [line for line in cells[0].source.splitlines() if "=" in line]
    assert values and all("  # " in line for line in values)


def test_its_cells_are_short_and_hide_no_failure(path, content):
    assert path.stat().st_size < 1.5 * 2**20  # small enough to read on the web
    for cell in code(content):
        lines = cell.source.splitlines()
        assert len(lines) <= 18, cell.source
        assert not any(line.lstrip().startswith("!") for line in lines)


def test_it_tells_what_comes_next_and_its_links_lead_somewhere(path, content):
    text = "\n".join(c.source for c in content.cells if c.cell_type == "markdown")
    links = re.findall(r"\]\(((?!http)[^)#]+)\)", text)
    assert links
    for link in links:
        assert (FOLDER / link).exists(), f"{path.name} links to {link}"


def test_no_notebook_is_missing_or_too_many():
    assert sorted(p.stem for p in FOLDER.glob("*.ipynb")) == NAMES
