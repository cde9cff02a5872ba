"""Tests of steering the embedded SmolLM2, served by `steerserve serve`, with OpenAI's client."""

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.processes import ServerProcess, steerserve

pytestmark = pytest.mark.embedded

MODEL = "smollm2-135m-instruct"
LINEAS: dict[str, Any] = {"intervention": "detox-lineas"}
ARGRE: dict[str, Any] = {"intervention": "detox-argre", "eta": 0.5, "iterations": 5}
PROMPTS = (
    "The capital of France is",
    "My neighbour is such a",
    "Once upon a time, in a village by the sea, there lived an old fisherman who",
    "You are",
)
STEERINGS: tuple[Any, ...] = (
    None,
    {**LINEAS, "strength": 1.0},
    {**LINEAS, "strength": 0.4},
    {**LINEAS, "strength": 1.0, "positions": "generated"},
    ARGRE,
    {**ARGRE, "eta": 0.2, "iterations": 2, "direction_scale": 0.5},
    [{**LINEAS, "strength": 0.7}, ARGRE],
    [ARGRE, {**LINEAS, "strength": 1.0, "positions": "prompt"}],
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("served")
    with steerserve(folder, "--dtype", "float32") as server:
        yield server


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def complete(
    client: openai.OpenAI, steering: object, model: str = MODEL, prompt: str = PROMPTS[1]
) -> Any:
    return client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=12,
        temperature=0,
        logprobs=2,
        extra_body={} if steering is None else {"steering": steering},
    )


def bits(completion: Any) -> list[float]:
    values: list[float] = completion.choices[0].logprobs.token_logprobs
    return values


def echo(completion: Any) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = completion.model_extra["steering"]
    return items


def test_the_echo_says_what_was_applied(client: openai.OpenAI) -> None:
    assert echo(complete(client, None)) == []
    for strength in (0, 0.5, 1):
        (item,) = echo(complete(client, {**LINEAS, "strength": strength}))
        assert item["intervention"] == "detox-lineas"
        assert item["kind"] == "affine"
        assert item["settings"] == {"strength": strength, "positions": "all"}
        assert item["source"] == "request"
    (item,) = echo(complete(client, ARGRE))
    assert item["kind"] == "reward"
    assert item["settings"] == {"eta": 0.5, "iterations": 5, "direction_scale": 1.5}
    both = echo(complete(client, [{**LINEAS, "strength": 1}, ARGRE]))
    assert [item["intervention"] for item in both] == ["detox-lineas", "detox-argre"]
    assert len({item["digest"] for item in both}) == 2


def test_lambda_0_is_the_base_model_to_the_bit_and_the_others_are_not(
    client: openai.OpenAI,
) -> None:
    base = complete(client, None)
    zero = complete(client, {**LINEAS, "strength": 0})
    assert bits(zero) == bits(base)
    assert zero.choices[0].text == base.choices[0].text
    steered = [complete(client, steering) for steering in STEERINGS[1:]]
    assert all(bits(completion) != bits(base) for completion in steered)
    assert bits(complete(client, None)) == bits(base)


def test_the_model_field_can_choose(client: openai.OpenAI) -> None:
    by_model = complete(client, None, model=f"{MODEL}+detox-argre")
    assert [item["source"] for item in echo(by_model)] == ["model"]
    assert f"{MODEL}+detox-argre" in {model.id for model in client.models.list()}
    asked = echo(by_model)[0]["settings"]
    assert bits(by_model) == bits(complete(client, {"intervention": "detox-argre", **asked}))


async def test_32_concurrent_mixed_streams_each_equal_what_they_give_alone(
    server: ServerProcess,
) -> None:
    cases = [(prompt, steering) for prompt in PROMPTS for steering in STEERINGS]
    assert len(cases) == 32
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:

        async def stream(prompt: str, steering: object, delay: float = 0) -> list[Any]:
            await asyncio.sleep(delay)
            chunks = await client.completions.create(
                model=MODEL,
                prompt=prompt,
                max_tokens=16,
                temperature=0,
                logprobs=2,
                stream=True,
                extra_body={"steering": steering, "ignore_eos": True},
            )
            return [chunk async for chunk in chunks]

        together = await asyncio.gather(
            *(stream(*case, delay=0.02 * number) for number, case in enumerate(cases))
        )
        for case, mixed in zip(cases, together, strict=True):
            alone = await stream(*case)
            assert_same_greedy_tokens(alone, mixed)
            applied = mixed[-1].model_extra["steering"]
            asked = case[1] if isinstance(case[1], list) else [case[1]] if case[1] else []
            assert [item["intervention"] for item in applied] == [
                item["intervention"] for item in asked
            ]


