"""A browser for tests of pages. A test is skipped where playwright or Chromium is missing."""

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
_ARGS = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]


@contextlib.contextmanager
def open_browser() -> Iterator[Any]:
    """A running Chromium; skips the test if there is none. Starting it takes a second: make it a module's fixture."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on the PATH")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=_ARGS)
        yield browser
        browser.close()


@contextlib.contextmanager
def browser_page(browser: Any, allowed: tuple[str, ...] = (), **options: Any) -> Iterator[Any]:
    """A page in a context of its own, as another person's browser; it must end without an error.

    Args:
      browser: of `open_browser`.
      allowed: parts of console errors that the test provokes, such as "status of 409".
      options: of the context, such as locale or viewport.
    """
    context = browser.new_context(**{"locale": "en-US", **options})
    # On a busy machine a first answer waits for programs that are compiled.
    context.set_default_timeout(60_000)
    page = context.new_page()
    errors = watch(page, allowed)
    yield page
    context.close()
    assert not errors, errors


def watch(page: Any, allowed: tuple[str, ...] = ()) -> list[str]:
    """A list that grows with the errors of a page; for a second tab of one context (`page.context.new_page()`)."""
    errors: list[str] = []

    def note(text: str) -> None:
        if not any(part in text for part in allowed):
            errors.append(text)

    page.on("pageerror", lambda error: note(f"{error}"))
    page.on("console", lambda line: note(line.text) if line.type == "error" else None)
    return errors
