"""Pages in a real browser, Debian's chromium: charts, live progress, keyboard, small screens, accessibility, print."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from tests.app.pages.test_pages import HOSTILE
from tests.app.test_analyses import SLOW, pair
from tests.browsers import AXE, window
from tests.datafiles import encoded, picture, zipped
from tests.services import Service, running, until


@pytest.fixture
def page(browser: Browser, service: Service, request: pytest.FixtureRequest) -> Iterator[Page]:
    """Open a window on the service."""
    with window(browser, service, **getattr(request, "param", {})) as opened:
        yield opened


def probe_of_images(service: Service) -> str:
    """Push a probe of two classes of images, one of which is none; return its id."""
    files = {f"{'ab'[i % 2]}/{i}.png": encoded(picture(i)) if i else b"<html>" for i in range(12)}
    return str(service.post("/v1/probes", {"name": "images"}, zipped(files)).json()["id"])


def everything(service: Service, reports: dict[str, Any]) -> list[str]:
    """Return the path of a page of each sort."""
    evaluation = reports["evaluation"]
    lists = "/ /reports /leaderboard /analyses /checkpoints /probes /feature-sets /fetches /gates /baselines"
    lists += " /definitions /push /analyses/new?kind=path"
    images = probe_of_images(service)
    return [
        *lists.split(),
        *(f"/reports/{report['id']}" for report in reports.values()),
        f"/analyses/{evaluation['analysis_id']}",
        f"/checkpoints/{evaluation['subject']['id']}",
        f"/probes/{evaluation['probe']['id']}",
        f"/probes/{images}",
        f"/probes/{images}/samples",
        f"/reports/{evaluation['id']}/verdict",
        "/compare",
        "/compare?" + "&".join(f"report={report['id']}" for report in reports.values()),
    ]


@pytest.mark.slow
def test_charts_answer_the_mouse(page: Page, reports: dict[str, Any]) -> None:
    """Each picture is replaced by a chart of the same numbers; the page's policy allows no eval and no inline style."""
    for kind in ("evaluation", "path"):
        page.goto(f"/reports/{reports[kind]['id']}")
        drawings = page.locator("[data-chart]:visible")
        assert drawings.count() >= 4
        for index in range(drawings.count()):
            drawing = drawings.nth(index)
            drawing.scroll_into_view_if_needed()
            drawing.locator(".interactive svg").first.wait_for()
            drawing.locator("img").wait_for(state="hidden")


@pytest.mark.slow
def test_chosen_reports_are_compared(page: Page, reports: dict[str, Any]) -> None:
    """Two boxes in the list and a press lead to the page that has both side by side, with charts."""
    page.goto("/reports")
    for kind in ("path", "series"):
        page.locator(f"input[value='{reports[kind]['id']}']").check()
    page.get_by_role("button", name="Compare the chosen").click()
    page.wait_for_url("**/compare?*")
    assert page.get_by_role("heading", level=2).all_inner_texts()[:2] == [
        "Series: the test split",
        "Path: the test split",
    ]
    page.get_by_role("link", name="Put B first").click()
    page.get_by_role("heading", name="Path: the test split").wait_for()


@pytest.mark.parametrize("page", [{"java_script_enabled": False}], indirect=True)
def test_without_javascript_charts_are_pictures(page: Page, reports: dict[str, Any]) -> None:
    """The same page shows SVG, and the overview its tables."""
    page.goto(f"/reports/{reports['evaluation']['id']}")
    picture = page.locator("[data-chart] img").first
    picture.wait_for(state="visible")
    box = picture.bounding_box()
    assert box is not None
    assert box["width"] > 200
    page.goto("/")
    page.get_by_role("heading", name="Newest reports").wait_for()


def test_samples_come_into_the_page_of_their_probe(page: Page, service: Service) -> None:
    """They take the place of a link to them, and each picture is one."""
    page.goto(f"/probes/{probe_of_images(service)}")
    pictures = page.locator("[data-samples] img")
    pictures.first.wait_for()
    assert page.get_by_role("link", name="Look at some samples").count() == 0
    assert pictures.count() == 9
    until(lambda: pictures.evaluate_all("all => all.every(one => one.naturalWidth === 40)"))
    page.locator("[data-samples] .fault").get_by_text("is no PNG").wait_for()


@pytest.mark.parametrize("page", [{"java_script_enabled": False}], indirect=True)
def test_without_javascript_samples_are_a_page(page: Page, service: Service) -> None:
    """The link leads to them."""
    page.goto(f"/probes/{probe_of_images(service)}")
    page.get_by_role("link", name="Look at some samples").click()
    page.get_by_role("img", name="b, 1").wait_for()