def assert_same_greedy_tokens(alone: list[Any], mixed: list[Any]) -> None:
    """Assert equal tokens up to the first place where the two best log-probs lie within 1e-4."""
    compared = 0
    for (token, top), (other, _) in zip(tokens(alone), tokens(mixed), strict=True):
        best, second = sorted(top.values(), reverse=True)[:2]
        if best - second <= 1e-4:
            break
        assert token == other
        compared += 1
    assert compared > 0


def tokens(chunks: list[Any]) -> list[tuple[str, dict[str, float]]]:
    logprobs = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices]
    found = [
        pair
        for values in logprobs
        if values is not None
        for pair in zip(values.tokens, values.top_logprobs, strict=True)
    ]
    assert len(found) == 16
    return found


@pytest.mark.parametrize(
    ("steering", "status", "param", "code"),
    [
        ({"intervention": "detox"}, 404, "steering.intervention", "intervention_not_found"),
        ({**LINEAS, "strength": 1.01}, 400, "steering.strength", "invalid_setting"),
        ({**LINEAS, "eta": 0.5}, 400, "steering.eta", "invalid_setting"),
        ({**ARGRE, "itertions": 5}, 400, "steering.itertions", "invalid_setting"),
        ([LINEAS, {**ARGRE, "iterations": 65}], 400, "steering[1].iterations", "invalid_setting"),
    ],
)
def test_bad_steering_is_an_error_that_names_the_field(
    client: openai.OpenAI, steering: object, status: int, param: str, code: str
) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        complete(client, steering)
    error = refused.value
    assert (error.status_code, error.param, error.code) == (status, param, code)


def test_the_requests_of_the_pages_are_steered_as_they_say(server: ServerProcess) -> None:
    root = Path(__file__).parents[3]
    text = "".join((root / page).read_text() for page in ("README.md", "docs/serving.md"))
    calls = re.findall(r"http://[^/]+(/v1/\S+) .*?-d '(\{.*?\})'", text, re.DOTALL)
    requests = [(path, json.loads(body)) for path, body in calls]
    assert [(path, body["steering"]["intervention"]) for path, body in requests] == [
        ("/v1/completions", "detox-argre"),
        *[("/v1/completions", "detox-lineas")] * 2,
        ("/v1/completions", "detox-argre"),
        ("/v1/completions", "detox-dsas"),
        ("/v1/completions", "detox-lineas"),
        ("/v1/chat/completions", "detox-lineas"),
        ("/v1/responses", "detox-lineas"),
    ]
    choices: list[Any] = []
    for path, body in requests:
        answer = httpx.post(f"{server.url}{path}", json=body, timeout=60).json()
        applied = [item["intervention"] for item in answer["steering"]]
        assert applied == [body["steering"]["intervention"]]
        if body.get("compare"):
            (base,) = answer["comparison"]["toxicity"]
            (served,) = answer["toxicity"]
            assert served < 0.5 < base
        elif path == "/v1/responses":
            assert answer["output"][0]["content"][0]["text"] == choices[-1]["message"]["content"]
        else:
            choices.append(answer["choices"][0])
    texts = {choice.get("text") or choice["message"]["content"] for choice in choices}
    assert len(texts) == len(choices) == 5, "each of them shows another text"


def test_the_tool_of_the_page_is_called_as_it_says(server: ServerProcess) -> None:
    page = (Path(__file__).parents[3] / "docs" / "tools.md").read_text()
    [given] = re.findall(r"-d '(\{.*?\})'", page, re.DOTALL)
    for stream in (False, True):
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        body = json.loads(given)
        steering = {"steering": body.pop("steering")}
        if stream:
            chunks = client.chat.completions.create(**body, extra_body=steering, stream=True)
            deltas = [each.choices[0].delta for each in chunks]
            [call] = [call for each in deltas for call in each.tool_calls or ()]
        else:
            answer = client.chat.completions.create(**body, extra_body=steering)
            [call] = answer.choices[0].message.tool_calls
        assert call.function.name == "get_weather"
        assert json.loads(call.function.arguments)["city"] == "Paris"


@pytest.mark.parametrize("name", ["detox-lineas", "detox-argre", "detox-dsas"])
def test_the_bundled_interventions_are_served_without_a_warning(
    server: ServerProcess, name: str
) -> None:
    shown = httpx.get(f"{server.url}/v1/interventions/{name}").json()
    assert shown["servable"] is True
    assert shown["warnings"] == []
    assert shown["base_model"]["id"] == MODEL
