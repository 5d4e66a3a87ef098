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

from pages import arrange, links_of  # noqa: E402
from sources import DeadLink  # noqa: E402

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
        wider = "t => t.offsetWidth > t.parentElement.clientWidth"
        tables = f"[...document.querySelectorAll('.table-wrapper')].filter({wider})"
        assert page.evaluate(f"{tables}.length") == 0, seen[-1]
        following = page.locator("a.next-page")
        if not following.count():
            break
        following.click()
        page.wait_for_load_state()
    # a page that is left at once takes its icon's request with it
    left = "favicon.svg: net::ERR_ABORTED"
    assert [text for text in page.complaints if not text.endswith(left)] == []
    assert len(set(seen)) == len(seen) > 60
    files = [*ROOT.glob("notebooks/*.ipynb"), ROOT / "kserve_utils" / "FAULTS.md"]
    pages = {f"/{f.relative_to(ROOT).with_suffix('.html')}" for f in files}
    pages |= {"/api/e2e_utils.boxes.html", "/benchmarks/prep.html", "/CHANGELOG.html"}
    assert pages <= set(seen)


IN_VIEW = """selector => {
    const top = document.querySelector(selector)?.getBoundingClientRect().top;
    return 0 < top && top < innerHeight;
}"""


def test_a_word_is_found_by_the_search(site, page):  # noqa: F811
    page.goto(f"{site}/index.html")
    page.locator(".sidebar-search").fill("papermill")
    page.keyboard.press("Enter")
    results = page.locator("ul.search li a")
    results.first.wait_for()
    assert "1. Install, and know what you have" in results.all_inner_texts()
    page.wait_for_load_state("networkidle")  # it fetches what it quotes
    page.goto(f"{site}/search.html?q=16+bits")
    results.first.wait_for()
    assert "FAQ.html#my-scenes-have-16-bits" in results.first.get_attribute("href")
    page.wait_for_load_state("networkidle")
    page.goto(f"{site}/search.html?q=300")
    page.locator("ul.search li a", has_text="2. Data preparation").wait_for()
    page.wait_for_load_state("networkidle")
    page.goto(f"{site}/search.html?q=NMS")
    page.locator("ul.search li a", has_text="3. Training").first.wait_for()
    page.wait_for_load_state("networkidle")
    page.locator("ul.search li a", has_text="3. Training").first.click()
    page.wait_for_function(IN_VIEW, arg="article .highlighted")
    page.goto(f"{site}/api/kserve_utils.servers.html")
    page.wait_for_function(IN_VIEW, arg=".sidebar-tree .current-page")
    assert page.complaints == []


def test_a_page_of_helpers_begins_with_what_it_has_and_with_the_import(folder):
    text = (folder / "api" / "e2e_utils.tiling.html").read_text()
    article = text[text.index("<article") :]
    entry = article.index('id="e2e_utils.tiling.slice_coco"')
    assert 0 < article.index('href="#e2e_utils.tiling.slice_coco"') < entry
    assert 0 < article.index("Its examples begin with") < entry
    assert ">tile_set</a>" in text and ">Ray: train.py</a>" in text  # at the left


def test_contents_over_the_page_go_when_one_is_chosen(site, page):  # noqa: F811
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(f"{site}/notebooks/02_data_prep.html")
    page.locator("label.toc-header-icon, label.toc-overlay-icon").locator(
        "visible=true"
    ).first.click()
    assert page.locator("#__toc").is_checked()
    page.locator(".toc-drawer a[href='#get-the-data']").click()
    page.wait_for_function("!document.getElementById('__toc').checked")


def test_contents_stand_in_the_text_or_beside_it(site, page):  # noqa: F811
    listed = page.locator("article a[href='#get-the-data']").first
    for width, shown in ((1280, True), (1440, False)):
        page.set_viewport_size({"width": width, "height": 900})
        page.goto(f"{site}/notebooks/02_data_prep.html")
        assert listed.is_visible() == shown
        assert page.locator("#get-the-data").is_visible()


def test_flags_types_and_names_are_shown_as_they_are_written(folder):
    for file in folder.rglob("*.html"):
        found = re.search(r"–\w|&lt;factory|list\[~", file.read_text())
        assert not found, f"{file.name}: {found[0]}"
    text = (folder / "api" / "e2e_utils.tiling.html").read_text()
    assert "<h1>e2e_<wbr>utils.<wbr>tiling<" in text  # where a phone may break it
    assert "</strong> – " in text


def test_examples_are_shown_as_they_run(folder):
    pages = {file.name: file.read_text() for file in folder.glob("api/*.html")}
    code = {n: re.findall(r"<pre>.*?</pre>", text, re.S) for n, text in pages.items()}
    assert sum(len(blocks) for blocks in code.values()) > 100
    assert [n for n, blocks in code.items() if r"\*" in "".join(blocks)] == []


