"""Tests of `POST /v1/chat/completions` on the real engine: OpenAI's shapes, streamed and not."""

import asyncio
import json

import httpx
import pytest
from openai import AsyncOpenAI

from interventions.registry import Registry
from server.api.errors import ApiError
from server.config import ConfigurationError
from server.engine.errors import StepFailedError
from server.engine.output import StepOutput
from server.engine.torch.engine import TorchEngine
from tests.conftest import WriteArtifact
from tests.live import live
from tests.serving import (
    SAMPLING,
    SAMPLING_FIELDS,
    Connection,
    Json,
    Script,
    ScriptedGeneration,
    build_app,
    chat,
    chunks,
    complete,
    error_of,
    events,
    eventually,
    logprobs_of,
    push,
    text_of,
    usage,
    user,
)

RENDERED = "<user>Hello<assistant>"  # the message "Hello" by the tiny chat template


async def test_the_answer_has_openais_shape(chat_client: httpx.AsyncClient) -> None:
    body = (await chat(chat_client, ignore_eos=True)).json()
    assert body["id"].startswith("chatcmpl-")
    assert isinstance(body["created"], int)
    assert body["system_fingerprint"].startswith("fp_")
    assert (body["object"], body["model"], body["steering"]) == ("chat.completion", "tiny", [])
    prompt = len(RENDERED)
    assert body["usage"] == usage(prompt, 6)
    [choice] = body["choices"]
    assert set(choice) == {"index", "message", "logprobs", "finish_reason"}
    assert (choice["index"], choice["logprobs"], choice["finish_reason"]) == (0, None, "length")
    content = await text_of(chat_client, prompt=RENDERED, ignore_eos=True)
    assert choice["message"] == {"role": "assistant", "content": content, "refusal": None}


async def test_the_openai_client_chats_and_steers(
    chat_engine: TorchEngine, registry: Registry, affine_artifact: WriteArtifact
) -> None:
    entry = registry.add(affine_artifact("maps"))
    async with (
        live(build_app(chat_engine, registry)) as server,
        AsyncOpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0) as openai,
    ):
        base = await openai.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Hello"}], max_tokens=8, seed=1
        )
        steered = await openai.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "Hello"}],
            max_completion_tokens=8,
            temperature=0,
            logprobs=True,
            top_logprobs=2,
            extra_body={"steering": {"intervention": "maps"}},
        )
        stream = await openai.chat.completions.create(
            model="tiny+maps",
            messages=[{"role": "user", "content": "Hello"}],
            max_tokens=8,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        streamed = [chunk async for chunk in stream]
        async with openai.chat.completions.stream(
            model="tiny+maps",
            messages=[{"role": "user", "content": "Hello"}],
            max_tokens=8,
            temperature=0,
            logprobs=True,
        ) as helper:
            async for _ in helper:
                gathered = helper.current_completion_snapshot
    assert base.choices[0].message.content != steered.choices[0].message.content
    assert steered.model_extra is not None
    assert steered.model_extra["steering"][0]["digest"] == entry.digest
    assert steered.choices[0].logprobs is not None
    assert steered.choices[0].logprobs.content is not None
    assert len(steered.choices[0].logprobs.content[0].top_logprobs) == 2
    texts = [choice.delta.content or "" for chunk in streamed for choice in chunk.choices]
    assert "".join(texts) == steered.choices[0].message.content
    assert streamed[-1].usage is not None
    assert steered.usage is not None
    assert streamed[-1].usage.total_tokens == steered.usage.total_tokens
    assert streamed[-1].model_extra is not None
    assert streamed[-1].model_extra["steering"][0]["source"] == "model"
    message = gathered.choices[0].message
    assert (message.role, message.content) == ("assistant", steered.choices[0].message.content)
    assert gathered.choices[0].logprobs is not None
    assert gathered.choices[0].logprobs.content is not None
    assert len(gathered.choices[0].logprobs.content) == 8


async def test_the_chunks_join_to_the_answer(chat_client: httpx.AsyncClient) -> None:
    fields: dict[str, object] = {"max_tokens": 20, "logprobs": True, "top_logprobs": 2}
    plain = (await chat(chat_client, **fields)).json()["choices"][0]
    stream = chunks((await chat(chat_client, **fields, stream=True)).text)
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in stream)
    assert len({chunk["id"] for chunk in stream}) == 1
    assert all("usage" not in chunk for chunk in stream)
    first, *middle, last = (chunk["choices"][0] for chunk in stream)  # type: ignore[index]
    assert first == {
        "index": 0,
        "delta": {"role": "assistant", "content": "", "refusal": None},
        "logprobs": None,
        "finish_reason": None,
    }
    assert last == {
        "index": 0,
        "delta": {},
        "logprobs": None,
        "finish_reason": plain["finish_reason"],
    }
    assert {tuple(choice["delta"]) for choice in middle} == {("content",)}
    texts = [choice["delta"]["content"] for choice in middle]
    assert "".join(texts) == plain["message"]["content"]
    tokens = [token for choice in middle for token in choice["logprobs"]["content"]]
    expected = plain["logprobs"]["content"]
    assert [token["token"] for token in tokens] == [token["token"] for token in expected]
    assert [token["logprob"] for token in tokens] == pytest.approx(
        [token["logprob"] for token in expected]
    )


