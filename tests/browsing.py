"""A real browser for tests of pages: Chromium, where it and playwright are installed; else these tests are skipped."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
HERE = ("file:", "data:", "blob:", "http://127.0.0.1")  # what a page may ask for
Open = Callable[..., AbstractContextManager[Any]]


@pytest.fixture(scope="module")
def browse() -> Iterator[Open]:
    """`with browse(path) as page` opens a file or an address; see `opened`.

    Of a module, not of the session: while playwright runs, its event loop is the thread's, and no other may start.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    found = next((place for name in NAMES if (place := shutil.which(name))), None)
    if found is None:
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield lambda path, **how: opened(browser, path, **how)
        browser.close()


@contextmanager
def opened(
    browser: Any,
    path: str | Path,
    *,
    dark: bool = False,
    width: int = 1200,
    height: int = 900,
    asked: list[str] | None = None,
    **options: Any,
) -> Iterator[Any]:
    """A page in a window of this size; fails at the end on console errors, exceptions, and what was asked of a network.

    `asked` is filled with the address of everything the page reads.
    `options` are those of playwright's `new_context`, such as `java_script_enabled=False`.
    """
    address = path if isinstance(path, str) else path.absolute().as_uri()
    scheme = "dark" if dark else "light"
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, **options)
    wrong: list[str] = []
    try:
        page = context.new_page()
        page.set_default_timeout(20_000)  # these cores are shared
        page.on("console", lambda said: wrong.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("requestfailed", lambda asked: wrong.append(f"failed: {asked.url}"))
        page.on("request", lambda request: [] if asked is None else asked.append(request.url))
        page.on("request", lambda asked: None if asked.url.startswith(HERE) else wrong.append(f"asked: {asked.url}"))
        page.goto(address)
        yield page
        assert not wrong, "; ".join(wrong)
    finally:
        context.close()
