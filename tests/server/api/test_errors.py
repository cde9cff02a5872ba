"""Tests that bad input gets a 4xx in OpenAI's envelope that names the field; the server goes on."""

import asyncio
import json
from collections.abc import AsyncGenerator

import httpx
import pytest
from openai import AsyncOpenAI, BadRequestError

from interventions.registry import Registry
from server.engine.errors import (
    BankFullError,
    EngineDeadError,
    EngineError,
    InvalidRequestError,
    QueueFullError,
    ShuttingDownError,
    StepFailedError,
    UnservableInterventionError,
)
from server.engine.torch.engine import TorchEngine
from tests.conftest import MakeClient, WriteArtifact
from tests.live import live
from tests.serving import Json, Script, build_app, chat, complete, error_of, push, text_of

WRONG_FIELDS: tuple[tuple[Json, str], ...] = (
    ({"prompt": None}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [[1], "a"]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [1.0]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [10**30]}, "prompt"),
    ({"prompt": {"text": "a"}}, "prompt"),
    ({"model": 5}, "model"),
    ({"model": None}, "model"),
    ({"temperature": "0.5"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"top_p": -0.1}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 2.0}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": 10**400}, "max_tokens"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": True}, "n"),
    ({"best_of": 2}, "best_of"),
    ({"n": 2, "best_of": 1}, "best_of"),
    ({"stop": ""}, "stop"),
    ({"stop": 5}, "stop"),
    ({"stop": ["a", 5]}, "stop"),
    ({"stop": ["a"] * 33}, "stop"),
    ({"stop": "x" * 1001}, "stop"),
    ({"seed": 1.5}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
    ({"user": 5}, "user"),
)
UNSUPPORTED: tuple[Json, ...] = ({"suffix": "end"},)
UNKNOWN: tuple[tuple[str, str], ...] = (
    ("steerng", "Did you mean 'steering'?"),
    ("Steering", "Did you mean 'steering'?"),
    ("max_token", "Did you mean 'max_tokens'?"),
    ("response_format", ""),
    ("messages", ""),
    ("\u00e4\n" + "x" * 500, ""),
)
BODIES: tuple[bytes, ...] = (
    b"",
    b"not json",
    b'{"model": "tiny", "prompt": "x"',
    b'{"model": "tiny", "prompt": "x"} x',
    b'{"model": "tiny", "prompt": "\xff"}',
    b'{"model": "tiny", "prompt": "\\ud800"}',
    b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
    b'{"model": "tiny", "prompt": "x", "temperature": Infinity}',
    b'{"model": "tiny", "prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    b'{"model": "tiny", "prompt": "x", "steering": {"intervention": "a"}, "steering": null}',
    b"[]",
    b"null",
    b'"text"',
    b"[" * 100_000,
    b'{"model":' * 100_000,
    b'{"model": "tiny", "prompt": ' + b"[" * 500 + b"]" * 500 + b"}",
    "{}".encode("utf-16"),
)


async def post_bytes(client: httpx.AsyncClient, body: bytes) -> httpx.Response:
    headers = {"Content-Type": "application/json"}
    return await client.post("/v1/completions", content=body, headers=headers)


async def test_a_wrong_value_is_named(client: httpx.AsyncClient) -> None:
    for fields, param in WRONG_FIELDS:
        response = await complete(client, **fields)
        assert response.status_code == 400, fields
        error = error_of(response)
        assert error["param"] == param, fields
        assert error["type"] == "invalid_request_error"
        assert len(str(error["message"])) < 300
    assert await text_of(client)


async def test_a_missing_field_is_named(client: httpx.AsyncClient) -> None:
    for fields, param in (({"prompt": "x"}, "model"), ({"model": "tiny"}, "prompt"), ({}, "model")):
        error = error_of(await client.post("/v1/completions", json=fields))
        assert (error["param"], error["code"]) == (param, "missing_required_parameter")


async def test_a_field_that_we_cannot_honour_is_named(client: httpx.AsyncClient) -> None:
    for fields in UNSUPPORTED:
        response = await complete(client, **fields)
        error = error_of(response)
        [param] = fields
        assert response.status_code == 400, fields
        assert (error["param"], error["code"]) == (param, "unsupported_parameter")
        assert f"does not support '{param}'" in str(error["message"])


