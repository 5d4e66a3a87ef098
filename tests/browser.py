"""Headless Chromium for the tests that open a page; they are skipped without one."""

import contextlib
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ELSEWHERE = re.compile(r"^https?://(?!(127\.0\.0\.1|localhost)[:/])")


@pytest.fixture(scope="module")
def browser():
    """Chromium of this machine, driven by Playwright, which brings none of its own."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("no Chromium here (on Debian: apt install chromium)")
    with playwright.sync_playwright() as driver:
        with driver.chromium.launch(executable_path=path) as browser:
            yield browser


@pytest.fixture
def page(browser):
    """An empty page. `page.complaints` are errors of its console and lost requests;

    a request to another host than this one is refused and counts as well.
    """
    size = {"width": 1280, "height": 900}
    with browser.new_context(viewport=size, color_scheme="light") as context:
        context.set_default_timeout(120_000)  # ms; other tests share the cores
        page = context.new_page()
        page.complaints = []

        def complain(text: str) -> None:
            page.complaints.append(text)

        page.on(
            "console",
            lambda m: m.type == "error" and complain(f"{m.location['url']}: {m.text}"),
        )
        page.on("pageerror", lambda error: complain(str(error)))
        page.on("requestfailed", lambda r: complain(f"{r.url}: {r.failure}"))
        page.route(ELSEWHERE, lambda route: route.abort())
        yield page


@contextlib.contextmanager
def serving(command: list, pattern: str, log: Path, **options) -> Iterator[str]:
    """A server's address, once its output has it; the server ends with its children.

    Args:
        command: starts the server.
        pattern: of the address in what it prints.
        log: file to put the output into.
        options: of subprocess.Popen.
    """
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, **options)
    try:
        for _ in range(600):
            found = re.search(pattern, log.read_text())
            if found or process.poll() is not None:
                break
            time.sleep(0.2)
        assert found, log.read_text()
        yield found[0]
    finally:
        family = psutil.Process(process.pid).children(recursive=True)
        for child in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.terminate()
        for child in psutil.wait_procs(family, 20)[1]:
            child.kill()
        process.terminate()
        process.wait(20)
