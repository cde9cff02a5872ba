"""Tests of prompts that are slow to tokenize, and of prompts too long to be tokenized at all."""

import asyncio
import threading
from collections.abc import Iterator, Sequence

import httpx
import pytest

from interventions.registry import Registry
from server.api import answering
from server.api.context import PROMPT_THREADS
from server.engine.torch.engine import TorchEngine
from tests.conftest import MakeClient
from tests.serving import Connection, build_app, complete, error_of, eventually, text_of

LONG = "x" * answering.LONG_TEXT
MORE_THAN_THE_SHARED_THREADS = 45


class SlowTokenizer:
    """A tokenizer that blocks until `finish` is called, and gives every text the same token."""

    def __init__(self) -> None:
        self._release = threading.Event()
        self._lock = threading.Lock()
        self.begun = 0
        self.running = 0

    def tokenize(self, _: str) -> list[int]:
        with self._lock:
            self.begun += 1
            self.running += 1
        assert self._release.wait(20)
        with self._lock:
            self.running -= 1
        return [65]

    def finish(self) -> None:
        """Let the blocked calls return, and all later ones at once."""
        self._release.set()


@pytest.fixture
def slow(tiny_engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowTokenizer]:
    """Replace the tiny engine's tokenizer by a slow one."""
    slow = SlowTokenizer()
    monkeypatch.setattr(tiny_engine.prompts, "tokenize", slow.tokenize)
    yield slow
    slow.finish()


@pytest.mark.parametrize("long", [True, False])
async def test_a_long_prompt_is_read_off_the_event_loop(
    client: httpx.AsyncClient,
    tiny_engine: TorchEngine,
    monkeypatch: pytest.MonkeyPatch,
    long: bool,
) -> None:
    threads = set()
    tokenize = tiny_engine.prompts.tokenize

    def watched(text: str) -> list[int]:
        threads.add(threading.current_thread())
        return tokenize(text)

    monkeypatch.setattr(tiny_engine.prompts, "tokenize", watched)
    monkeypatch.setattr(answering, "LONG_TEXT", 300 if long else 301)
    text = "0123456789" * 30
    assert await text_of(client, prompt=text) == await text_of(client, prompt=tokenize(text))
    assert (threads == {threading.main_thread()}) is not long


async def test_token_ids_become_text_for_the_log_off_the_event_loop(
    make_client: MakeClient, tiny_engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = set()
    detokenize = tiny_engine.prompts.detokenize

    def watched(tokens: Sequence[int]) -> str:
        threads.add(threading.current_thread())
        return detokenize(tokens)

    monkeypatch.setattr(tiny_engine.prompts, "detokenize", watched)
    prompt = [65] * answering.LONG_TEXT
    response = await complete(make_client(log_content=True), prompt=prompt)
    assert error_of(response)["param"] == "prompt"
    assert threads
    assert threading.main_thread() not in threads


async def test_reading_ends_at_the_deadline(make_client: MakeClient, slow: SlowTokenizer) -> None:
    response = await complete(make_client(request_timeout=0.1), prompt=LONG)
    assert response.status_code == 504
    assert error_of(response)["code"] == "request_timeout"
    assert response.headers["x-should-retry"] == "false"  # the openai client heeds this header
    assert slow.running == 1


async def test_reading_ends_when_the_client_leaves(
    tiny_engine: TorchEngine, registry: Registry, slow: SlowTokenizer
) -> None:
    """A prompt thread that works for a client that left still counts, so no more are started."""
    app = build_app(tiny_engine, registry)
    connections = [Connection({"model": "tiny", "prompt": LONG}) for _ in range(12)]
    requests = [asyncio.create_task(connection.run(app)) for connection in connections]
    await eventually(lambda: slow.running == PROMPT_THREADS)
    for connection in connections:
        connection.leave.set()
    async with asyncio.timeout(10):
        await asyncio.gather(*requests)
    assert slow.running == PROMPT_THREADS
    slow.finish()
    await eventually(lambda: slow.running == 0)
    assert slow.begun == PROMPT_THREADS  # the other prompts' clients had left


async def test_slow_prompts_keep_nothing_else_waiting(
    client: httpx.AsyncClient, slow: SlowTokenizer
) -> None:
    requests = [
        asyncio.create_task(complete(client, prompt=LONG, max_tokens=1))
        for _ in range(MORE_THAN_THE_SHARED_THREADS)
    ]
    await eventually(lambda: slow.running == PROMPT_THREADS)
    async with asyncio.timeout(5):
        assert (await client.get("/metrics")).status_code == 200
        assert await text_of(client, prompt=[65])
    slow.finish()
    assert {response.status_code for response in await asyncio.gather(*requests)} == {200}


async def test_a_text_that_cannot_fit_is_refused_unread(
    client: httpx.AsyncClient, tiny_engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound = tiny_engine.prompts.max_characters
    fits = await complete(client, prompt="x" * bound)
    assert "(2560 in the prompt" in str(error_of(fits)["message"])
    encode = tiny_engine.prompts._tokenizer.encode_batch

    class ShortTexts:
        def encode_batch(self, texts: list[str], **options: bool) -> object:
            assert texts == ["short"]
            return encode(texts, **options)

    monkeypatch.setattr(tiny_engine.prompts, "_tokenizer", ShortTexts())
    for length in (bound + 1, 1_000_000):
        response = await complete(client, prompt=["short", "x" * length])
        assert response.status_code == 400
        error = error_of(response)
        assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
        message = str(error["message"])
        assert message.startswith("This model's maximum context length is 512 tokens. However, ")
        assert f"{length} characters" in message
