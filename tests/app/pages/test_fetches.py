"""Pages of fetches, with a service that fetches from a server on loopback; some in a real browser."""

import re
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import httpx
import pytest
from playwright.sync_api import Browser

from tests.app.pages.test_pages import HOSTILE, read, token_of
from tests.browsers import AXE, window
from tests.elsewhere import Elsewhere
from tests.services import until
from tests.sources import COMMIT


@pytest.fixture
def client(elsewhere: Elsewhere) -> Iterator[httpx.Client]:
    """Open a client with a session of its own."""
    with httpx.Client(base_url=elsewhere.service.url, trust_env=False, timeout=30) as opened:
        yield opened


def push(client: httpx.Client, collection: str, source: str, file: bytes = b"", **fields: str) -> httpx.Response:
    """Send the form as a browser does, with an empty part where no file was chosen."""
    data = {"csrf_token": token_of(read(client, "/push")), "name": "net", "source": source, **fields}
    return client.post(f"/push/{collection}", data=data, files={"file": ("a" if file else "", file)})


def fetch_of(client: httpx.Client, pushed: httpx.Response, *, ended: bool = True) -> dict[str, Any]:
    """Return the fetch to whose page a form has led, once it has ended or, else, brings bytes."""
    assert pushed.status_code == 303, pushed.text
    place = pushed.headers["location"]
    assert place.startswith("/fetches/")

    def state() -> dict[str, Any] | None:
        found = dict(client.get(f"/v1{place}").json())
        done = found["status"] not in ("queued", "running") if ended else found["progress"]["done"] > 0
        return found if done else None

    return until(state)


def test_a_form_has_a_file_fetched(client: httpx.Client, elsewhere: Elsewhere) -> None:
    """It leads to the fetch's page, which leads to the checkpoint, whose page says where it comes from."""
    network = elsewhere.server.files["/nets/mlp.safetensors"]
    elsewhere.server.add_repository("org/net", {"mlp.safetensors": network})
    address = "hf://org/net@v1.0/mlp.safetensors"
    fetch = fetch_of(client, push(client, "checkpoints", f"  {address} ", metadata="epoch=3"))
    assert fetch["status"] == "succeeded", fetch
    page = read(client, f"/fetches/{fetch['id']}")
    assert f'href="/checkpoints/{fetch["resource_id"]}">Go to the checkpoint' in page
    assert address in page
    assert "data-poll" not in page
    assert f'href="/fetches/{fetch["id"]}"' in read(client, "/fetches?status=succeeded&search=net&metadata=")
    assert f'href="/fetches/{fetch["id"]}"' not in read(client, "/fetches?status=failed")
    checkpoint = client.get(f"/v1/checkpoints/{fetch['resource_id']}").json()
    assert checkpoint["metadata"] == {"epoch": 3}
    page = read(client, f"/checkpoints/{checkpoint['id']}")
    (file,) = checkpoint["origin"]["files"]
    for said in (address, COMMIT, file["name"], file["etag"].replace('"', "&#34;"), file["sha256"]):
        assert said in page.partition("Where it was fetched from")[2]
    sent = elsewhere.service.post("/v1/checkpoints", {"name": "sent"}, network).json()
    assert "Where it was fetched from" not in read(client, f"/checkpoints/{sent['id']}")


@pytest.mark.slow
def test_what_a_form_may_not_ask_for(client: httpx.Client, elsewhere: Elsewhere) -> None:
    """A source that is not listed, none at all, one beside a file, and one of features are refused on a page."""
    address = elsewhere.address("mlp.safetensors")
    for collection, source, file, status, said in (
        ("checkpoints", "s3://other/net", b"", 403, "INTERPLAY_SOURCES"),
        ("checkpoints", "", b"", 422, "file"),
        ("probes", "nets/a", b"", 422, "an address begins with one of"),
        ("checkpoints", address, b"a file", 422, "give one of them"),
        ("feature-sets", address, b"a file", 422, "source"),
    ):
        refused = push(client, collection, source, file)
        assert (refused.status_code, said in refused.text) == (status, True), refused.text
    page = read(client, "/push")
    assert page.count('name="source"') == 2
    assert page.count('type="file" required') == 1


def test_a_fetch_that_fails_says_why(client: httpx.Client, elsewhere: Elsewhere) -> None:
    """Its page has the problem, and the list its title; an unknown fetch is a page too."""
    fetch = fetch_of(client, push(client, "probes", elsewhere.address("none.npz")))
    page = read(client, f"/fetches/{fetch['id']}")
    assert "404 Entry not found" in page
    assert "Go to the probe" not in page
    assert "The source has no such file" in read(client, "/fetches")
    assert "There is no fetch" in read(client, f"/fetches/{uuid4()}", status=404)
    assert "Input should be" in read(client, "/fetches?status=done", status=422)


