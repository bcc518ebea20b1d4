"""Pictures of pages for docs/pages: runs the demo, queues an analysis of every kind, and takes them in chromium.

python -m tools.screenshots docs/pages
"""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

from examples.digits import train_and_analyse
from examples.service import service
from examples.training import load, save_probe
from interplay import Client

_EPOCHS = 50
_GATE: dict[str, Any] = {
    "name": "digits-release",
    "checks": [
        {"metric": "splits.test.accuracy", "min": 0.95},
        {"metric": "splits.test.interplay.sample.global.mir", "min": 0.95, "severity": "warn"},
        {"name": "no less accurate than before", "metric": "splits.test.accuracy", "min_change": -0.01},
    ],
}


def main() -> int:
    """Write the pictures to the folder that the argument names."""
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        data = Path(name)
        digits = load()
        probe = save_probe(digits, data / "digits.safetensors")
        (data / "data").mkdir()
        with service(data / "data") as running, Client(running.url) as client:
            reports = train_and_analyse(client, digits, probe, _EPOCHS)
            paths = _paths(client, [report["id"] for _, report in reports])
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
                for picture, (path, scheme, width) in paths.items():
                    context = browser.new_context(
                        base_url=running.url, color_scheme=scheme, viewport={"width": width, "height": 900}
                    )
                    page = context.new_page()
                    page.goto(path, wait_until="networkidle")
                    _await_charts(page)
                    page.screenshot(path=target / f"{picture}.png")
                    context.close()
                browser.close()
    return 0


def _paths(client: Client, report_ids: list[str]) -> dict[str, tuple[str, Any, int]]:
    """Queue the other kinds and a gate; return path, colour scheme and width of each picture."""
    items = [client.get("reports", id_) for id_ in report_ids]
    probe_id = items[0]["probe"]["id"]
    by_epoch = {item["subject"]["metadata"]["epoch"]: item for item in items}
    early, late = (by_epoch[epoch]["subject"]["id"] for epoch in (2, _EPOCHS))
    path = client.create_path(early, late, probe_id=probe_id, options={"null_permutations": 0})
    compared = [
        client.create_comparison(early, by_epoch[epoch]["subject"]["id"], probe_id=probe_id) for epoch in (10, 20)
    ]
    ended = [client.wait(one["id"])["report_id"] for one in (path, *compared)]
    gate = client.create_gate(_GATE)["id"]
    for epoch in (5, 10, _EPOCHS):
        client.set_baseline("digits", by_epoch[epoch]["id"], note=f"epoch {epoch}")
    chosen = "&".join(f"report={by_epoch[epoch]['id']}" for epoch in (2, 10, 20, _EPOCHS))
    return {
        "overview": ("/", "light", 1280),
        "report": (f"/reports/{by_epoch[_EPOCHS]['id']}", "light", 1280),
        "path": (f"/reports/{ended[0]}", "dark", 1280),
        "compare": (f"/compare?{chosen}", "light", 1280),
        "leaderboard": (
            f"/leaderboard?probe_id={probe_id}&sort=splits.test.interplay.sample.global.mir",
            "light",
            1280,
        ),
        "baseline": (f"/baselines/digits?gate={gate}", "dark", 1280),
    }


def _await_charts(page: Page) -> None:
    """Wait until the charts in the window are drawn."""
    page.wait_for_timeout(500)
    for drawing in page.locator("[data-chart]:visible").all()[:4]:
        box = drawing.bounding_box()
        if box is not None and box["y"] < 900:
            drawing.locator(".interactive svg").first.wait_for()


if __name__ == "__main__":
    sys.exit(main())
