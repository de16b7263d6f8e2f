"""A real browser for the tests of the viewer: headless Chromium, driven by playwright.

A folder's `conftest.py` takes the fixture with `from browsers import browser as browser`. Tests are skipped, with the
reason, where there is no Chromium or no playwright. With ATCACHE_TEST_NEEDS_BROWSER=1, as `.ci/run` sets it, they fail
there.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# None of these may keep a test waiting for a network: there may be none.
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]


def find_browser() -> str | None:
    """Where Chromium is: Debian's, Google's, or the one that `playwright install chromium` fetched. None if nowhere.

    ATCACHE_TEST_BROWSER names another one.
    """
    if named := os.environ.get("ATCACHE_TEST_BROWSER"):
        return named
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        if found := shutil.which(name):
            return found
    fetched = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH", Path.home() / ".cache" / "ms-playwright"))
    return next(map(str, sorted(fetched.glob("chromium-*/chrome-linux*/chrome"), reverse=True)), None)


def leave_out(reason: str) -> NoReturn:
    """Skip the test that asks; fail it where a browser must be, so that no run is green because none was there."""
    if os.environ.get("ATCACHE_TEST_NEEDS_BROWSER") == "1":
        pytest.fail(f"{reason}; ATCACHE_TEST_NEEDS_BROWSER=1 lets no test be skipped for it", pytrace=False)
    pytest.skip(reason)


def wanted_module(name: str, package: str) -> ModuleType:
    """A module that drives or examines a browser; without it, the test is left out."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        leave_out(f"needs {package}: pip install {package}")


def wanted_axe() -> ModuleType:
    """axe, which finds what a screen reader cannot use in a page."""
    return wanted_module("axe_playwright_python.sync_playwright", "axe-playwright-python")


# One for each file that takes it, not for the session: while it is there, the main thread has a running event loop,
# which other tests may not expect; and two at once, of two folders, break each other.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One headless Chromium. A test opens pages of its own: `page = browser.new_page()`; `page.close()`."""
    api = wanted_module("playwright.sync_api", "playwright")
    executable = find_browser()
    if executable is None:
        leave_out("needs a browser: apt-get install chromium, or ATCACHE_TEST_BROWSER=/path/to/chromium")
    # Ubuntu's package is a script that says to install a snap.
    if subprocess.run([executable, "--version"], capture_output=True, timeout=60).returncode:
        leave_out(f"needs a browser: {executable} does not start")
    with api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        yield started
        started.close()