def test_a_resource_is_deleted_in_two_steps(page: Page, service: Service) -> None:
    """The button that deletes shows only after another one."""
    id_ = probe_of_images(service)
    page.goto(f"/probes/{id_}")
    button = page.get_by_role("button", name="Delete it for good")
    assert button.is_hidden()
    page.get_by_text("Delete this probe").click()
    button.click()
    page.wait_for_url("**/probes")
    assert service.client.get(f"/v1/probes/{id_}").status_code == 404


def test_progress_is_live(page: Page, service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path) -> None:
    """A running analysis moves its bar without a reload, and its end shows the page as it is then."""
    analysis = service.analyze(**pair(service, mlp_checkpoint_file, digits_probe_file), options=SLOW)
    page.goto(f"/analyses/{analysis['id']}")
    until(lambda: page.evaluate("document.querySelector('progress')?.value > 0"))
    page.get_by_role("button", name="Cancel").click()
    page.locator(".status.cancelled").wait_for()
    assert service.wait(analysis["id"])["status"] == "cancelled"


@pytest.mark.slow
def test_progress_of_a_path_is_live(page: Page, service: Service, reports: dict[str, Any]) -> None:
    """The overview counts while a path runs, and from its card the path is cancelled."""
    before = reports["path"]
    ids = [subject["id"] for subject in before["subjects"]]
    ends = {"checkpoint_a_id": ids[0], "checkpoint_b_id": ids[1], "probe_id": before["probe"]["id"]}
    analysis = service.analyze(kind="path", **ends, options={**SLOW, "grid": {"points": 25}})
    address = f"/v1/analyses/{analysis['id']}"
    until(lambda: service.client.get(address).json()["status"] == "running")
    page.goto("/")
    count = page.locator(f"[data-events*='{analysis['id']}'] [data-live='count']")
    seen: set[str] = set()

    def counted() -> bool:
        """Note what the card counts."""
        seen.add(count.inner_text())
        return len(seen - {"", "0/0"}) >= 3

    until(counted)
    page.get_by_role("link", name="path of").first.click()
    page.get_by_role("button", name="Cancel").click()
    page.locator(".status.cancelled").wait_for()


def test_from_files_to_a_report(page: Page, mlp_checkpoint_file: Path, digits_probe_file: Path) -> None:
    """Pages alone lead from two files to a report: push, push, queue with an option, wait, read."""
    for form_name, name, file in (
        ("Checkpoint", "alone in a browser", mlp_checkpoint_file),
        ("Probe dataset", "digits by hand", digits_probe_file),
    ):
        page.get_by_role("link", name="Push", exact=True).click() if page.url != "about:blank" else page.goto("/push")
        form = page.get_by_role("form", name=form_name)
        form.get_by_label("Name", exact=True).fill(name)
        form.get_by_label(re.compile("^File")).set_input_files(file)
        if form_name != "Checkpoint":
            form.get_by_label("Preprocessing").fill('{"scale": 0.0625}')
        form.get_by_role("button", name="Push").click()
        page.get_by_role("heading", level=1).filter(has_text=name).wait_for()
    page.get_by_role("link", name="Analyses", exact=True).click()
    page.get_by_role("link", name="New analysis").click()
    for label, name in (("Checkpoint", "alone in a browser"), ("Probe", "digits by hand")):
        choice = page.locator("option", has_text=name).first.get_attribute("value")
        page.get_by_label(label, exact=True).select_option(choice)
    page.get_by_label(re.compile("^null permutations")).fill("3")
    page.get_by_role("button", name="Queue").click()
    page.get_by_role("link", name="Read the report").click()
    page.get_by_role("heading", name="Evaluation of alone in a browser").wait_for()
    page.get_by_text(re.compile("On the test split .* accuracy is")).wait_for()
    assert page.locator("[title^='3 permutations of']").count() > 0


def test_people_log_in_and_out(browser: Browser, tmp_path: Path) -> None:
    """A page asks for the key first, then shows itself; after leaving it asks again."""
    with running(tmp_path / "data", command="api", api_key="a long key") as guarded, window(browser, guarded) as page:
        page.goto("/checkpoints?search=x")
        page.get_by_label(re.compile("key", re.IGNORECASE)).fill("a wrong key")
        page.get_by_role("button", name="Log in").click()
        page.get_by_role("alert").wait_for()
        page.get_by_label(re.compile("key", re.IGNORECASE)).fill("a long key")
        page.get_by_role("button", name="Log in").click()
        page.wait_for_url("**/checkpoints?search=x")
        page.get_by_role("heading", name="Checkpoints").wait_for()
        (cookie,) = page.context.cookies()
        assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
        page.get_by_role("button", name="Log out").click()
        page.goto("/reports")
        page.wait_for_url("**/login?*")


