"""Tests that the API is the same over both engines: the same refusals, answers and echoes.

Each test runs on one engine, and compares each body with that of the embedded engine.
"""

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
import torch

from interventions.artifact import write_artifact
from server.engine.torch.loaded_interventions import Parameters
from steering.affine import AffineMap
from tests.both_engines import CONTEXT, ROOMY, Subject, each_engine, started
from tests.manifests import manifest_of
from tests.serving import Json, build_app, bytes_of, chunks, error_of
from tests.tiny import SITES, WIDTH, random_head, random_maps

pytestmark = [pytest.mark.asyncio(loop_scope="session"), each_engine]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
DEFAULTS: Mapping[str, Json] = {
    COMPLETIONS: {"model": "tiny", "prompt": "Hello", "max_tokens": 6, "temperature": 0},
    CHAT: {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 6,
        "temperature": 0,
    },
}
HUGE = {site: AffineMap(torch.full((WIDTH,), 1e38), torch.full((WIDTH,), 1e38)) for site in SITES}
STORED: Mapping[str, Parameters] = {
    "maps": random_maps(21),
    "gated": random_maps(22, support=True, gate=True),
    "head": random_head(23),
    "huge": HUGE,
}
MAPS, HEAD, HUGE_MAPS = ({"intervention": name} for name in ("maps", "head", "huge"))
UNKNOWN = "sha256:" + "0" * 64
LONG = "x" * CONTEXT
LONG_MESSAGES = [{"role": "user", "content": LONG}]
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def message(content: object, role: str = "user") -> Json:
    return {"messages": [{"role": role, "content": content}]}


def wrong(name: str, *values: object) -> Iterator[tuple[str, Json, str]]:
    """Yield completions with wrong values of a field."""
    for value in values:
        yield COMPLETIONS, {name: value}, name


