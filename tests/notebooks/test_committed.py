"""The notebooks as they lie in the repository: what a reader on the web sees."""

import re
from base64 import b64decode
from pathlib import Path

import nbformat
import pytest
from refresh import digest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "notebooks"
# in the order in which they are read
NAMES = re.search(r"^NOTEBOOKS := (.*)$", (ROOT / "Makefile").read_text(), re.M)
NAMES = NAMES[1].split()
PAGES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))  # and those beside them


@pytest.fixture(params=PAGES)
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
    # highlighted code brings the style of every kind of word, tracebacks among them
    return re.sub(r"<style>.*?</style>", "", "\n".join(parts), flags=re.S)


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
        told = cell.metadata.get("tags", [])
        assert len(lines) <= 15 or "parameters" in told, cell.source
        assert not any(line.lstrip().startswith("!") for line in lines)


def test_it_was_executed_as_it_stands(content):
    """Its outputs are of this code; a run of the tests compares what is marked."""
    assert content.metadata.get("executed") == digest(content)


def test_it_tells_what_comes_next_and_its_links_lead_somewhere(path, content):
    text = "\n".join(c.source for c in content.cells if c.cell_type == "markdown")
    links = re.findall(r"\]\(((?!http)[^)#]+)\)", text)
    assert links
    for link in links:
        assert (FOLDER / link).exists(), f"{path.name} links to {link}"


def test_its_contents_name_its_sections_and_every_picture_says_what_it_shows(content):
    text = "\n".join(c.source for c in content.cells if c.cell_type == "markdown")
    if "notebook_style" in str(content.cells):
        for output in (output for cell in code(content) for output in cell.outputs):
            told = output.get("metadata", {})
            pictures = [k for k in output.get("data", {}) if k.startswith("image/")]
            assert all(told.get(kind, {}).get("alt") for kind in pictures)
    assert "![](" not in text
    sections = re.findall(r"^## (.+)$", text, re.M)
    contents = re.findall(r"^- \[(.+)\]\(#(\S+)\)$", text, re.M)
    if contents:
        assert contents == [(name, name.replace(" ", "-")) for name in sections]


def test_no_notebook_is_missing_and_the_others_are_linked_from_one_of_the_five():
    numbered = [name for name in PAGES if name[0].isdigit()]
    assert numbered == NAMES
    text = "".join((FOLDER / f"{name}.ipynb").read_text() for name in NAMES)
    for name in set(PAGES) - set(NAMES):
        assert f"({name}.ipynb)" in text


def test_the_pictures_of_readme_with_real_trees_are_outputs_of_their_notebook():
    notebook = nbformat.read(FOLDER / "your_own_data.ipynb", as_version=4)
    data = [o.get("data", {}) for cell in code(notebook) for o in cell.outputs]
    pictures = [b64decode(d["image/jpeg"]) for d in data if "image/jpeg" in d]
    for name in ("crowns_home.jpg", "crowns.jpg"):
        assert (FOLDER / name).read_bytes() in pictures
