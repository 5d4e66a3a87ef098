"""The site of `make site`, read in a browser from its first page to its last."""

import json
import re
import sys
import threading
from functools import partial
from html import unescape
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import pytest
from browser import browser, page  # noqa: F401
from commands import run

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

from pages import DeadLink, arrange, links_of  # noqa: E402

REPOSITORY = "https://github.com/OWNER/NAME"
pytestmark = pytest.mark.slow


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("sphinx")
    root = tmp_path_factory.mktemp("site")
    (root / "source").mkdir()
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going"]
    command += ["-c", ROOT / "docs", "-d", root / "doctrees", root / "source"]
    done = run(*command, root / "html", env={"SITE_REPOSITORY": REPOSITORY})
    assert done.returncode == 0, done.stderr
    return root / "html"


@pytest.fixture(scope="module")
def site(folder):
    handler = partial(Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_pictures_of_notebooks_have_their_alternative_texts(folder):
    text = (folder / "notebooks" / "02_data_prep.html").read_text()
    pictures = re.findall(r"<img [^>]*_images[^>]*>", text)
    assert len(pictures) > 5
    assert all(re.search(r'alt="[^"]{9,}"', one) for one in pictures)


def test_no_link_of_the_site_is_dead(folder):
    texts = {f: f.read_text() for f in folder.rglob("*.html")}
    ids = {f: set(re.findall(r'\bid="([^"]*)"', text)) for f, text in texts.items()}
    dead, found = [], 0
    for file, text in texts.items():
        for target in re.findall(r'\b(?:href|src)="([^"]*)"', text):
            url, anchor = urldefrag(urljoin(file.as_uri(), unescape(target)))
            if not url.startswith("file:"):
                continue
            path = Path(unquote(urlsplit(url).path))
            found += 1
            if not path.is_file() or anchor not in ids.get(path, {anchor}) | {""}:
                dead.append(f"{file.relative_to(folder)}: {target}")
    assert found > 5_000 and dead == []


def test_every_page_from_the_first_to_the_last_fits_a_phone(site, page):  # noqa: F811
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(f"{site}/index.html")
    seen = []
    while True:
        seen.append(page.url.removeprefix(site))
        missing = "[...document.images].filter(i => !i.naturalWidth).map(i => i.src)"
        assert page.evaluate(missing) == [], seen[-1]
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, seen[-1]
        following = page.locator("a.next-page")
        if not following.count():
            break
        following.click()
        page.wait_for_load_state()
    assert page.complaints == []
    assert len(set(seen)) == len(seen) > 60
    files = [*ROOT.glob("notebooks/*.ipynb"), ROOT / "kserve_utils" / "FAULTS.md"]
    pages = {f"/{f.relative_to(ROOT).with_suffix('.html')}" for f in files}
    pages |= {"/api/e2e_utils.boxes.html", "/benchmarks/prep.html", "/CHANGELOG.html"}
    assert pages <= set(seen)


def test_a_word_is_found_by_the_search(site, page):  # noqa: F811
    page.goto(f"{site}/index.html")
    page.locator(".sidebar-search").fill("papermill")
    page.keyboard.press("Enter")
    results = page.locator("ul.search li a")
    results.first.wait_for()
    assert "1. Install, and know what you have" in results.all_inner_texts()
    assert page.complaints == []


def test_a_page_turns_dark_stays_so_and_code_is_copied(site, page):  # noqa: F811
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    colour = (
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    )
    page.goto(f"{site}/notebooks/02_data_prep.html")
    assert min(page.evaluate(colour)) > 200
    page.locator(".theme-toggle-content button").click()
    assert max(page.evaluate(colour)) < 60
    page.goto(f"{site}/index.html")
    assert max(page.evaluate(colour)) < 60
    page.locator("button.copybtn").first.click()
    assert page.evaluate("navigator.clipboard.readText()").startswith("make demo")
    assert page.complaints == []


def test_pages_are_edited_and_opened_where_the_repository_is_named(folder):
    head = (folder / "notebooks" / "02_data_prep.html").read_text()
    links = dict(
        re.findall(r'<a class="page-link[^"]*" href="([^"]+)">(\w+)</a>', head)
    )
    assert sorted(links.values()) == ["Binder", "Colab", "Edit"]
    for url in links:
        assert "OWNER/NAME" in url and url.endswith("notebooks/02_data_prep.ipynb")
    first = (folder / "index.html").read_text()
    assert f'href="{REPOSITORY}/edit/main/README.md"' in first
    assert links_of("README.md", "") == links_of(None, REPOSITORY) == {}
    assert list(links_of("a/b.ipynb", "https://example.com/x")) == ["Edit"]


@pytest.fixture
def small(tmp_path):
    """A repository of a README, a notebook, and files that they may link to."""
    for name in ("notebooks", "benchmarks", "k8s", "e2e_utils"):
        (tmp_path / name).mkdir()
    (tmp_path / "k8s" / "service.yaml").write_text("kind: Service\n")
    (tmp_path / "README.md").write_text("# Title\n\n[1](notebooks/1.ipynb)\n")
    return tmp_path


def write_notebook(root: Path, text: str) -> None:
    cell = {"cell_type": "markdown", "source": [text]}
    (root / "notebooks" / "1.ipynb").write_text(json.dumps({"cells": [cell]}))


def test_an_anchor_of_jupyterlab_is_found_on_the_site(small):
    write_notebook(small, "# One\n[a](#Right,-false,-missed) [b](../README.md#A-B)")
    arrange(small, small / "out")
    notebook = (small / "out" / "notebooks" / "1.ipynb").read_text()
    assert "(#right-false-missed)" in notebook and "index.md#a-b)" in notebook


def test_a_file_or_folder_that_a_notebook_links_to_becomes_a_page(small):
    write_notebook(
        small, "# One\n[a](../k8s/service.yaml) [b](../k8s) [c](../README.md)"
    )
    arrange(small, small / "out")
    notebook = (small / "out" / "notebooks" / "1.ipynb").read_text()
    for page_name in ("../files/k8s/service.yaml.md", "../files/k8s.md", "../index.md"):  # noqa: F811
        assert f"]({page_name})" in notebook
        assert (small / "out" / "notebooks" / page_name).resolve().is_file()
    quoted = (small / "out" / "files" / "k8s" / "service.yaml.md").read_text()
    assert "kind: Service" in quoted


def test_a_link_to_nothing_is_named(small):
    write_notebook(small, "# One\n[a](../k8s/gone.yaml)")
    with pytest.raises(DeadLink, match="notebooks/1.ipynb links to ../k8s/gone.yaml"):
        arrange(small, small / "out")
