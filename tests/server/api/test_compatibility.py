"""Tests that docs/compatibility.md says what is refused, in the words of the server."""

import json
import re
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from tests.conformance.suites import REFUSED, SUITES, TOO_HARD
from tests.serving import Json, error_of, user

PAGE = (Path(__file__).parents[3] / "docs" / "compatibility.md").read_text()
BODIES: dict[str, Json] = {
    "/v1/completions": {"model": "tiny", "prompt": "Hello", "max_tokens": 2},
    "/v1/chat/completions": {"model": "tiny", "messages": [user()], "max_tokens": 2},
    "/v1/responses": {"model": "tiny", "input": "Hello", "max_output_tokens": 2},
}


class Refusal(NamedTuple):
    path: str
    fields: Json
    param: str
    message: str


ROWS = [
    Refusal(path, json.loads(fields), param, message)
    for path, fields, param, message in re.findall(
        r"^\| `(/v1/\S+)` \| `(\{.*?\})` \| `(\S+)` \| (.*) \|$", PAGE, re.MULTILINE
    )
]


def test_the_page_has_each_endpoint() -> None:
    assert {row.path for row in ROWS} == BODIES.keys()
    assert len(ROWS) > 30


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.path[4:]}-{row.param}")
async def test_what_the_page_says_is_refused(chat_client: httpx.AsyncClient, row: Refusal) -> None:
    response = await chat_client.post(row.path, json={**BODIES[row.path], **row.fields})
    error = error_of(response)
    assert (response.status_code, error["param"], error["message"]) == (400, row.param, row.message)


def test_the_page_has_each_client() -> None:
    for suite in (*(suite.name for suite in SUITES), "lm-eval"):
        assert f"| {suite} |" in PAGE, suite
    for name, reason in (*REFUSED.items(), *TOO_HARD.items()):
        assert f"| `{name}` | {reason} |" in PAGE