def test_a_fetch_is_cancelled_by_a_form(client: httpx.Client, elsewhere: Elsewhere) -> None:
    """While it runs its page and the overview show it, without a script too; then it can be cancelled, once."""
    elsewhere.server.faults.bytes_per_second = 1000
    fetch = fetch_of(client, push(client, "checkpoints", elsewhere.address("mlp.safetensors")), ended=False)
    place = f"/fetches/{fetch['id']}"
    for path in (place, "/fetches", "/"):
        page = read(client, path)
        assert f'data-poll="/v1{place}"' in page
        assert re.search(r'data-live="count">\d\S* (bytes|KiB) of 9.9 KiB</span>', page)
    assert '<noscript><meta http-equiv="refresh" content="5"></noscript>' in read(client, place)
    token = token_of(read(client, place))
    assert client.post(f"{place}/cancel", data={"csrf_token": "0"}).status_code == 403
    cancelled = client.post(f"{place}/cancel", data={"csrf_token": token})
    assert (cancelled.status_code, cancelled.headers["location"]) == (303, place)
    until(lambda: client.get(f"/v1{place}").json()["status"] == "cancelled")
    page = read(client, place)
    assert 'class="status cancelled"' in page
    assert "http-equiv" not in page


def test_names_and_addresses_are_text(client: httpx.Client, elsewhere: Elsewhere) -> None:
    """Markup in a name, in an address and in what a source answers is text on every page."""
    elsewhere.server.files["/nets/<b>bold&.safetensors"] = elsewhere.server.files["/nets/mlp.safetensors"]
    ids = []
    for file in ("%3Cb%3Ebold&.safetensors", "<b>none.safetensors"):
        fetch = fetch_of(client, push(client, "checkpoints", elsewhere.address(file), name=HOSTILE))
        ids.append((fetch["id"], fetch["resource_id"]))
    assert ids[0][1] is not None
    for path in (f"/fetches/{ids[0][0]}", f"/fetches/{ids[1][0]}", "/fetches", f"/checkpoints/{ids[0][1]}"):
        page = read(client, path)
        assert "<script>alert" not in page
        assert "<b>" not in page
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
        assert "\u202e" not in page


@pytest.mark.parametrize("size", [pytest.param((360, 740), marks=pytest.mark.slow), (1280, 800)], ids=["phone", "desk"])
def test_progress_is_live_in_a_browser(browser: Browser, elsewhere: Elsewhere, size: tuple[int, int]) -> None:
    """The form leads to the fetch; bytes are counted while they come, and in the end a link leads on."""
    name = f"live {uuid4().hex}"
    # Longer than all that is looked at meanwhile takes on a busy machine.
    elsewhere.server.faults.bytes_per_second = 100
    viewport: Any = {"width": size[0], "height": size[1]}
    with window(browser, elsewhere.service, viewport=viewport) as page:
        page.goto("/push")
        form = page.get_by_role("form", name="Checkpoint")
        form.get_by_label("Name", exact=True).fill(name)
        form.get_by_label(re.compile("^Or where it lies")).fill("s3://not/allowed")
        form.get_by_role("button", name="Push").click()
        form.get_by_role("alert").filter(has_text="INTERPLAY_SOURCES").wait_for()
        form.get_by_label(re.compile("^Or where it lies")).fill(elsewhere.address("mlp.safetensors"))
        form.get_by_role("button", name="Push").click()
        page.wait_for_url("**/fetches/*")
        count = page.locator("[data-live='count']")
        seen: set[str] = set()

        def counted() -> bool:
            """Note what the page counts."""
            seen.add(count.inner_text())
            return len({text for text in seen if text.endswith(" of 9.9 KiB")}) >= 3

        until(counted)
        fetch = page.url
        for path in (fetch, "/fetches", "/push"):
            page.goto(path)
            page.evaluate(AXE)
            found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
            assert [violation["id"] for violation in found["violations"]] == [], path
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), path
        page.goto("/")
        page.get_by_role("link", name=f"fetch of {name}").click()
        elsewhere.server.faults.bytes_per_second = None
        page.get_by_role("link", name="Go to the checkpoint").click()
        page.get_by_role("heading", name="Where it was fetched from").wait_for()
        page.evaluate(AXE)
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        assert [violation["id"] for violation in found["violations"]] == []
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.slow
def test_without_javascript_the_page_loads_itself_again(browser: Browser, elsewhere: Elsewhere) -> None:
    """Who has no scripts pushes, and sees the end without a touch."""
    elsewhere.server.faults.bytes_per_second = 1000
    with window(browser, elsewhere.service, java_script_enabled=False) as page:
        page.goto("/push")
        form = page.get_by_role("form", name="Checkpoint")
        form.get_by_label("Name", exact=True).fill("by hand")
        form.get_by_label(re.compile("^Or where it lies")).fill(elsewhere.address("mlp.safetensors"))
        form.get_by_role("button", name="Push").click()
        page.wait_for_url("**/fetches/*")
        page.get_by_role("button", name="Cancel").wait_for()
        elsewhere.server.faults.bytes_per_second = None
        page.get_by_role("link", name="Go to the checkpoint").wait_for()