async def test_logprobs_token_by_token(
    chat_client: httpx.AsyncClient, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = (
        logprobs_of("\u00e9", -0.5, {"\u00e9": -0.5, "b": -1.0}),
        logprobs_of("c", -float("inf"), {"d": -0.1}),
    )
    output = StepOutput((1, 2), "\u00e9c", rows, finish_reason="stop")
    script.steps[:] = [ScriptedGeneration((output,))]
    body = (await chat(chat_client, logprobs=True, top_logprobs=2)).json()
    e = {"token": "\u00e9", "logprob": -0.5, "bytes": [0xC3, 0xA9]}
    b, d = ({"token": t, "logprob": p, "bytes": [ord(t)]} for t, p in (("b", -1.0), ("d", -0.1)))
    assert body["choices"][0]["logprobs"] == {
        "content": [
            {**e, "top_logprobs": [e, b]},
            {"token": "c", "logprob": -9999.0, "bytes": [99], "top_logprobs": [d]},
        ],
        "refusal": None,
    }
    assert script.submitted[0].sampling.logprobs == 2


@pytest.mark.parametrize(
    ("fields", "logprobs"),
    [
        ({}, None),
        ({"logprobs": False}, None),
        ({"logprobs": None, "top_logprobs": None}, None),
        ({"logprobs": False, "top_logprobs": 0}, None),
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 20}, 20),
    ],
)
async def test_how_many_logprobs(
    chat_client: httpx.AsyncClient, script: Script, fields: Json, logprobs: int | None
) -> None:
    assert (await chat(chat_client, **fields)).status_code == 200
    assert script.submitted[0].sampling.logprobs == logprobs


@pytest.mark.parametrize(
    ("fields", "max_tokens"),
    [
        ({"max_tokens": None}, 512 - len(RENDERED)),
        ({"max_tokens": 3}, 3),
        ({"max_tokens": None, "max_completion_tokens": 4}, 4),
        ({"max_tokens": 4, "max_completion_tokens": 4}, 4),
        ({"max_tokens": None, "messages": [user("x" * 600)]}, 1),
    ],
)
async def test_the_longest_answer(
    chat_client: httpx.AsyncClient, script: Script, fields: Json, max_tokens: int
) -> None:
    assert (await chat(chat_client, **fields)).status_code == 200
    assert script.submitted[0].sampling.max_tokens == max_tokens


