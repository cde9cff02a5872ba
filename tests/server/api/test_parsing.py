"""Tests of how JSON bodies are parsed, and that small ones do not wait for large ones."""

import asyncio
import json
import threading
from collections.abc import Collection

import httpx
import pytest

from interventions.strict_json import parse_json
from server.api import parsing
from server.api.parsing import LARGE_BODY
from tests.serving import chat, complete, error_of, eventually, text_of

HEADERS = {"Content-Type": "application/json"}


async def post(client: httpx.AsyncClient, body: bytes) -> httpx.Response:
    """Post these bytes, unchanged, as the body of a completion request."""
    return await client.post("/v1/completions", content=body, headers=HEADERS)


class SlowParser:
    """A parser that blocks on large bodies until `release`, and counts those it parses at once."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.begun = 0
        self.running = 0
        self.most_running = 0
        self._parse = parse_json

    def __call__(self, text: str, *, known: Collection[str]) -> object:
        if len(text) >= LARGE_BODY:
            self.begun += 1
            self.running += 1
            self.most_running = max(self.running, self.most_running)
            assert self.release.wait(20)
            self.running -= 1
        return self._parse(text, known=known)


async def test_large_bodies_are_parsed_one_at_a_time_and_small_ones_do_not_wait(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowParser()
    monkeypatch.setattr(parsing, "parse_json", slow)
    large = [
        asyncio.create_task(complete(client, user="x" * LARGE_BODY, max_tokens=1)) for _ in range(4)
    ]
    await eventually(lambda: slow.begun == 1)
    assert await text_of(client)
    assert (await client.get("/health")).status_code == 200
    assert slow.begun == 1
    slow.release.set()
    assert {response.status_code for response in await asyncio.gather(*large)} == {200}
    assert (slow.begun, slow.most_running) == (4, 1)


@pytest.mark.parametrize(
    ("field", "code"),
    [("x", "unknown_parameter"), ("steering", "invalid_json"), ("prompt", "invalid_json")],
)
async def test_nothing_is_built_of_a_body_of_many_small_lists(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, field: str, code: str
) -> None:
    def build(*_: object, **__: object) -> object:
        raise AssertionError("it was built")

    monkeypatch.setattr("interventions.strict_json.from_json", build)
    lists = ",".join(["[[]]"] * 400_000)
    response = await post(client, b'{"model":"tiny","%s":[%s]}' % (field.encode(), lists.encode()))
    assert response.status_code == 400
    assert error_of(response)["code"] == code


async def test_the_largest_requests_of_every_kind_are_read(chat_client: httpx.AsyncClient) -> None:
    """Bodies close to the limits of the parser are parsed, and refused for what they ask."""
    parts = [{"type": "text", "text": "a"}] * 10
    for response, reason in (
        (await complete(chat_client, prompt=[[1] * 4096] * 120), "maximum context length"),
        (await complete(chat_client, prompt=["a,b" * 600] * 2048), "more than the 128 completions"),
        (await complete(chat_client, prompt=",[{" * 1_000_000), "maximum context length"),
        (
            await chat(chat_client, messages=[{"role": "user", "content": parts}] * 2048),
            "maximum context length",
        ),
    ):
        assert response.status_code == 400
        assert reason in str(error_of(response)["message"])


async def test_a_byte_order_mark_is_not_part_of_the_json(client: httpx.AsyncClient) -> None:
    body = json.dumps({"model": "tiny", "prompt": "Hello", "max_tokens": 1}).encode()
    assert (await post(client, b"\xef\xbb\xbf" + body)).status_code == 200
    for wrong in (
        b"\xef\xbb\xbf" * 2 + body,
        body + b"\xef\xbb\xbf",
        body.decode().encode("utf-16"),
    ):
        response = await post(client, wrong)
        assert (response.status_code, error_of(response)["code"]) == (400, "invalid_json")
