"""The browser that tests of pages share."""

import os
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Run chromium; continuous integration must have one (REQUIRE_BROWSER)."""
    program = shutil.which("chromium")
    if program is None:
        if os.environ.get("REQUIRE_BROWSER"):
            pytest.fail("chromium is not on this machine")
        pytest.skip("a browser (Debian's package chromium) is not on this machine")
    with sync_playwright() as playwright:
        # Its own sandbox does not work for root, as which continuous integration runs; a container's /dev/shm is small.
        started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield started
        started.close()