@pytest.mark.parametrize(
    ("fields", "max_tokens"),
    [
        ({"max_tokens": None}, 20),
        ({"max_tokens": 30}, 30),
        ({"max_tokens": None, "max_completion_tokens": 40}, 40),
        ({"max_tokens": None, "messages": [user("x" * 485)]}, 10),
        ({"max_tokens": None, "messages": [user("x" * 600)]}, 1),
    ],
)
async def test_the_longest_answer_where_the_operator_limits_it(
    chat_engine: TorchEngine, registry: Registry, script: Script, fields: Json, max_tokens: int
) -> None:
    app = build_app(chat_engine, registry, default_max_tokens=20)
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        assert (await chat(client, **fields)).status_code == 200
    assert script.submitted[0].sampling.max_tokens == max_tokens


def test_a_limit_that_leaves_no_room_for_messages(
    chat_engine: TorchEngine, registry: Registry
) -> None:
    with pytest.raises(ConfigurationError, match=r"--default-max-tokens.* 512 tokens"):
        build_app(chat_engine, registry, default_max_tokens=512)
    build_app(chat_engine, registry, default_max_tokens=511)


async def test_no_limit_fills_the_context(chat_client: httpx.AsyncClient) -> None:
    content = "x" * 480
    messages = [user(content)]
    body = (await chat(chat_client, messages=messages, max_tokens=None, ignore_eos=True)).json()
    assert body["usage"]["total_tokens"] == 512
    assert body["choices"][0]["finish_reason"] == "length"


async def test_sampling_reaches_the_engine(chat_client: httpx.AsyncClient, script: Script) -> None:
    assert (await chat(chat_client, **SAMPLING_FIELDS)).status_code == 200
    [request] = script.submitted
    assert request.sampling == SAMPLING


TOOLS: list[Json] = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
WRONG_FIELDS: tuple[tuple[Json, str], ...] = (
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
    ({"top_logprobs": 1}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": 1}, "logprobs"),
    ({"n": 129}, "n"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"service_tier": "priority"}, "service_tier"),
    ({"metadata": {"a": 1}}, "metadata.a"),
    ({"min_p": 1.5}, "min_p"),
    ({"prompt": "a"}, "prompt"),
    ({"echo": True}, "echo"),
    ({"best_of": 1}, "best_of"),
    ({"chat_template": "x"}, "chat_template"),
    ({"max_completion_token": 5}, "max_completion_token"),
    ({"response_fromat": None}, "response_fromat"),
    ({"tools": "none"}, "tools"),
    ({"tools": [1] * 300_000, "tool_choice": "none"}, "tools.0"),
    ({"tools": TOOLS}, "tools"),
    ({"tools": TOOLS, "tool_choice": None}, "tools"),
    ({"tools": TOOLS, "tool_choice": "auto"}, "tools"),
    ({"tools": TOOLS, "function_call": "none"}, "tools"),
    ({"functions": [{"name": "f"}], "tool_choice": "none"}, "functions"),
    ({"functions": [{"name": "f"}], "function_call": {"name": "f"}}, "function_call"),
)
UNSUPPORTED: tuple[Json, ...] = (
    {"tools": [{"type": "function", "function": {"name": "f"}}]},
    {"functions": [{"name": "f"}]},
    {"function_call": "auto"},
    {"modalities": ["text", "audio"]},
    {"audio": {"voice": "x"}},
    {"moderation": {}},
    {"reasoning_effort": "low"},
    {"store": True},
    {"verbosity": "low"},
    {"web_search_options": {}},
)
HARMLESS: Json = {
    "tools": [],
    "tool_choice": "none",
    "functions": [],
    "function_call": "none",
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "audio": None,
    "moderation": None,
    "reasoning_effort": "none",
    "store": False,
    "verbosity": "medium",
    "web_search_options": None,
    "parallel_tool_calls": True,
    "metadata": {"a": "b"},
    "prediction": {"type": "content", "content": "x"},
    "prompt_cache_key": "k",
    "prompt_cache_options": {},
    "prompt_cache_retention": "24h",
    "safety_identifier": "s",
    "service_tier": "auto",
    "user": "u",
    "logit_bias": {},
    "n": 1,
    "stop": [],
}