def test_a_helper_that_a_docstring_names_is_a_link_and_an_argument_is_none(folder):
    text = (folder / "api" / "e2e_utils.sliced.html").read_text()
    predict = "e2e_utils.predict.html#e2e_utils.predict.predict_scene"
    assert f'href="{predict}"' in text and ">predict.predict_scene<" in text
    assert 'href="#e2e_utils.sliced.merge_tables"' in text  # `merge_tables` alone
    text = (folder / "api" / "e2e_utils.predict.html").read_text()
    assert ">class_names</span></code>" in text and "classes.class_names" not in text


def test_the_sidebar_groups_pages_and_a_page_is_called_as_there(folder):
    text = (folder / "index.html").read_text()
    tree = text[text.index('class="sidebar-tree"') : text.index('class="main"')]
    captions = re.findall(r'class="caption-text">([^<]+)<', tree)
    groups = ["Notebooks", "Guide", "Helpers", "Serving", "Programs", "Project"]
    assert captions == groups
    entries = re.findall(r'toctree-l1[^>]*><a [^>]*href="([^"]+)">([^<]+)</a>', tree)
    assert len(entries) > 20
    for page_name, entry in entries:
        title = re.search(r"<h1>(.*?)<a ", (folder / page_name).read_text(), re.S)[1]
        assert re.sub(r"<[^>]*>", "", title) == entry


def test_files_have_a_link_back_and_scripts_that_are_named_a_link(folder):
    text = (folder / "files" / "k8s_files" / "xview-predictor.yaml.html").read_text()
    assert re.search(r'Linked from .*href="../../notebooks/[^"]+\.html"', text)
    text = (folder / "benchmarks" / "README.html").read_text()
    assert re.search(r'href="prep.html"><span [^>]*><code [^>]*>.*prep.py', text)


def test_the_first_page_has_an_icon_a_description_and_pictures_to_enlarge(folder):
    text = (folder / "index.html").read_text()
    assert re.search(r'<link rel="[^"]*icon" href="_static/favicon.svg[^"]*"', text)
    assert re.search(r'<meta content="Notebooks that [^"]+" name="description"', text)
    assert re.search(r'<a [^>]*href="_images/scene.jpg"><img', text)


def test_a_page_turns_dark_stays_so_and_code_is_copied(site, page):  # noqa: F811
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    colour = (
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    )
    page.goto(f"{site}/notebooks/02_data_prep.html")
    assert min(page.evaluate(colour)) > 200
    page.locator(".theme-toggle-content button").click()
    assert max(page.evaluate(colour)) < 60
    underlined = "getComputedStyle(document.querySelector('.nn')).textDecorationLine"
    assert page.evaluate(underlined) == "none"  # it is no link
    diagrams = "[...document.querySelectorAll('img[src*=\".svg\"]')]"
    shown = f"{diagrams}.filter(i => i.offsetWidth).map(i => i.src.split('.').at(-2))"
    assert set(page.evaluate(shown)) == {"dark"}
    page.goto(f"{site}/index.html")
    assert max(page.evaluate(colour)) < 60
    page.locator("button.copybtn").first.click()
    assert page.evaluate("navigator.clipboard.readText()").startswith("make demo")
    assert page.complaints == []


def test_pages_are_edited_and_opened_where_the_repository_is_named(folder):
    head = (folder / "notebooks" / "02_data_prep.html").read_text()
    links = dict(
        re.findall(r'<a class="page-link[^"]*" href="([^"]+)"[^>]*>(\w+)</a>', head)
    )
    assert sorted(links.values()) == ["Binder", "Colab", "Download", "Edit"]
    assert links.pop("02_data_prep.ipynb") == "Download"
    for url in links:
        assert "OWNER/NAME" in url and url.endswith("notebooks/02_data_prep.ipynb")
    first = (folder / "index.html").read_text()
    assert f'href="{REPOSITORY}/edit/main/README.md"' in first
    assert f'href="{REPOSITORY}">the repository</a>' in first
    assert links_of("README.md", "") == links_of(None, REPOSITORY) == {}
    assert links_of("a/b.ipynb", "") == {"Download": "b.ipynb"}
    assert list(links_of("a/b.ipynb", "https://x.org/x")) == ["Download", "Edit"]
    copy = (folder / "notebooks" / "02_data_prep.ipynb").read_bytes()
    assert copy == (ROOT / "notebooks" / "02_data_prep.ipynb").read_bytes()


def test_indices_tell_of_every_module_and_benchmark_in_one_sentence(tmp_path):
    arrange(ROOT, tmp_path)
    api, benchmarks = (
        (tmp_path / name / "index.md").read_text() for name in ("api", "benchmarks")
    )
    rows = re.findall(r"^- \[.*", api + benchmarks, re.M)
    assert len(rows) > 60 and [row for row in rows if row[-1] != "."] == []
    assert api.count("\n### ") == 10 and "Others" not in api  # none without a stage
    gpu = (tmp_path / "benchmarks" / "on_gpu.md").read_text()
    assert gpu.count("What a GPU makes") == 1 and "](README.md)" in gpu
    assert "as web pages" not in (tmp_path / "index.md").read_text()


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
