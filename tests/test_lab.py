"""`make lab`, as a reader meets it: JupyterLab in a browser, notebooks 1 and 2 run."""

import os
import shutil
import sys
import time
from pathlib import Path
from urllib.parse import parse_qs, urljoin, urlparse

import nbformat
import pytest
import requests
from browser import browser, page, serving  # noqa: F401
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow

# Every count that a progress bar shows, also of bars that go away when they are full.
WATCH = """() => {
  window.counts = new Set();
  const look = () => document.querySelectorAll('.jp-OutputArea-output').forEach(
    e => (e.innerText.match(/\\d+\\/\\d+\\s\\[/g) || []).forEach(c => counts.add(c)));
  new MutationObserver(look).observe(document.body,
    {subtree: true, childList: true, characterData: true});
}"""
FAILED = '[data-mime-type="application/vnd.jupyter.error"]'
SHOWN = ".jp-NotebookPanel:not(.lm-mod-hidden)"
DONE = f"""cells => document.querySelector('{FAILED}') || cells ===
  [...document.querySelectorAll('{SHOWN} .jp-InputPrompt')]
    .filter(p => /\\[\\d+\\]/.test(p.innerText)).length"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What `make lab` needs; the notebooks without outputs, on three drawn scenes."""
    root = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / ".ci", root / ".ci")
    shutil.copy(ROOT / "Makefile", root)
    shutil.copytree(ROOT / "notebooks" / "images", root / "notebooks" / "images")
    for name, values in (("01_install", {}), ("02_data_prep", {"scenes": 3})):
        content = load_notebook_node(str(ROOT / "notebooks" / f"{name}.ipynb"))
        content = parameterize_notebook(
            content, {"run_dir": str(root / "run"), **values}
        )
        for cell in content.cells:
            if cell.cell_type == "code":
                cell.update(outputs=[], execution_count=None)
        nbformat.write(content, root / "notebooks" / f"{name}.ipynb")
    return root


@pytest.fixture(scope="module")
def address(folder):
    """The address with its token, as the server prints it."""
    command = ["make", "-o", ".venv/installed", "lab", "LAB=--no-browser --port=0"]
    command += [f"BIN={Path(sys.executable).parent}", f"PYTHON={sys.executable}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(folder)}
    pattern = r"http://127\.0\.0\.1:\d+/\S+token=\w+"
    log = folder / "log"
    with serving(command, pattern, log, cwd=folder, env=environment) as address:
        yield address


def code_cells(folder: Path, name: str) -> int:
    content = nbformat.read(folder / "notebooks" / f"{name}.ipynb", as_version=4)
    return sum(cell.cell_type == "code" for cell in content.cells)


def complaints(page) -> list[str]:  # noqa: F811
    """Without what JupyterLab does of itself: a question for language servers, and a
    text's picture before its address has become that of the file."""
    own = ("/lsp/status", "/lab/tree/images/")
    return [text for text in page.complaints if not any(part in text for part in own)]


def wait_for_kernel(page, address: str, name: str) -> None:  # noqa: F811
    """Until the page talks to the notebook's kernel; before, "Run All" runs nothing.

    The page alone does not tell: it says "idle" also before it has looked for one, and
    the notebook of the last visit, which is opened again, has a kernel of its own.
    """
    token = parse_qs(urlparse(address).query)["token"][0]
    for _ in range(240):
        answer = requests.get(
            urljoin(address, "/api/sessions"), params={"token": token}, timeout=60
        )
        kernels = [s["kernel"] for s in answer.json() if s["path"].startswith(name)]
        if any(kernel["connections"] for kernel in kernels):
            break
        time.sleep(0.5)
    else:
        raise AssertionError(f"no kernel for {name}: {answer.text}")
    idle = ".jp-Notebook-ExecutionIndicator[data-status=idle]"
    page.locator(f"{SHOWN} {idle}").wait_for()


def run_all(page, address: str, name: str, cells: int) -> list[str]:  # noqa: F811
    """Run the notebook on show to its end; the counts that its bars went through."""
    wait_for_kernel(page, address, name)
    page.evaluate(WATCH)
    page.locator(".lm-MenuBar-item").get_by_text("Run", exact=True).click()
    page.locator(".lm-Menu-item").get_by_text("Run All Cells", exact=True).click()
    page.wait_for_function(DONE, arg=cells, timeout=240_000)
    assert page.locator(FAILED).all_inner_texts() == []
    return page.evaluate("[...counts]")


def test_it_opens_on_the_first_notebook_with_its_headings_and_keeps_its_token(
    folder,
    address,
    page,  # noqa: F811
):
    refused = requests.get(urljoin(address, "/api/contents"), timeout=20)
    assert refused.status_code == 403
    page.set_viewport_size({"width": 1280, "height": 9_000})  # nothing out of sight
    page.goto(address)
    headings = page.locator(".jp-TableOfContents-content")
    headings.get_by_text("A smoke test of the libraries").wait_for(timeout=120_000)
    assert (
        "01_install.ipynb"
        in page.locator(".lm-mod-current.jp-mod-current").inner_text()
    )
    counts = run_all(page, address, "01_install", code_cells(folder, "01_install"))
    assert len(counts) > 3, counts
    assert "skipped, none failed" in page.locator(".jp-Notebook").inner_text()
    assert complaints(page) == []


def test_notebook_2_runs_to_its_end_with_bars_that_move_and_pictures(
    folder,
    address,
    page,  # noqa: F811
):
    page.set_viewport_size({"width": 1280, "height": 30_000})
    page.goto(address.replace("01_install", "02_data_prep"))
    page.locator(".lm-mod-current").get_by_text("02_data_prep.ipynb").wait_for()
    counts = run_all(page, address, "02_data_prep", code_cells(folder, "02_data_prep"))
    assert len(counts) > 3, counts
    images = page.locator(f"{SHOWN} .jp-OutputArea img")
    drawn = images.evaluate_all("images => images.map(i => i.naturalWidth)")
    assert len(drawn) > 5 and min(drawn) > 200
    assert complaints(page) == []