async def test_a_misspelt_field_never_leads_to_an_answer(client: httpx.AsyncClient) -> None:
    for name, hint in UNKNOWN:
        response = await complete(client, **{name: {"intervention": "x"}})
        error = error_of(response)
        assert response.status_code == 400, name
        assert error["code"] == "unknown_parameter"
        assert str(error["message"]).startswith("Unrecognized request argument supplied: ")
        assert str(error["message"]).endswith(hint)
        assert len(str(error["message"])) < 300


async def test_a_body_that_is_no_json_object(client: httpx.AsyncClient) -> None:
    for body in BODIES:
        response = await post_bytes(client, body)
        assert response.status_code == 400, body[:80]
        assert error_of(response)["code"] == "invalid_json" or b"[[[" in body
    assert await text_of(client)


async def test_a_body_of_another_type(client: httpx.AsyncClient) -> None:
    for headers in ({"Content-Type": "text/plain"}, {}, {"Content-Type": "multipart/form-data"}):
        response = await client.post("/v1/completions", content=b"{}", headers=headers)
        assert response.status_code == 415
        assert "Content-Type: application/json" in str(error_of(response)["message"])


async def test_a_body_that_is_too_large(make_client: MakeClient) -> None:
    client = make_client(max_body_bytes=2000)
    assert (await complete(client, prompt="x" * 100)).status_code == 200

    async def unannounced() -> AsyncGenerator[bytes]:
        for _ in range(30):
            yield b" " * 100

    announced = await complete(client, prompt="x" * 2000)
    headers = {"Content-Type": "application/json"}
    chunked = await client.post("/v1/completions", content=unannounced(), headers=headers)
    for response in (announced, chunked):
        assert response.status_code == 413
        error = error_of(response)
        assert error["code"] == "request_too_large"
        assert "2,000 bytes" in str(error["message"])


async def test_a_large_body_is_answered_over_a_real_socket(
    tiny_engine: TorchEngine, registry: Registry
) -> None:
    """The server discards the body, so a client that sends it all first can read the answer."""
    app = build_app(tiny_engine, registry, max_body_bytes=2000)
    async with live(app) as server, httpx.AsyncClient(base_url=server.url) as client:
        response = await complete(client, prompt="x" * 20_000_000)
        assert response.status_code == 413
        assert error_of(response)["code"] == "request_too_large"
        assert await text_of(client)


async def test_a_body_that_stalls(tiny_engine: TorchEngine, registry: Registry) -> None:
    app = build_app(tiny_engine, registry, body_timeout=0.2)
    async with live(app) as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\n"
            b'Content-Length: 100\r\n\r\n{"model": '
        )
        async with asyncio.timeout(10):
            answer = await reader.read()
        writer.close()
        await writer.wait_closed()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert json.loads(body)["error"]["code"] == "body_timeout"


