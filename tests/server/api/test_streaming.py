"""Tests of streamed `POST /v1/completions`: its events, and every way in which a stream may end."""

import json

import httpx
import pytest

from interventions.registry import Registry
from server.api.errors import ApiError
from server.engine.errors import (
    EngineDeadError,
    EngineError,
    InvalidRequestError,
    ShuttingDownError,
    StepFailedError,
)
from server.engine.output import StepOutput
from server.engine.torch.engine import TorchEngine
from tests.conftest import WriteArtifact
from tests.live import live
from tests.serving import (
    Script,
    ScriptedGeneration,
    build_app,
    chunks,
    complete,
    error_of,
    events,
    eventually,
    logprobs_of,
    metric,
    push,
    text_of,
    usage,
)

FIRST = StepOutput(token_ids=(1,), text="one")


async def test_the_chunks_join_to_the_answer(client: httpx.AsyncClient) -> None:
    plain = (await complete(client, max_tokens=20, logprobs=2)).json()["choices"][0]
    response = await complete(client, max_tokens=20, logprobs=2, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    stream = chunks(response.text)
    choices = [chunk["choices"][0] for chunk in stream]  # type: ignore[index]
    assert "".join(choice["text"] for choice in choices) == plain["text"]
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(stream) - 1) + [
        plain["finish_reason"]
    ]
    for field, values in plain["logprobs"].items():
        streamed = [value for choice in choices for value in choice["logprobs"][field]]
        if field == "token_logprobs":
            assert streamed == pytest.approx(values)
        elif field != "top_logprobs":
            assert streamed == values
    assert len({chunk["id"] for chunk in stream}) == 1
    assert all(chunk["object"] == "text_completion" for chunk in stream)
    assert all("usage" not in chunk for chunk in stream)


