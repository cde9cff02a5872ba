"""Opens the playground in Debian's chromium."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final
from urllib.parse import quote

from playwright.sync_api import Browser, sync_playwright

from tests.prometheus import tool

WAIT_MS: Final = 60_000  # two cores, and other tests beside
DETOX: Final = {
    "intervention": "detox-argre",
    "eta": 0.05,
    "iterations": 5,
    "direction_scale": 1.5,
}


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start the browser; skip the test if it is not installed."""
    with sync_playwright() as playwright:
        # Chromium's own sandbox needs a user who is not root.
        browser = playwright.chromium.launch(
            executable_path=tool("chromium"), args=["--no-sandbox"]
        )
        yield browser
        browser.close()


def deep_link(url: str, **state: object) -> str:
    """Return the address of a playground that shows the state."""
    return f"{url}/playground#{quote(json.dumps(state))}"