def test_hostile_names_run_nothing(
    page: Page, service: Service, mlp_checkpoint_file: Path, digits_probe_file: Path
) -> None:
    """Names of markup and of marks that turn the line are text in a browser too, in tables, charts and titles."""
    spec = {"name": HOSTILE, "metadata": {"run": HOSTILE, "epoch": 1}}
    checkpoint = service.post("/v1/checkpoints", spec, mlp_checkpoint_file).json()["id"]
    named = {"name": HOSTILE, "preprocess": {"scale": 0.0625}, "class_names": [f"{HOSTILE}{n}" for n in range(10)]}
    probe = service.post("/v1/probes", named, digits_probe_file).json()["id"]
    ended = [
        service.wait(service.analyze(checkpoint_id=checkpoint, probe_id=probe, options={"null_permutations": n})["id"])
        for n in range(2)
    ]
    chosen = "&".join(f"report={one['report_id']}" for one in ended)
    page.add_init_script("window.alert = () => { throw new Error('a name ran as a script') }")
    for path in (
        "/", "/checkpoints", "/leaderboard", f"/checkpoints/{checkpoint}", f"/probes/{probe}",
        f"/reports/{ended[0]['report_id']}", f"/analyses/{ended[0]['id']}", f"/compare?{chosen}", "/analyses/new",
    ):  # fmt: skip
        page.goto(path)
        page.wait_for_load_state("networkidle")
        for drawing in page.locator("[data-chart]:visible").all():
            drawing.scroll_into_view_if_needed()
            drawing.locator(".interactive svg").first.wait_for()
        shown = page.locator("body").inner_text() + page.title()
        assert "<script>alert(1)</script>" in shown
        assert "\u202e" not in shown, path


def test_a_file_is_pushed_with_progress(page: Page, mlp_checkpoint_file: Path) -> None:
    """A form's file goes up, a refusal is said beside the form, and success leads to the page of the checkpoint."""
    page.goto("/push")
    form = page.get_by_role("form", name="Checkpoint")
    form.get_by_label("Name").fill("from a browser")
    form.get_by_label(re.compile("^File")).set_input_files(mlp_checkpoint_file)
    form.get_by_label("Architecture").fill("{broken")
    form.get_by_role("button", name="Push").click()
    form.get_by_role("alert").filter(has_text="architecture is not valid JSON").wait_for()
    form.get_by_label("Architecture").fill("")
    form.get_by_role("button", name="Push").click()
    page.wait_for_url("**/checkpoints/*")
    page.get_by_role("heading", name="Checkpoint from a browser").wait_for()


@pytest.mark.parametrize(
    "page",
    [
        pytest.param({"viewport": {"width": 360, "height": 740}, "color_scheme": "dark"}, id="phone, dark"),
        pytest.param(
            {"viewport": {"width": 2560, "height": 1440}, "color_scheme": "light"},
            id="wall, light",
            marks=pytest.mark.slow,
        ),
    ],
    indirect=True,
)
def test_nothing_is_inaccessible(page: Page, service: Service, reports: dict[str, Any]) -> None:
    """axe-core finds no violation, whatever its weight, and no page is wider than its window, in both schemes."""
    for path in everything(service, reports):
        page.goto(path)
        page.wait_for_load_state("networkidle")
        # Through the debugger, as the policy of the page lets no other script in.
        page.evaluate(AXE)
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        violations = [
            (violation["id"], [node["html"][:200] for node in violation["nodes"][:3]])
            for violation in found["violations"]
        ]
        assert violations == [], path
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= page.evaluate("window.innerWidth"), path


def test_the_keyboard_is_enough(page: Page, reports: dict[str, Any]) -> None:
    """The first key skips to the content; from there a report opens, and its definitions."""
    page.goto("/reports")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    link = page.locator("tbody a").first
    for _ in range(20):
        page.keyboard.press("Tab")
        if link.evaluate("element => element === document.activeElement"):
            break
    page.keyboard.press("Enter")
    page.wait_for_url("**/reports/*")
    page.locator("a.term").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/definitions#*")


@pytest.mark.slow
def test_a_report_is_printed(page: Page, reports: dict[str, Any], tmp_path: Path) -> None:
    """The PDF has the title, no navigation, and no table that is cut at the paper's edge."""
    page.goto(f"/reports/{reports['evaluation']['id']}")
    page.wait_for_load_state("networkidle")
    page.emulate_media(media="print")
    assert page.locator("header").is_hidden()
    page.set_viewport_size({"width": 794, "height": 1123})  # A4 at 96 pixels an inch
    cut = page.evaluate(
        "[...document.querySelectorAll('table')].filter(t => t.getBoundingClientRect().right > innerWidth).length"
    )
    assert cut == 0
    content = page.pdf(path=tmp_path / "report.pdf", format="A4")
    assert content.startswith(b"%PDF-")
    assert len(content) > 20_000
