"""Tests that every request gets an id, a record and a count, however it ends."""

import asyncio
import logging
import re
import time
from dataclasses import dataclass, field

import httpx
import pytest
from fastapi import FastAPI
from openai import AsyncOpenAI
from starlette.requests import Request
from starlette.types import Message

from interventions.registry import Registry
from server.api.observe import RequestObserver, outcome_of, record_of, set_outcome
from server.app import create_app
from server.config import Settings
from server.engine.output import StepOutput
from server.engine.torch.engine import TorchEngine
from server.metrics import Metrics
from server.records import OUTCOMES, GenerationRecord, RequestRecord
from tests.live import live
from tests.serving import (
    Connection,
    Script,
    ScriptedGeneration,
    complete,
    error_of,
    metric,
)

ID = re.compile("[0-9a-f]{32}")
FIRST = StepOutput((1,), "one")


@dataclass
class Kept:
    """A sink that keeps the records it is given."""

    records: list[RequestRecord] = field(default_factory=list)

    def record(self, record: RequestRecord) -> None:
        self.records.append(record)


class Broken:
    """A sink that fails on every record."""

    def record(self, _: RequestRecord) -> None:
        raise OSError("no space left")


def watched(engine: TorchEngine, registry: Registry, *sinks: Kept | Broken) -> FastAPI:
    """Return an application that gives these sinks a record of every request."""
    settings = Settings.model_validate({"served_model_names": ("tiny",)})
    return create_app(engine, registry, Metrics(engine, registry, "tiny"), None, settings, sinks)


def client_of(app: FastAPI) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


async def test_every_answer_carries_an_id_of_its_own(client: httpx.AsyncClient) -> None:
    answers = [
        await complete(client),
        await complete(client, stream=True),
        await complete(client, model="other"),
        await client.get("/nowhere"),
        await client.put("/v1/models"),
        await client.get("/health"),
        await client.post("/v1/completions", content=b"x" * 5_000_000),
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 404, 404, 405, 200, 413]
    ids = [answer.headers.get_list("x-request-id") for answer in answers]
    assert all(len(found) == 1 and ID.fullmatch(found[0]) for found in ids)
    assert len({found[0] for found in ids}) == len(answers)


async def test_openais_client_shows_the_id(tiny_engine: TorchEngine, registry: Registry) -> None:
    kept = Kept()
    app = watched(tiny_engine, registry, kept)
    async with (
        live(app) as server,
        AsyncOpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0) as client,
    ):
        answer = await client.completions.create(model="tiny", prompt="x", max_tokens=1)
    assert answer._request_id == kept.records[0].request_id


async def test_an_unexpected_error_is_an_envelope_with_an_id(
    tiny_engine: TorchEngine, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: str) -> list[int]:
        raise RuntimeError("secret")

    monkeypatch.setattr(tiny_engine.prompts, "tokenize", fail)
    kept = Kept()
    app = watched(tiny_engine, registry, kept)
    async with client_of(app) as client:
        answer = await complete(client)
    assert answer.status_code == 500
    assert error_of(answer)["code"] == "internal_error"
    [record] = kept.records
    assert answer.headers["x-request-id"] == record.request_id
    assert (record.status, record.outcome) == (500, "server_error")
    # The exception still reaches the ASGI server that runs the application, which logs it.
    with pytest.raises(RuntimeError, match="secret"):
        await Connection({"model": "tiny", "prompt": "x"}).run(app)


async def test_a_record_says_how_a_request_went(
    tiny_engine: TorchEngine, registry: Registry
) -> None:
    kept = Kept()
    parent = f"00-{'a' * 32}-{'b' * 16}-01"
    before = time.time_ns()
    async with client_of(watched(tiny_engine, registry, kept)) as client:
        headers = {"traceparent": parent, "tracestate": "x=1"}
        await client.get("/v1/models/tiny", headers=headers)
        await client.request("SECRET", "/secret", headers={"traceparent": "0" * 1000})
    first, second = kept.records
    assert (first.method, first.endpoint) == ("GET", "/v1/models/{model_id:path}")
    assert (first.status, first.outcome) == (200, "success")
    assert (first.traceparent, first.tracestate) == (parent, "x=1")
    assert before <= first.started_ns <= second.started_ns <= time.time_ns()
    assert 0 < first.seconds < 10
    assert first.generation is None
    assert (second.method, second.endpoint) == ("_OTHER", "unmatched")
    assert (second.status, second.outcome) == (404, "client_error")
    assert (second.traceparent, second.tracestate) == (None, None)