NOT_TO_BE_CALLED: tuple[Json, ...] = (
    {"tools": TOOLS, "tool_choice": "none", "parallel_tool_calls": False},
    {"functions": [{"name": "f"}], "function_call": "none"},
)


async def test_a_wrong_field_is_named(chat_client: httpx.AsyncClient) -> None:
    for fields, param in WRONG_FIELDS:
        response = await chat(chat_client, **fields)
        error = error_of(response)
        assert (response.status_code, error["param"]) == (400, param), fields


async def test_a_field_that_we_cannot_honour_is_named(chat_client: httpx.AsyncClient) -> None:
    for fields in UNSUPPORTED:
        response = await chat(chat_client, **fields)
        error = error_of(response)
        assert (response.status_code, error["code"]) == (400, "unsupported_parameter"), fields
        assert [error["param"]] == list(fields)


async def test_a_field_that_asks_for_nothing_changes_nothing(
    chat_client: httpx.AsyncClient,
) -> None:
    plain = (await chat(chat_client)).json()["choices"]
    assert (await chat(chat_client, **HARMLESS)).json()["choices"] == plain
    for fields in NOT_TO_BE_CALLED:
        assert (await chat(chat_client, **fields)).json()["choices"] == plain
    nothing = dict.fromkeys(set(HARMLESS) | {"seed", "top_p", "logprobs", "stream_options"})
    assert (await chat(chat_client, **nothing)).json()["choices"] == plain


async def test_a_conversation_that_is_too_long(chat_client: httpx.AsyncClient) -> None:
    for content, fields, param in (
        ("x" * 600, {}, "messages"),
        ("x" * 600, {"max_tokens": None}, "messages"),
        ("x" * 20_000, {}, "messages"),  # so long that a thread tokenizes it
        ("x", {"max_tokens": 512}, "max_tokens"),
        ("x", {"max_tokens": None, "max_completion_tokens": 512}, "max_completion_tokens"),
    ):
        response = await chat(chat_client, messages=[user(content)], **fields)
        error = error_of(response)
        assert (response.status_code, error["param"]) == (400, param)
        assert error["code"] == "context_length_exceeded"


async def test_choices_draw_by_seeds_that_follow_each_other(
    chat_client: httpx.AsyncClient,
) -> None:
    sampled: dict[str, object] = {"temperature": 1.5, "max_tokens": 12}
    body = (await chat(chat_client, **sampled, n=2, seed=7)).json()
    texts = [choice["message"]["content"] for choice in body["choices"]]
    assert texts[0] != texts[1]
    assert body["usage"]["prompt_tokens"] == len(RENDERED)
    for index, text in enumerate(texts):
        assert text == await text_of(chat_client, **sampled, prompt=RENDERED, seed=7 + index)
    streamed = ["", ""]
    stream = (await chat(chat_client, **sampled, n=2, seed=7, stream=True)).text
    for chunk in chunks(stream):
        [choice] = chunk["choices"]  # type: ignore[misc]
        streamed[choice["index"]] += choice["delta"].get("content", "")  # type: ignore[has-type]
    assert streamed == texts


async def test_too_many_completions(chat_engine: TorchEngine, registry: Registry) -> None:
    app = build_app(chat_engine, registry, max_completions_per_request=3)
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        error = error_of(await chat(client, n=4))
    assert (error["code"], error["param"]) == ("too_many_completions", "n")