async def test_unknown_routes_and_methods(client: httpx.AsyncClient) -> None:
    for method, path, status, code in (
        ("GET", "/", 404, "unknown_url"),
        ("GET", "/v1/nothing", 404, "unknown_url"),
        ("GET", "/" + "x" * 20_000, 404, "unknown_url"),
        ("X" * 20_000, "/health", 405, "method_not_allowed"),
        ("GET", "/v1/models/" + "x" * 20_000, 404, "model_not_found"),
        ("GET", "/v1/interventions/" + "x" * 20_000, 404, "intervention_not_found"),
        ("DELETE", "/v1/interventions/" + "x" * 20_000, 404, "intervention_not_found"),
        ("POST", "/v1/completions/", 404, "unknown_url"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("PUT", "/v1/interventions", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
    ):
        response = await client.request(method, path)
        assert response.status_code == status, path
        assert error_of(response)["code"] == code
        assert len(str(error_of(response)["message"])) < 300


@pytest.mark.parametrize(
    ("refusal", "status", "code", "retry"),
    [
        (QueueFullError("q"), 429, "queue_full", "1"),
        (BankFullError("b"), 503, "intervention_slots_full", "1"),
        (EngineDeadError("secret"), 503, "engine_dead", None),
        (ShuttingDownError("secret"), 503, "shutting_down", "1"),
        (StepFailedError("secret"), 500, "step_failed", None),
        (EngineError("secret"), 500, "internal_error", None),
        (UnservableInterventionError("why"), 400, "intervention_not_servable", None),
        (InvalidRequestError("why", "prompt", "some_code"), 400, "some_code", None),
    ],
)
async def test_what_the_engine_refuses(
    client: httpx.AsyncClient,
    tiny_engine: TorchEngine,
    monkeypatch: pytest.MonkeyPatch,
    refusal: EngineError,
    status: int,
    code: str,
    retry: str | None,
) -> None:
    monkeypatch.setattr(tiny_engine, "submit", Script([refusal]).submit)
    response = await complete(client)
    error = error_of(response)
    assert (response.status_code, error["code"]) == (status, code)
    assert response.headers.get("retry-after") == retry
    assert "secret" not in response.text
    if str(refusal) == "why":
        assert error["message"] == "why"


async def test_internal_error_hides_its_message(
    client: httpx.AsyncClient, tiny_engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(_: object) -> None:
        raise ValueError("secret")

    monkeypatch.setattr(tiny_engine, "submit", fail)
    response = await complete(client)
    assert response.status_code == 500
    assert error_of(response)["code"] == "internal_error"
    assert "secret" not in response.text
    monkeypatch.undo()
    assert await text_of(client)


async def test_the_openai_client_understands_our_errors(
    tiny_engine: TorchEngine, registry: Registry
) -> None:
    async with (
        live(build_app(tiny_engine, registry)) as server,
        AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as openai,
    ):
        with pytest.raises(BadRequestError) as caught:
            await openai.completions.create(model="tiny", prompt="x", temperature=5)
    assert (caught.value.param, caught.value.code) == ("temperature", "invalid_value")


async def test_a_full_queue_refuses_for_real(
    tiny_engine: TorchEngine, registry: Registry, make_client: MakeClient
) -> None:
    client = make_client()
    # The engine runs 32 completions and queues 256, so 4 requests for 128 each cannot all enter.
    answers = await asyncio.gather(
        *(complete(client, n=128, ignore_eos=True, max_tokens=30) for _ in range(4))
    )
    statuses = {answer.status_code for answer in answers}
    assert 429 in statuses
    assert statuses <= {200, 429}
    for answer in answers:
        if answer.status_code == 429:
            error = error_of(answer)
            assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
            assert int(answer.headers["retry-after"]) > 0
    assert await text_of(client)
    assert tiny_engine.stats().waiting == 0


async def test_thousands_of_unknown_fields_are_refused_at_the_first(
    client: httpx.AsyncClient,
) -> None:
    response = await complete(client, **{f"field{number}": 1 for number in range(1001)})
    assert response.status_code == 400
    assert error_of(response)["param"] == "field0"


async def test_a_long_name_is_shown_in_part(
    chat_client: httpx.AsyncClient, affine_artifact: WriteArtifact
) -> None:
    await push(chat_client, affine_artifact("maps"))
    long = "s" * 1_000_000
    for fields in (
        {long: 1},
        {"model": long},
        {"model": f"tiny+{long}"},
        {"steering": {"intervention": long}},
        {"steering": {"intervention": "maps", long: 1}},
        {"steering": {"intervention": "maps", "positions": long}},
        {"steering": {"intervention": "maps", "strength": long}},
        {"stream": True, "stream_options": {long: 1}},
        {"logit_bias": {long: 1}},
        {"logit_bias": {"1": long}},
        {"metadata": {long: 1}},
        {"service_tier": long},
        {"messages": [{"role": long, "content": "a"}]},
        {"messages": [{"role": "user", "content": "a", long: 1}]},
        {"messages": [{"role": "user", "content": [{"type": long, "text": "a"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", long: 1}]}]},
        {"messages": [{"role": "user", "content": "a", "type": long}]},
    ):
        response = await chat(chat_client, **fields)
        error = error_of(response)
        assert response.status_code in (400, 404), list(fields)
        assert len(str(error["message"])) + len(str(error["param"])) < 700, list(fields)


@pytest.mark.parametrize("where", ["manifest", "dtype"])
async def test_an_artifact_whose_text_is_no_unicode(client: httpx.AsyncClient, where: str) -> None:
    manifest = '"\\ud800"' if where == "manifest" else "{}"
    dtype = "\\ud800" if where == "dtype" else "F32"
    tensor = f'{{"dtype":"{dtype}","shape":[1],"data_offsets":[0,4]}}'
    header = f'{{"__metadata__":{{"manifest":{json.dumps(manifest)}}},"x":{tensor}}}'
    content = len(header).to_bytes(8, "little") + header.encode() + bytes(4)
    response = await client.post("/v1/interventions", files={"file": ("x", content)})
    assert response.status_code == 400
    assert error_of(response)["code"] == "invalid_artifact"
