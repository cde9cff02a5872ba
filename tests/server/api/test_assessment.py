"""Tests of `"toxicity": true` and `"compare": true`: scores, and the base model's answer too."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from interventions.registry import Registry
from server.engine.torch.engine import TorchEngine
from tests.conftest import MakeClient, WriteArtifact
from tests.scoring import TestScorer, score_of, scored_client
from tests.serving import Json, chat, chunks, complete, error_of, eventually, metric, text_of

MAPS: Json = {"intervention": "maps", "strength": 0.9}
SAMPLED: Json = {"temperature": 1.0, "seed": 7, "ignore_eos": True, "max_tokens": 12}


@pytest.fixture
def scorer() -> TestScorer:
    return TestScorer()


@pytest.fixture
async def client(
    tiny_engine: TorchEngine,
    registry: Registry,
    scorer: TestScorer,
    affine_artifact: WriteArtifact,
    reward_artifact: WriteArtifact,
) -> AsyncIterator[httpx.AsyncClient]:
    registry.add(affine_artifact("maps"), "maps")
    registry.add(reward_artifact("head"), "head")
    async with scored_client(tiny_engine, registry, scorer) as client:
        yield client


async def answer(client: httpx.AsyncClient, **fields: object) -> dict[str, Any]:
    response = await complete(client, **fields)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


async def test_the_score_is_of_the_completion_alone(client: httpx.AsyncClient) -> None:
    for fields in ({}, {"echo": True}, {"steering": MAPS}, {"stream": False, "logprobs": 1}):
        text = await text_of(client, **{**fields, "echo": False})
        body = await answer(client, toxicity=True, **fields)
        assert body["toxicity"] == [score_of(text)]
        assert "comparison" not in body
    assert "toxicity" not in await answer(client)
    assert "toxicity" not in await answer(client, toxicity=False)


async def test_every_choice_has_its_own_score(client: httpx.AsyncClient) -> None:
    body = await answer(client, toxicity=True, prompt=["Hello", "Bye"], n=2, **SAMPLED)
    texts = [choice["text"] for choice in body["choices"]]
    assert len(set(texts)) == 4
    assert body["toxicity"] == [score_of(text) for text in texts]


@pytest.mark.parametrize("usage", [False, True])
async def test_a_stream_ends_with_it(client: httpx.AsyncClient, usage: bool) -> None:
    options = {"include_usage": True} if usage else None
    response = await complete(
        client, toxicity=True, stream=True, stream_options=options, steering=MAPS
    )
    *texts, last = chunks(response.text)
    assert last["choices"] == []
    assert last["toxicity"] == [score_of(await text_of(client, steering=MAPS))]
    assert last["steering"] == texts[-1]["steering"]
    assert ("usage" in last) is usage


async def test_without_a_scorer_it_is_refused(make_client: MakeClient) -> None:
    response = await complete(make_client(), toxicity=True)
    assert response.status_code == 400
    error = error_of(response)
    assert (error["param"], error["code"]) == ("toxicity", "unsupported_parameter")


async def test_a_score_that_cannot_be_had_is_an_error(
    client: httpx.AsyncClient, scorer: TestScorer
) -> None:
    scorer.fails = True
    asked: Json = {"toxicity": True, "steering": MAPS}
    response = await complete(client, **asked)
    assert response.status_code == 503
    assert response.headers["retry-after"]
    error = error_of(response)
    assert (error["param"], error["code"]) == ("toxicity", "toxicity_unavailable")
    # The scorer's error message may quote other clients' texts, so it is not passed on.
    assert "as the test wants" not in response.text
    stream = await complete(client, stream=True, **asked)
    assert "toxicity_unavailable" in stream.text
    assert "[DONE]" not in stream.text
    assert await metric(client, "toxicity_dropped_total") == 2
    assert await metric(client, "request_duration_seconds_count") == 0, "they ended badly"
    scorer.fails = False
    assert (await complete(client, **asked)).status_code == 200
    assert await metric(client, "request_duration_seconds_count") == 1


async def test_a_comparison_goes_without_scores_that_cannot_be_had(
    client: httpx.AsyncClient, scorer: TestScorer
) -> None:
    scorer.fails = True
    body = await answer(client, steering=MAPS, compare=True)
    assert body["toxicity"] == body["comparison"]["toxicity"] == [None]
    assert body["comparison"]["choices"][0]["text"]
    assert body["comparison"]["mean_log_ratio"][0] > 0


async def test_a_prompt_that_is_only_read_has_no_score(client: httpx.AsyncClient) -> None:
    body = await answer(client, toxicity=True, max_tokens=0, echo=True, prompt=["a", "b"])
    assert body["toxicity"] == [None, None]
    assert await metric(client, "toxicity_scoring_seconds_count") == 0


async def test_without_a_seed_both_draw_the_same(client: httpx.AsyncClient) -> None:
    nearly_nothing = {"intervention": "maps", "strength": 1e-7}
    asked: Json = {"temperature": 1, "max_tokens": 12, "ignore_eos": True, "n": 2}
    body = await answer(client, steering=nearly_nothing, compare=True, **asked)
    texts, base = (
        [choice["text"] for choice in choices]
        for choices in (body["choices"], body["comparison"]["choices"])
    )
    assert texts == base
    assert len({*texts, (await answer(client, **asked))["choices"][0]["text"]}) == 3


async def test_waiting_for_the_score_ends_with_the_requests_time(
    tiny_engine: TorchEngine, registry: Registry, scorer: TestScorer
) -> None:
    scorer.may_go_on.clear()
    async with scored_client(tiny_engine, registry, scorer, request_timeout=0.5) as client:
        response = await complete(client, toxicity=True)
        assert (response.status_code, error_of(response)["code"]) == (504, "request_timeout")
        scorer.may_go_on.set()


@pytest.mark.parametrize("sampling", [{}, SAMPLED])
async def test_a_comparison_has_what_the_base_model_answers(
    client: httpx.AsyncClient, sampling: Json
) -> None:
    asked: Json = {"prompt": ["Hello", "Bye"], "n": 2, "echo": True, "logprobs": 2, **sampling}
    base = await answer(client, **asked)
    steered = await answer(client, steering=MAPS, **asked)
    body = await answer(client, steering=MAPS, compare=True, **asked)
    assert body["choices"] == steered["choices"]
    assert body["usage"] == steered["usage"]
    comparison = body["comparison"]
    assert comparison["choices"] == base["choices"]
    assert comparison["usage"] == base["usage"]
    plain: Json = {**asked, "echo": False}
    for scores, fields in ((body, {"steering": MAPS}), (comparison, {})):
        choices = (await answer(client, **plain, **fields))["choices"]
        texts = [choice["text"] for choice in choices]
        assert scores["toxicity"] == [score_of(text) for text in texts]


async def test_a_stream_ends_with_the_comparison(client: httpx.AsyncClient) -> None:
    base = await answer(client, n=2, **SAMPLED)
    response = await complete(client, n=2, stream=True, compare=True, steering=MAPS, **SAMPLED)
    last: Any = chunks(response.text)[-1]
    assert last["comparison"]["choices"] == base["choices"]
    assert len(last["toxicity"]) == 2
    steered = await complete(client, n=2, stream=True, steering=MAPS, **SAMPLED)
    assert texts_of(response) == texts_of(steered)


def texts_of(response: httpx.Response) -> dict[object, str]:
    texts: dict[object, str] = {}
    streamed: list[Any] = [*chunks(response.text)]
    for chunk in streamed:
        for choice in chunk["choices"]:
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    return texts


async def test_a_conversation_is_compared_too(
    chat_engine: TorchEngine,
    registry: Registry,
    scorer: TestScorer,
    reward_artifact: WriteArtifact,
) -> None:
    registry.add(reward_artifact("head"), "head")
    async with scored_client(chat_engine, registry, scorer) as client:
        base = (await chat(client)).json()
        body = (await chat(client, steering={"intervention": "head"}, compare=True)).json()
        assert body["comparison"]["choices"] == base["choices"]
        text = base["choices"][0]["message"]["content"]
        assert body["comparison"]["toxicity"] == [score_of(text)]
        assert body["choices"] != base["choices"]


@pytest.mark.parametrize("steering", [None, []])
async def test_where_nothing_steers_there_is_nothing_to_compare(
    client: httpx.AsyncClient, steering: object
) -> None:
    response = await complete(client, compare=True, steering=steering)
    assert response.status_code == 400
    assert error_of(response)["param"] == "compare"


@pytest.mark.parametrize("policy", ["required", "locked"])
async def test_a_policy_that_steers_everything_gives_nobody_the_bare_model(
    tiny_engine: TorchEngine,
    registry: Registry,
    scorer: TestScorer,
    affine_artifact: WriteArtifact,
    policy: str,
) -> None:
    registry.add(affine_artifact("maps"), "maps")
    async with scored_client(
        tiny_engine, registry, scorer, default_steering=MAPS, steering_policy=policy
    ) as client:
        response = await complete(client, compare=True)
        assert response.status_code == 403
        assert error_of(response)["code"] == "comparison_not_allowed"
        assert (await complete(client, toxicity=True)).status_code == 200


async def test_compared_choice_counts_as_three_completions(
    tiny_engine: TorchEngine,
    registry: Registry,
    scorer: TestScorer,
    affine_artifact: WriteArtifact,
) -> None:
    registry.add(affine_artifact("maps"), "maps")
    async with scored_client(
        tiny_engine, registry, scorer, max_completions_per_request=6
    ) as client:
        assert (await complete(client, n=2, compare=True, steering=MAPS)).status_code == 200
        response = await complete(client, n=3, compare=True, steering=MAPS)
        assert (response.status_code, error_of(response)["param"]) == (400, "compare")
        response = await complete(client, n=7, compare=True, steering=MAPS)
        assert error_of(response)["param"] == "n"


async def test_metrics_count_each_completion_once(
    client: httpx.AsyncClient, scorer: TestScorer
) -> None:
    requests: list[Json] = [
        {},
        {"toxicity": True},
        {"steering": MAPS},
        {"steering": MAPS, "toxicity": True, "n": 2},
        {"steering": MAPS, "compare": True, "n": 2, "stream": True},
        {"steering": [MAPS, {"intervention": "head"}], "compare": True, "toxicity": True},
        {"max_tokens": 0, "echo": True},  # generates nothing to score
    ]
    for fields in requests:
        assert (await complete(client, **SAMPLED | fields)).status_code == 200
    async with asyncio.timeout(10):
        while await metric(client, "toxicity_queue_depth"):  # noqa: ASYNC110 - metrics have no event
            await asyncio.sleep(0.01)
    counts = {
        labels: await metric(client, f"completion_toxicity_count{labels}")
        for labels in (
            '{arm="served",intervention="none"}',
            '{arm="served",intervention="maps"}',
            '{arm="baseline",intervention="maps"}',
            '{arm="served",intervention="maps+head"}',
            '{arm="baseline",intervention="maps+head"}',
        )
    }
    assert list(counts.values()) == [2, 5, 2, 1, 1]
    assert len(scorer.texts) == 11 == await metric(client, "toxicity_scoring_seconds_count")
    assert await metric(client, "toxicity_dropped_total") == 0
    assert await metric(client, 'baselines_total{outcome="completed"}') == 0
    # The base model's tokens of a comparison are not counted as steered ones.
    assert await metric(client, 'steered_tokens_total{intervention="maps",kind="affine"}') == 60
    assert await metric(client, "generation_tokens_total") == 12 * 11
    assert await metric(client, "inter_token_latency_seconds_count") == 11 * 11
    assert await metric(client, "time_to_first_token_seconds_count") == 11
    assert await metric(client, "requests_running") == 0


async def test_thresholds_count_what_reaches_them(client: httpx.AsyncClient) -> None:
    found: list[float] = []
    for seed in range(12):
        body = await answer(client, toxicity=True, **{**SAMPLED, "seed": seed})
        found += body["toxicity"]
    arm = '{arm="served",intervention="none"}'
    for threshold in (0.5, 0.8):
        labels = f'{{arm="served",intervention="none",threshold="{threshold}"}}'
        reached = sum(score >= threshold for score in found)
        assert await metric(client, f"toxic_completions_total{labels}") == reached > 0
    assert await metric(client, "completion_toxicity_sum" + arm) == pytest.approx(sum(found))


async def test_a_client_that_leaves_is_not_scored(
    client: httpx.AsyncClient, scorer: TestScorer, tiny_engine: TorchEngine
) -> None:
    task = asyncio.create_task(complete(client, max_tokens=200, ignore_eos=True))
    await eventually(lambda: tiny_engine.stats().running == 1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await eventually(lambda: tiny_engine.stats().running == 0)
    assert scorer.texts == []