async def test_steering_is_applied_and_told(
    chat_client: httpx.AsyncClient, affine_artifact: WriteArtifact
) -> None:
    digest = (await push(chat_client, affine_artifact("maps")))["digest"]
    steering = {"intervention": "maps", "strength": 0.5}
    plain = (await chat(chat_client)).json()
    body = (await chat(chat_client, steering=steering)).json()
    text = await text_of(chat_client, prompt=RENDERED, steering=steering)
    assert body["choices"][0]["message"]["content"] == text
    assert plain["choices"] != body["choices"]
    assert body["steering"][0]["digest"] == digest
    for n, options in ((1, None), (2, {"include_usage": True})):
        fields = {"steering": steering, "stream": True, "n": n, "stream_options": options}
        stream = chunks((await chat(chat_client, **fields)).text)
        told = [chunk for chunk in stream if "steering" in chunk]
        assert all(chunk["steering"] == body["steering"] for chunk in told)
        ends = [
            chunk
            for chunk in stream
            if any(choice["finish_reason"] for choice in chunk["choices"])  # type: ignore[attr-defined]
        ]
        assert len(ends) == n
        usage = stream[-1:] if options else []
        assert told == ends + usage
        assert all(chunk["object"] == "chat.completion.chunk" for chunk in stream)


async def test_the_policy_holds_for_chats(
    chat_engine: TorchEngine, registry: Registry, affine_artifact: WriteArtifact
) -> None:
    registry.add(affine_artifact("maps"))
    default = {"intervention": "maps"}
    app = build_app(
        chat_engine, registry, default_steering=default, steering_policy="locked", api_key="k"
    )
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        assert (await chat(client)).status_code == 401
        client.headers["Authorization"] = "Bearer k"
        body = (await chat(client)).json()
        assert body["steering"][0]["source"] == "default"
        for fields in ({"steering": None}, {"steering": {**default, "strength": 0.1}}):
            response = await chat(client, **fields)
            assert response.status_code == 403
            assert error_of(response)["code"] == "steering_locked"
        response = await chat(client, model="other")
        assert (response.status_code, error_of(response)["param"]) == (404, "model")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (StepFailedError("secret"), "step_failed"),
        (ApiError(504, "too late", code="request_timeout"), "request_timeout"),
    ],
)
async def test_an_error_in_the_middle_is_an_event(
    chat_client: httpx.AsyncClient, script: Script, error: Exception, code: str
) -> None:
    script.steps[:] = [ScriptedGeneration((StepOutput((1,), "one"),), error)]
    first, second, last = map(json.loads, events((await chat(chat_client, stream=True)).text))
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert second["choices"][0]["delta"] == {"content": "one"}
    assert last["error"]["code"] == code


async def test_a_client_that_leaves_frees_the_engine(
    chat_engine: TorchEngine, registry: Registry
) -> None:
    app = build_app(chat_engine, registry)
    body = {"model": "tiny", "messages": [user()], "ignore_eos": True, "n": 8, "stream": True}
    connection = Connection(body, "/v1/chat/completions")
    running = asyncio.create_task(connection.run(app))
    await eventually(lambda: len(connection.sent) > 3)
    assert chat_engine.stats().running > 0
    connection.leave.set()
    await running
    await eventually(lambda: chat_engine.stats().running + chat_engine.stats().waiting == 0)


async def test_text_that_lags_behind_its_tokens(
    chat_client: httpx.AsyncClient, script: Script
) -> None:
    outputs = (
        StepOutput((1,), ""),
        StepOutput((2,), "\u00e9"),
        StepOutput((3,), "", finish_reason="stop"),
    )
    script.steps[:] = [ScriptedGeneration(outputs)]
    stream = chunks((await chat(chat_client, stream=True)).text)
    deltas = [chunk["choices"][0]["delta"] for chunk in stream]  # type: ignore[index]
    assert deltas == [
        {"role": "assistant", "content": "", "refusal": None},
        {"content": "\u00e9"},
        {},
    ]


async def test_the_other_endpoint_takes_no_messages(chat_client: httpx.AsyncClient) -> None:
    error = error_of(await complete(chat_client, messages=[user()]))
    assert (error["param"], error["code"]) == ("messages", "unknown_parameter")