# (status, code) -> requests (path, fields, the field that is named)
REFUSED: Mapping[tuple[int, str | None], tuple[tuple[str, Json, str], ...]] = {
    (400, None): (
        (COMPLETIONS, {"prompt": ""}, "prompt"),
        (COMPLETIONS, {"prompt": [259]}, "prompt"),
        (COMPLETIONS, {"prompt": [[5], [259]]}, "prompt"),
        (COMPLETIONS, {"prompt": [2**31 - 1]}, "prompt"),
        (COMPLETIONS, {"prompt": [259], "max_tokens": 0, "echo": True}, "prompt"),
        (COMPLETIONS, {"logit_bias": {"259": 1}}, "logit_bias"),
        (COMPLETIONS, {"stop_token_ids": [259]}, "stop_token_ids"),
        (COMPLETIONS, {"min_tokens": 7}, "min_tokens"),
        (COMPLETIONS, {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        (COMPLETIONS, {"model": "tiny+maps", "steering": MAPS}, "steering"),
        (CHAT, message("Hello", "assistant"), "messages"),  # the template refuses it
        (CHAT, {"top_logprobs": 1}, "top_logprobs"),
        (CHAT, {"logit_bias": {"259": 1}}, "logit_bias"),
    ),
    (400, "context_length_exceeded"): (
        (COMPLETIONS, {"prompt": LONG}, "prompt"),
        (COMPLETIONS, {"prompt": LONG, "max_tokens": 1, "stream": True}, "prompt"),
        (COMPLETIONS, {"prompt": "x" * 20_000}, "prompt"),
        (COMPLETIONS, {"prompt": ["a", LONG]}, "prompt"),
        (COMPLETIONS, {"prompt": [5] * 300}, "prompt"),
        (COMPLETIONS, {"prompt": LONG[:250], "max_tokens": 7}, "max_tokens"),
        (COMPLETIONS, {"max_tokens": 1000}, "max_tokens"),
        (COMPLETIONS, {"prompt": LONG + "x", "max_tokens": 0, "echo": True}, "prompt"),
        (CHAT, {"messages": LONG_MESSAGES}, "messages"),
        (CHAT, {"max_tokens": 250}, "max_tokens"),
    ),
    (400, "invalid_value"): (
        *wrong("prompt", [], [[]], [-1], [10**30]),
        *wrong("max_tokens", 0, -1, 10**400),
        *wrong("temperature", -0.1, 2.1),
        (COMPLETIONS, {"top_p": 1.01}, "top_p"),
        (COMPLETIONS, {"top_k": -2}, "top_k"),
        (COMPLETIONS, {"min_p": 1.1}, "min_p"),
        (COMPLETIONS, {"repetition_penalty": 0}, "repetition_penalty"),
        (COMPLETIONS, {"presence_penalty": 2.1}, "presence_penalty"),
        (COMPLETIONS, {"frequency_penalty": -2.1}, "frequency_penalty"),
        (COMPLETIONS, {"logit_bias": {"a": 1}}, "logit_bias"),
        (COMPLETIONS, {"logit_bias": {"5": 101}}, "logit_bias"),
        (COMPLETIONS, {"logit_bias": {str(token): 1 for token in range(301)}}, "logit_bias"),
        *wrong("n", 0, 129),
        *wrong("stop", "", ["a"] * 33, "x" * 1001),
        *wrong("truncate_prompt_tokens", 0),
        (COMPLETIONS, {"seed": 2**63}, "seed"),
        *wrong("logprobs", -1, 21),
        (COMPLETIONS, {"compare": True}, "compare"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"max_tokens": 0}, "max_tokens"),
        (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens"),
        (CHAT, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (CHAT, {"n": 129}, "n"),
    ),
    (400, "invalid_type"): (
        (COMPLETIONS, {"seed": 1.5}, "seed"),
        (COMPLETIONS, {"steering": "maps"}, "steering"),
        (COMPLETIONS, {"steering": MAPS, "compare": "yes"}, "compare"),
        (CHAT, message(5), "messages[0].content"),
    ),
    (400, "invalid_setting"): (
        (COMPLETIONS, {"steering": {**MAPS, "strength": 1.01}}, "steering.strength"),
        (COMPLETIONS, {"steering": {**MAPS, "eta": 0.5}}, "steering.eta"),
        (COMPLETIONS, {"steering": {**MAPS, "positions": "some"}}, "steering.positions"),
        (COMPLETIONS, {"steering": {**HEAD, "iterations": 65}}, "steering.iterations"),
        (CHAT, {"steering": {**MAPS, "strength": -0.1}}, "steering.strength"),
    ),
    (400, "too_many_interventions"): ((COMPLETIONS, {"steering": [MAPS] * 5}, "steering"),),
    (400, "unknown_parameter"): (
        (COMPLETIONS, {"steerng": MAPS}, "steerng"),
        (CHAT, {"echo": True}, "echo"),
    ),
    (400, "unsupported_parameter"): (
        (COMPLETIONS, {"best_of": 2}, "best_of"),
        (COMPLETIONS, {"suffix": "end"}, "suffix"),
        (CHAT, message("Hello", "robot"), "messages[0].role"),
        (CHAT, {"functions": [{"name": "f"}]}, "functions"),
    ),
    (400, "steering_overflow"): tuple(
        (path, {"steering": HUGE_MAPS, **fields}, "steering")
        for path, fields in (
            (COMPLETIONS, {}),
            (COMPLETIONS, {"steering": [MAPS, HUGE_MAPS], "n": 2}),
            (COMPLETIONS, {"prompt": ["Hello", "Bye!"], "logprobs": 2}),
            (COMPLETIONS, {"echo": True, "logprobs": 1}),
            (COMPLETIONS, {"echo": True, "logprobs": 0, "max_tokens": 0}),
            (COMPLETIONS, {"compare": True}),
            (COMPLETIONS, {"logit_bias": {"65": 100}}),
            (COMPLETIONS, {"temperature": 1, "seed": 1, "top_k": 5}),
            (CHAT, {}),
            (CHAT, {"logprobs": True, "top_logprobs": 3}),
        )
    ),
    (404, "model_not_found"): ((COMPLETIONS, {"model": "other"}, "model"),),
    (404, "intervention_not_found"): (
        (COMPLETIONS, {"model": "tiny+mops"}, "model"),
        (COMPLETIONS, {"steering": {"intervention": "mops"}}, "steering.intervention"),
        (COMPLETIONS, {"steering": {"intervention": UNKNOWN}}, "steering.intervention"),
        (CHAT, {"steering": [MAPS, {"intervention": "mops"}]}, "steering[1].intervention"),
    ),
}
ANSWERED: tuple[tuple[str, Json], ...] = tuple(
    (path, {"max_tokens": 12, **fields, "steering": steering})
    for steering in (
        None,
        MAPS,
        {**MAPS, "strength": 0.5, "positions": "generated"},
        {**MAPS, "strength": 0},
        {**HEAD, "eta": 0.2, "iterations": 2, "direction_scale": 0.5},
        [{"intervention": "gated", "strength": 0.4}, HEAD, {**MAPS, "positions": "prompt"}],
    )
    for path, fields in (
        (COMPLETIONS, {"logprobs": 3}),
        (
            COMPLETIONS,
            {"prompt": [[72, 105], [66, 121, 101]], "n": 2, "stop": ["q", "\ufffd\ufffd"]},
        ),
        (COMPLETIONS, {"echo": True, "logprobs": 5}),
        (COMPLETIONS, {"echo": True, "logprobs": 0, "max_tokens": 0, "prompt": LONG}),
        (COMPLETIONS, {"frequency_penalty": 1, "logit_bias": {"65": 5, "66": -100}}),
        (CHAT, {"logprobs": True, "top_logprobs": 4}),
        (CHAT, {"max_tokens": None, "max_completion_tokens": 7, "n": 2}),
        (COMPLETIONS, {"stop_token_ids": [*range(40)], "include_stop_str_in_output": True}),
        (COMPLETIONS, {"stop_token_ids": [*range(60)], "min_tokens": 5, "return_token_ids": True}),
        (COMPLETIONS, {"prompt_logprobs": 3, "truncate_prompt_tokens": 4, "logprobs": 20}),
        (CHAT, {"prompt_logprobs": 0, "return_token_ids": True, "skip_special_tokens": False}),
        (CHAT, {"logprobs": True, "top_logprobs": 2, "return_tokens_as_token_ids": True}),
        (CHAT, {"tools": TOOLS, "logprobs": True, "stop": ["q"]}),
        (
            CHAT,
            {"max_tokens": None, "ignore_eos": True, **message(LONG[:230])},
        ),  # fills the context
    )
)


@asynccontextmanager
async def served(subject: Subject, folder: Path) -> AsyncIterator[httpx.AsyncClient]:
    """Serve the stored interventions over an engine."""
    for name, parameters in STORED.items():
        path = folder / f"{name}.safetensors"
        write_artifact(path, manifest_of(parameters, subject.engine.model, name), parameters)
        subject.registry.add(path, name)
    app = build_app(subject.engine, subject.registry)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def embedded(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[httpx.AsyncClient]:
    """Serve the embedded engine, beside the one that is tested."""
    async with (
        started(ROOMY[0], tmp_path_factory.mktemp("embedded")) as subject,
        served(subject, tmp_path_factory.mktemp("artifacts")) as client,
    ):
        yield client


@pytest_asyncio.fixture(loop_scope="session")
async def client(subject: Subject, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    async with served(subject, tmp_path) as client:
        yield client


async def post(client: httpx.AsyncClient, path: str, fields: Json) -> httpx.Response:
    return await client.post(path, json={**DEFAULTS[path], **fields})


def assert_alike(found: Any, expected: Any, where: str = "") -> None:
    """Assert that two bodies are equal but for names, times, caching and rounding."""
    assert type(found) is type(expected), where
    if isinstance(found, dict):
        assert found.keys() == expected.keys(), where
        for key in found.keys() - {"id", "created", "prompt_tokens_details"}:
            assert_alike(found[key], expected[key], f"{where}.{key}")
    elif isinstance(found, list):
        assert len(found) == len(expected), where
        for place, pair in enumerate(zip(found, expected, strict=True)):
            assert_alike(*pair, f"{where}[{place}]")
    elif isinstance(found, float):
        assert found == pytest.approx(expected, abs=1e-3), where
    else:
        assert found == expected, where


@pytest.mark.parametrize("refusal", REFUSED, ids=lambda refusal: f"{refusal[1]}")
async def test_what_is_refused(
    client: httpx.AsyncClient, embedded: httpx.AsyncClient, refusal: tuple[int, str | None]
) -> None:
    for path, fields, param in REFUSED[refusal]:
        response = await post(client, path, fields)
        error = error_of(response)
        assert (response.status_code, error["code"], error["param"]) == (*refusal, param), fields
        same = await post(embedded, path, fields)
        assert (response.status_code, response.json()) == (same.status_code, same.json()), fields
    assert (await post(client, COMPLETIONS, {})).status_code == 200


async def test_only_the_embedded_engine_can_be_told_to_call_a_tool(
    client: httpx.AsyncClient, subject: Subject
) -> None:
    demand: Json = {"tools": TOOLS, "tool_choice": "required", "max_tokens": 80}
    response = await post(client, CHAT, demand)
    if subject.setup.engine == "torch":
        assert response.status_code == 200
    else:
        error = error_of(response)
        assert (response.status_code, error["param"]) == (400, "tool_choice")
        assert "vLLM" in str(error["message"])


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_what_is_answered(
    client: httpx.AsyncClient, embedded: httpx.AsyncClient, stream: bool
) -> None:
    for path, fields in ANSWERED:
        asked = fields
        if stream and "prompt_logprobs" in fields:  # not in streams
            continue
        if stream:
            asked = {**fields, "stream": True, "stream_options": {"include_usage": True}}
        one, other = await post(client, path, asked), await post(embedded, path, asked)
        assert (one.status_code, other.status_code) == (200, 200), (fields, one.text)
        if stream:
            found, expected = (joined(each.text) for each in (one, other))
        else:
            found, expected = one.json(), other.json()
        assert_alike(found, expected, str(fields))
        assert found["steering"] == expected["steering"]


def joined(stream: str) -> Json:
    """Return what a stream says, however its text is divided among chunks."""
    answers: dict[Any, Any] = {}
    *parts, last = chunks(stream)
    for part in parts:
        choices: Any = part["choices"]
        for choice in choices:
            answer = answers.setdefault(choice["index"], {"text": "", "reason": None, "scores": []})
            delta = choice.get("delta", {})
            answer["text"] += choice.get("text") or delta.get("content") or ""
            answer["reason"] = choice["finish_reason"] or answer["reason"]
            scores = choice.get("logprobs") or {}
            answer["scores"] += scores.get("content") or scores.get("token_logprobs") or []
    usage: Any = last["usage"]
    return {"answers": answers, "usage": usage, "steering": last["steering"]}


async def test_an_overflow_within_a_stream(
    client: httpx.AsyncClient, embedded: httpx.AsyncClient
) -> None:
    """The stream begins when the first token is there, so that the client gets a status."""
    for path in (COMPLETIONS, CHAT):
        fields = {"steering": HUGE_MAPS, "stream": True}
        one, other = await post(client, path, fields), await post(embedded, path, fields)
        assert (one.status_code, one.text) == (other.status_code, other.text)
        assert "steering_overflow" in one.text


async def test_seeds_fix_the_draws(client: httpx.AsyncClient) -> None:
    """Choices draw by seeds that follow each other; the draws differ from engine to engine."""
    sampled = {"temperature": 1.5, "max_tokens": 12, "steering": MAPS}
    both = (await post(client, COMPLETIONS, {**sampled, "n": 2, "seed": 7})).json()["choices"]
    assert both[0]["text"] != both[1]["text"]
    for index, choice in enumerate(both):
        alone = await post(client, COMPLETIONS, {**sampled, "seed": 7 + index})
        assert alone.json()["choices"][0]["text"] == choice["text"]


async def test_uploads_and_their_refusals(
    client: httpx.AsyncClient,
    embedded: httpx.AsyncClient,
    subject: Subject,
    tmp_path: Path,
) -> None:
    """An artifact that the model cannot take is refused alike, and the registry shows the same."""
    wrong: Mapping[str, Parameters] = {
        "narrow": random_maps(1, width=7),
        "narrow-head": random_head(1, width=7),
        "elsewhere": random_maps(1, sites=("model.layers.7.mlp",)),
    }
    contents = [b"", b"no artifact", b"\xff" * 100]
    for name, parameters in wrong.items():
        path = tmp_path / f"wrong-{name}.safetensors"
        write_artifact(path, manifest_of(parameters, subject.engine.model, name), parameters)
        contents.append(bytes_of(path))
    for content in contents:
        one, other = [
            await each.post("/v1/interventions", files={"file": ("x", content)})
            for each in (client, embedded)
        ]
        assert 400 <= one.status_code < 500
        assert (one.status_code, one.json()) == (other.status_code, other.json())
    listed = [(await each.get("/v1/interventions")).json()["data"] for each in (client, embedded)]
    assert [each["name"] for each in listed[0]] == sorted(STORED)
    assert all(each["servable"] for each in listed[0])
    assert_alike(*listed)


async def test_models_and_unknown_urls(
    client: httpx.AsyncClient, embedded: httpx.AsyncClient
) -> None:
    for method, path, status in (
        ("GET", "/v1/models/other", 404),
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/interventions/mops", 404),
        ("DELETE", "/v1/interventions/mops", 404),
        ("GET", COMPLETIONS, 405),
        ("GET", "/ready", 200),
    ):
        one, other = await client.request(method, path), await embedded.request(method, path)
        assert one.status_code == other.status_code == status
        assert one.json() == other.json()
    ids = [
        [each["id"] for each in (await one.get("/v1/models")).json()["data"]]
        for one in (client, embedded)
    ]
    assert ids[0] == ids[1] == ["tiny", *(f"tiny+{name}" for name in sorted(STORED))]
