"""Takes the pictures of the playground that the docs show: `make screenshots`."""

import tempfile
from pathlib import Path
from typing import Final

from playwright.sync_api import Page

from tests.browser import DETOX, chromium, deep_link
from tests.processes import ROOT, steerserve

DOCS: Final = ROOT / "docs"
WIDTH: Final = 1280  # pixels
WAIT_MS: Final = 300_000


def main() -> None:
    """Serve the embedded model, and take each picture."""
    with (
        tempfile.TemporaryDirectory() as folder,
        steerserve(Path(folder), "--dtype", "float32") as server,
        chromium() as browser,
    ):
        page = browser.new_page(viewport={"width": WIDTH, "height": 900})
        page.set_default_timeout(WAIT_MS)
        _take(page, server.url)


def _take(page: Page, url: str) -> None:
    page.goto(deep_link(url, stack=[DETOX]))
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text("On average,").wait_for()
    page.locator("[role=option]").first.hover()
    page.screenshot(path=DOCS / "playground.png", full_page=True)
    sweep = page.locator("#sweep")
    sweep.get_by_role("button", name="Sweep over 7 values").click()
    sweep.locator("tbody tr").nth(6).wait_for()
    sweep.screenshot(path=DOCS / "playground-sweep.png")
    page.get_by_role("button", name="Registry").click()
    page.get_by_role("button", name="detox-dsas").click()
    page.get_by_role("table", name="Training of detox-dsas").wait_for()
    page.screenshot(path=DOCS / "playground-registry.png", full_page=True)


if __name__ == "__main__":
    main()