async def test_tokens_are_sent_as_they_come(
    tiny_engine: TorchEngine, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script([ScriptedGeneration(outputs=(FIRST,))])
    monkeypatch.setattr(tiny_engine, "submit", script.submit)
    async with (
        live(build_app(tiny_engine, registry)) as server,
        httpx.AsyncClient(base_url=server.url) as client,
        client.stream(
            "POST", "/v1/completions", json={"model": "tiny", "prompt": "x", "stream": True}
        ) as response,
    ):
        async for line in response.aiter_lines():
            # The generation yields one token and then hangs: the event did not wait for a second.
            assert json.loads(line.removeprefix("data: "))["choices"][0]["text"] == "one"
            break


async def test_several_choices_in_one_stream(client: httpx.AsyncClient) -> None:
    fields: dict[str, object] = {"prompt": ["Hello", "Bye!"], "n": 2, "seed": 3, "temperature": 1}
    plain = (await complete(client, **fields)).json()["choices"]
    texts = [""] * 4
    ends = [0] * 4
    for chunk in chunks((await complete(client, **fields, stream=True)).text):
        [choice] = chunk["choices"]  # type: ignore[misc]
        texts[choice["index"]] += choice["text"]  # type: ignore[has-type]
        ends[choice["index"]] += choice["finish_reason"] is not None  # type: ignore[has-type]
    assert texts == [choice["text"] for choice in plain]
    assert ends == [1] * 4


async def test_usage_comes_last_when_it_is_asked_for(client: httpx.AsyncClient) -> None:
    options = {"include_usage": True}
    response = await complete(client, stream=True, ignore_eos=True, stream_options=options)
    *stream, last = chunks(response.text)
    assert last["choices"] == []
    assert last["usage"] == usage(prompt=5, completion=6)
    assert all(chunk["usage"] is None for chunk in stream)
    assert stream


@pytest.mark.parametrize("include_usage", [False, True])
async def test_usage_in_every_chunk(client: httpx.AsyncClient, include_usage: bool) -> None:
    """The benchmark client guidellm always asks for `continuous_usage_stats`."""
    options = {"include_usage": include_usage, "continuous_usage_stats": True}
    fields: dict[str, object] = {"stream": True, "ignore_eos": True, "stream_options": options}
    stream = chunks((await complete(client, **fields)).text)
    counted = [chunk for chunk in stream if chunk["choices"]]
    completed = [chunk["usage"]["completion_tokens"] for chunk in counted]  # type: ignore[index]
    assert completed == sorted(completed)
    assert counted[-1]["usage"] == usage(prompt=5, completion=6)
    assert len(stream) - len(counted) == include_usage
    assert stream[-1]["usage"] == counted[-1]["usage"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_a_stream_as_guidellm_asks_for_it(chat_client: httpx.AsyncClient, path: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    shared = {"model": "tiny", "stream": True, "stream_options": options, "stop": None}
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    own = (
        {"prompt": "Hello", "max_tokens": 4}
        if path == "/v1/completions"
        else {"messages": messages, "max_completion_tokens": 4}
    )
    response = await chat_client.post(path, json={**shared, **own, "ignore_eos": True})
    assert response.status_code == 200, response.text
    stream = chunks(response.text)
    # guidellm takes the first count for the tokens of the first text, and the last for the total. A
    # chunk has several tokens if the engine was faster than the event loop.
    counts: list[int] = [chunk["usage"]["completion_tokens"] for chunk in stream]  # type: ignore[index]
    assert counts == sorted(counts)
    assert counts[0] > 0
    assert counts[-1] == 4


async def test_usage_in_every_chunk_counts_all_choices(client: httpx.AsyncClient) -> None:
    options = {"continuous_usage_stats": True}
    fields: dict[str, object] = {"stream": True, "ignore_eos": True, "n": 3, "max_tokens": 4}
    stream = chunks((await complete(client, **fields, stream_options=options)).text)
    assert stream[0]["usage"]["prompt_tokens"] == 5  # type: ignore[index]
    assert stream[-1]["usage"] == usage(prompt=5, completion=12)


async def test_the_last_chunk_says_what_was_applied(
    client: httpx.AsyncClient, affine_artifact: WriteArtifact
) -> None:
    digest = (await push(client, affine_artifact("maps")))["digest"]
    steering = {"intervention": "maps", "strength": 0.25}
    for options in (None, {"include_usage": True}):
        stream = chunks(
            (await complete(client, stream=True, steering=steering, stream_options=options)).text
        )
        assert stream[-1]["steering"] == [
            {
                "intervention": "maps",
                "digest": digest,
                "kind": "affine",
                "settings": {"strength": 0.25, "positions": "all"},
                "source": "request",
            }
        ]
    assert chunks((await complete(client, stream=True)).text)[-1]["steering"] == []


@pytest.mark.parametrize(
    ("error", "code", "outcome"),
    [
        (StepFailedError("secret"), "step_failed", "server_error"),
        (EngineDeadError("secret"), "engine_dead", "unavailable"),
        (ShuttingDownError("secret"), "shutting_down", "unavailable"),
        (InvalidRequestError("too strong", "steering", "overflow"), "overflow", "client_error"),
        (RuntimeError("secret"), "internal_error", "server_error"),
        (ApiError(504, "too late", code="request_timeout"), "request_timeout", "server_error"),
    ],
)
async def test_an_error_in_the_middle_is_an_event_and_ends_the_stream(
    tiny_engine: TorchEngine,
    registry: Registry,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    code: str,
    outcome: str,
) -> None:
    failing = ScriptedGeneration(outputs=(FIRST,), error=error)
    waiting = ScriptedGeneration(outputs=(FIRST,))
    monkeypatch.setattr(tiny_engine, "submit", Script([failing, waiting]).submit)
    transport = httpx.ASGITransport(app=build_app(tiny_engine, registry))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        response = await complete(client, n=2, stream=True)
        *_, last = events(response.text)
        body = json.loads(last)
        assert set(body) == {"error"}
        assert body["error"]["code"] == code
        assert "secret" not in response.text
        assert waiting.cancelled
        failed = f'requests_total{{endpoint="/v1/completions",outcome="{outcome}"}}'
        assert await metric(client, failed) == 1


async def test_an_error_before_the_first_byte_is_an_answer(
    client: httpx.AsyncClient, tiny_engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal: EngineError = StepFailedError("secret")
    monkeypatch.setattr(tiny_engine, "submit", Script([refusal]).submit)
    response = await complete(client, stream=True)
    assert response.status_code == 500
    assert error_of(response)["code"] == "step_failed"
    assert "secret" not in response.text


async def test_a_logprob_that_json_cannot_hold(
    client: httpx.AsyncClient, tiny_engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_engine = await complete(client, logprobs=1)
    assert from_engine.status_code == 200
    logprob = -float("inf")
    scored = (logprobs_of("a", logprob, {"a": logprob}),)
    output = StepOutput((1,), "a", scored, finish_reason="stop")
    monkeypatch.setattr(tiny_engine, "submit", Script([_ended(output), _ended(output)]).submit)
    plain = (await complete(client, logprobs=1)).json()["choices"][0]["logprobs"]
    [chunk] = chunks((await complete(client, logprobs=1, stream=True)).text)
    for body in (plain, chunk["choices"][0]["logprobs"]):  # type: ignore[index]
        assert body["token_logprobs"] == [-9999.0]
        assert body["top_logprobs"] == [{"a": -9999.0}]


async def test_an_echo_is_streamed_before_the_completion(
    client: httpx.AsyncClient, tiny_engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = (logprobs_of("i", -1.0, {"o": -0.5}),)
    outputs = (
        StepOutput((1,), "", (logprobs_of("a", -2.0, {}),), prompt),
        StepOutput((2,), "ab", (logprobs_of("b", -3.0, {}, 1),), finish_reason="length"),
    )
    monkeypatch.setattr(tiny_engine, "submit", Script([ScriptedGeneration(outputs)]).submit)
    response = await complete(client, prompt="Hi", echo=True, logprobs=1, stream=True)
    first, last = (chunk["choices"][0] for chunk in chunks(response.text))  # type: ignore[index]
    assert (first["text"], last["text"]) == ("Hi", "ab")
    assert first["logprobs"] == {
        "tokens": ["H", "i"],
        "token_logprobs": [None, -1.0],
        "top_logprobs": [None, {"o": -0.5, "i": -1.0}],
        "text_offset": [0, 1],
    }
    # A token is listed with its text: the first output had none, so its token waited.
    assert last["logprobs"]["tokens"] == ["a", "b"]
    assert last["logprobs"]["text_offset"] == [2, 3]


async def test_an_echo_of_every_choice_is_streamed(client: httpx.AsyncClient) -> None:
    fields: dict[str, object] = {"prompt": ["Hello", "Bye!"], "n": 2, "seed": 3, "temperature": 1}
    plain = (await complete(client, **fields)).json()["choices"]
    texts = [""] * 4
    for chunk in chunks((await complete(client, **fields, echo=True, stream=True)).text):
        [choice] = chunk["choices"]  # type: ignore[misc]
        texts[choice["index"]] += choice["text"]  # type: ignore[has-type]
    prompts = ("Hello", "Hello", "Bye!", "Bye!")
    assert texts == [prompt + choice["text"] for prompt, choice in zip(prompts, plain, strict=True)]


async def test_a_text_may_hold_whatever_some_clients_take_for_the_end_of_a_line(
    client: httpx.AsyncClient, tiny_engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "a\u2028b\u2029c\u0085d\x0b\x0c\x1c\r\n\u00e9\U0001f600"
    output = StepOutput((1,), text, finish_reason="stop")
    monkeypatch.setattr(tiny_engine, "submit", Script([_ended(output)]).submit)
    body = {"model": "tiny", "prompt": "x", "stream": True}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        first, *rest = [line async for line in response.aiter_lines()]
    assert json.loads(first.removeprefix("data: "))["choices"][0]["text"] == text
    assert rest == ["", "data: [DONE]", ""]


async def test_a_closed_socket_frees_the_engine(
    tiny_engine: TorchEngine, registry: Registry, affine_artifact: WriteArtifact
) -> None:
    entry = registry.add(affine_artifact("maps"))
    body = {
        "model": "tiny+maps",
        "prompt": "Hello",
        "max_tokens": 500,
        "ignore_eos": True,
        "n": 16,
        "stream": True,
    }
    async with (
        live(build_app(tiny_engine, registry)) as server,
        httpx.AsyncClient(base_url=server.url) as client,
    ):
        async with client.stream("POST", "/v1/completions", json=body) as response:
            async for _ in response.aiter_bytes():
                break
        registry.delete("maps")
        await eventually(lambda: tiny_engine.stats().running == 0)
        await eventually(lambda: not registry.path(entry.digest).exists())
        cancelled = 'requests_total{endpoint="/v1/completions",outcome="cancelled"}'
        assert await metric(client, cancelled) == 1
        assert await metric(client, "generation_tokens_total") < 16 * 500
        assert await text_of(client)


def _ended(output: StepOutput) -> ScriptedGeneration:
    return ScriptedGeneration(outputs=(output,))
