"""A real browser for tests of pages: chromium of the machine, and windows in which nothing may go wrong."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from typing import Any

from playwright.sync_api import Browser, Page

from tests.services import Service

#: axe-core, which finds what is not accessible; run it in a page by `axe.run`.
AXE = (resources.files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8")
_PATIENCE_MS = 90_000


@contextmanager
def window(browser: Browser, service: Service, **options: Any) -> Iterator[Page]:
    """Open a window; an error that it logs, such as a breach of the policy, or a request elsewhere fails the test."""
    context = browser.new_context(base_url=service.url, **options)
    opened = context.new_page()
    opened.set_default_timeout(_PATIENCE_MS)
    errors: list[str] = []
    # A refusal that a page shows is among them too.
    opened.on(
        "console",
        lambda message: (
            errors.append(message.text) if message.type == "error" and "status of 4" not in message.text else None
        ),
    )
    opened.on("pageerror", lambda error: errors.append(str(error)))
    own = (f"{service.url}/", "data:", "blob:", "about:")
    opened.on("request", lambda sent: None if sent.url.startswith(own) else errors.append(f"a request to {sent.url}"))
    yield opened
    context.close()
    assert errors == []
