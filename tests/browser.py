"""Headless Chromium for the tests that open a page; they are skipped without one."""

import shutil

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


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
    """An empty page; `complaints` of it are errors of its console and lost requests.

    A request to another host than this one is a complaint, too.
    """
    with browser.new_context(
        viewport={"width": 1280, "height": 900}, color_scheme="light"
    ) as context:
        page = context.new_page()
        page.complaints = []
        page.on("console", lambda m: m.type == "error" and complain(m.text))
        page.on("pageerror", lambda error: complain(str(error)))
        page.on("requestfailed", lambda r: complain(f"{r.url}: {r.failure}"))

        def complain(text: str) -> None:
            page.complaints.append(text)

        def local(route) -> None:
            complain(f"asks another host: {route.request.url}")
            route.abort()

        page.route(lambda url: not url.startswith(LOCAL), local)
        yield page


LOCAL = ("http://127.0.0.1:", "http://localhost:", "data:", "blob:", "about:")
