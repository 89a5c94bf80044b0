"""What the browser tests share: a headless Chromium, how patient it is, the sizes of its windows."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, Page, expect, sync_playwright

ARGS = (
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync",
)
PATIENCE_MS = 120_000  # a busy machine of two cores
PHONE = {"width": 390, "height": 844}
DESKTOP = {"width": 1440, "height": 900}

expect.set_options(timeout=PATIENCE_MS)


@contextmanager
def chromium() -> Iterator[Browser]:
    """The browser; it must be installed, or the tests fail."""
    command = shutil.which("chromium")
    assert command, "the browser tests need the command chromium; install it (Debian: apt-get install chromium)"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=command, args=ARGS)
        yield browser
        browser.close()


@contextmanager
def desktop_page(browser: Browser, url: str) -> Iterator[Page]:
    """One visitor on a desktop; anything that the page's scripts complain about fails the test that met it."""
    page = browser.new_page(viewport=DESKTOP, accept_downloads=True)
    page.set_default_timeout(PATIENCE_MS)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url)
    yield page
    page.close()
    assert not errors