async def test_a_client_that_leaves_is_told_of(
    tiny_engine: TorchEngine, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Kept()
    app = watched(tiny_engine, registry, kept)
    for stream, status in ((True, 200), (False, 499)):
        generation = ScriptedGeneration(outputs=(FIRST,))
        monkeypatch.setattr(tiny_engine, "submit", Script([generation]).submit)
        connection = Connection({"model": "tiny", "prompt": "x", "stream": stream})
        connection.leave.set()
        await asyncio.wait_for(connection.run(app), 20)
        record = kept.records[-1]
        assert (record.status, record.outcome) == (status, "cancelled")
        start: Message = connection.sent[0]
        assert (b"x-request-id", record.request_id.encode()) in start["headers"]


async def test_a_stream_that_fails_has_the_outcome_of_its_error(
    tiny_engine: TorchEngine, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = ScriptedGeneration(outputs=(FIRST,), error=RuntimeError("secret"))
    monkeypatch.setattr(tiny_engine, "submit", Script([failing]).submit)
    kept = Kept()
    async with client_of(watched(tiny_engine, registry, kept)) as client:
        await complete(client, stream=True)
    assert (kept.records[0].status, kept.records[0].outcome) == (200, "server_error")


async def test_a_sink_that_fails_fails_no_request_and_no_other_sink(
    tiny_engine: TorchEngine, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    kept = Kept()
    app = watched(tiny_engine, registry, Broken(), kept)
    async with client_of(app) as client:
        assert (await complete(client)).status_code == 200
        completions = 'requests_total{endpoint="/v1/completions",outcome="success"}'
        assert await metric(client, completions) == 1
    assert [record.endpoint for record in kept.records] == ["/v1/completions", "/metrics"]
    failures = [entry for entry in caplog.records if entry.levelno == logging.ERROR]
    assert len(failures) == 2
    assert failures[0].name == "server.api.observe"


async def test_generating_routes_are_counted_from_zero(client: httpx.AsyncClient) -> None:
    page = (await client.get("/metrics")).text
    for endpoint in ("/v1/completions", "/v1/chat/completions"):
        for outcome in OUTCOMES:
            sample = f'requests_total{{endpoint="{endpoint}",outcome="{outcome}"}} 0.0'
            assert f"steerserve_{sample}\n" in page


async def test_routes_fill_in_the_record_and_state_outcomes(
    tiny_engine: TorchEngine, registry: Registry
) -> None:
    app, kept = FastAPI(), Kept()
    made = GenerationRecord("chat", "chatcmpl-1", "tiny", "tiny")

    @app.get("/x")
    async def route(request: Request) -> None:
        record_of(request).generation = made
        set_outcome(request, "unavailable")
        request.state.error_code = "engine_dead"

    metrics = Metrics(tiny_engine, registry, "tiny")
    app.add_middleware(RequestObserver, metrics=metrics, sinks=[kept])
    async with client_of(app) as client:
        await client.get("/x")
        await client.get("/nowhere")
    first, second = kept.records
    assert first.generation is made
    assert (first.status, first.outcome, first.error_code) == (200, "unavailable", "engine_dead")
    assert (second.outcome, second.error_code) == ("client_error", None)
    assert b'endpoint="/x",outcome="unavailable"} 1.0' in metrics.render()


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        *((200, "success"), (204, "success"), (304, "success"), (400, "client_error")),
        *((404, "client_error"), (429, "rejected"), (499, "cancelled"), (500, "server_error")),
        *((503, "unavailable"), (504, "server_error")),
    ],
)
def test_the_outcome_that_a_status_tells(status: int, outcome: str) -> None:
    assert outcome_of(status) == outcome
