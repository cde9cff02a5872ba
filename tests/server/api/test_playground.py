"""Tests of the playground's files, and of /v1/steering, which tells the page the policy."""

import re
from pathlib import Path

import pytest
from pydantic import JsonValue

from server.api import playground
from tests.conftest import MakeClient, WriteArtifact
from tests.serving import error_of, push

FOLDER = Path(playground.__file__).parent.parent / "playground"
MAX_LINES = 1200


async def test_every_file_of_the_page_is_served_under_its_policy(make_client: MakeClient) -> None:
    client = make_client()
    page = await client.get("/playground")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    linked = re.findall(r'(?:href|src)="(?!http)([^"]+)"', page.text)
    assert {"playground/main.js", "playground/style.css"} < set(linked)
    for path in (*linked, *(f"playground/{each.name}" for each in FOLDER.iterdir())):
        response = await client.get(f"/{path}")
        assert response.status_code == 200, path
        assert response.headers["content-security-policy"].startswith("default-src 'self';")
        assert response.headers["x-content-type-options"] == "nosniff"
    missing = await client.get("/playground/../config.py")
    assert missing.status_code == 404
    error = error_of(await client.get("/playground/nothing.js"))
    assert error["message"] == "The playground has no file 'nothing.js'."


@pytest.mark.parametrize(
    ("settings", "status"),
    [
        ({}, 200),
        ({"playground": False}, 404),
        ({"host": "0.0.0.0"}, 404),
        ({"host": "0.0.0.0", "playground": True}, 200),
        ({"api_key": "secret"}, 200),  # the page asks for the key
    ],
)
async def test_it_is_on_where_only_this_machine_comes(
    make_client: MakeClient, settings: dict[str, str | bool], status: int
) -> None:
    client = make_client(**settings)
    for path in ("/playground", "/playground/main.js"):
        assert (await client.get(path)).status_code == status


def test_the_page_is_short_and_has_nothing_inline() -> None:
    files = [path.read_text() for path in FOLDER.iterdir()]
    assert sum(len(text.splitlines()) for text in files) <= MAX_LINES
    page = (FOLDER / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*src=)|<style|style=|\son\w+=|//", page)
    code = "".join(path.read_text() for path in FOLDER.glob("*.js"))
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", code)


async def test_the_policy_and_the_default_are_shown(
    make_client: MakeClient, affine_artifact: WriteArtifact
) -> None:
    shown = (await make_client().get("/v1/steering")).json()
    assert shown == {
        "object": "steering",
        "policy": "optional",
        "default": [],
        "max_interventions": 4,
        "comparison": True,
        "toxicity": False,
    }
    await push(make_client(), affine_artifact("maps"), "maps")
    steering: JsonValue = {"intervention": "maps", "strength": 0.5}
    client = make_client(steering_policy="locked", default_steering=steering)
    shown = (await client.get("/v1/steering")).json()
    assert (shown["policy"], shown["comparison"]) == ("locked", False)
    [applied] = shown["default"]
    assert applied["settings"] == {"strength": 0.5, "positions": "all"}
    assert (applied["intervention"], applied["source"]) == ("maps", "default")
