"""Tests of baselines: unsteered answers, generated and scored for a sample of steered requests."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace

import httpx
import pytest

from interventions.registry import Registry
from server import baselines
from server.engine.errors import EngineDeadError, EngineError, NoBackgroundRoomError
from server.engine.output import StepOutput
from server.engine.torch.engine import TorchEngine
from tests.conftest import WriteArtifact
from tests.engines import idle
from tests.scoring import TestScorer, score_of, scored_client
from tests.serving import (
    Json,
    Script,
    ScriptedGeneration,
    complete,
    eventually,
    metric,
    text_of,
)

MAPS: Json = {"intervention": "maps"}
SAMPLED: Json = {"temperature": 1.0, "seed": 7, "ignore_eos": True, "max_tokens": 12}
COMPLETED = 'baselines_total{outcome="completed"}'
DROPPED = 'baselines_total{outcome="dropped"}'
BASELINE = 'completion_toxicity_count{arm="baseline",intervention="maps"}'


@pytest.fixture
def scorer() -> TestScorer:
    return TestScorer()


@pytest.fixture(autouse=True)
def maps(registry: Registry, affine_artifact: WriteArtifact) -> None:
    registry.add(affine_artifact("maps"), "maps")


@pytest.fixture
async def client(
    tiny_engine: TorchEngine, registry: Registry, scorer: TestScorer
) -> AsyncIterator[httpx.AsyncClient]:
    """Return a client of a server that generates the baseline of every steered request."""
    async with scored_client(tiny_engine, registry, scorer, baseline_sample_rate=1) as client:
        yield client


class Waiting(ScriptedGeneration):
    """A generation that yields its text once `going_on` is set."""

    def __init__(self, going_on: asyncio.Event, text: StepOutput) -> None:
        super().__init__((text,))
        self.going_on = going_on

    async def __aiter__(self) -> AsyncIterator[StepOutput]:
        await self.going_on.wait()
        for output in self.outputs:
            yield output


async def until(client: httpx.AsyncClient, sample: str, value: float) -> None:
    async with asyncio.timeout(10):
        while await metric(client, sample) != value:  # noqa: ASYNC110 - metrics have no event
            await asyncio.sleep(0.01)


async def test_the_same_prompt_seed_and_settings_without_the_edits(
    client: httpx.AsyncClient, scorer: TestScorer
) -> None:
    base = await text_of(client, **SAMPLED)
    steered = await text_of(client, steering=MAPS, **SAMPLED)
    await until(client, BASELINE, 1)
    assert scorer.texts == [base, steered, base]
    assert await metric(client, COMPLETED) == 1
    total = await metric(client, 'completion_toxicity_sum{arm="baseline",intervention="maps"}')
    assert total == score_of(base)
    # A baseline is no client's request, so the metrics of requests do not count it.
    assert await metric(client, "generation_tokens_total") == 24
    assert await metric(client, "time_to_first_token_seconds_count") == 2
    assert await metric(client, "request_queue_seconds_count") == 2


async def test_every_choice_of_steered_requests_and_no_other(client: httpx.AsyncClient) -> None:
    for fields in (
        {"steering": MAPS, "n": 3},
        {"steering": MAPS, "stream": True, "logprobs": 2, "echo": True},
        {},
        {"steering": {**MAPS, "strength": 0}},
        {"steering": MAPS, "max_tokens": 0, "echo": True},
        {"steering": MAPS, "toxicity": True},
        {"steering": MAPS, "compare": True},  # the comparison is its baseline
    ):
        assert (await complete(client, **SAMPLED | fields)).status_code == 200
    await until(client, COMPLETED, 5)
    await until(client, BASELINE, 6)
    assert await metric(client, DROPPED) == 0


@pytest.mark.parametrize(("rate", "count"), [(0.0, 0), (0.25, 2)])
async def test_a_share_of_the_requests(
    tiny_engine: TorchEngine,
    registry: Registry,
    scorer: TestScorer,
    monkeypatch: pytest.MonkeyPatch,
    rate: float,
    count: int,
) -> None:
    draws = iter([0.9, 0.25, 0.0, 0.3, 0.24, 0.99])
    chance = SimpleNamespace(random=lambda: next(draws))
    monkeypatch.setattr(baselines, "random", SimpleNamespace(Random=lambda: chance))
    async with scored_client(tiny_engine, registry, scorer, baseline_sample_rate=rate) as client:
        for _ in range(6):
            assert (await complete(client, steering=MAPS)).status_code == 200
        await until(client, COMPLETED, count)
        await until(client, "toxicity_queue_depth", 0)
    assert len(scorer.texts) == 6 + count


@pytest.mark.parametrize(
    "end",
    [
        NoBackgroundRoomError("no room"),
        EngineDeadError("dead"),
        ScriptedGeneration((), NoBackgroundRoomError()),
    ],
)
async def test_where_there_is_no_room_it_is_dropped(
    client: httpx.AsyncClient,
    scorer: TestScorer,
    tiny_engine: TorchEngine,
    monkeypatch: pytest.MonkeyPatch,
    end: ScriptedGeneration | EngineError,
) -> None:
    served = ScriptedGeneration((StepOutput((1,), "one", finish_reason="stop"),))
    script = Script([served, end])
    monkeypatch.setattr(tiny_engine, "submit", script.submit)
    assert await text_of(client, steering=MAPS) == "one"
    await until(client, DROPPED, 1)
    assert script.submitted[1].background
    assert scorer.texts == ["one"]
    assert await metric(client, COMPLETED) == 0


async def test_few_at_once_and_not_many_waiting(
    tiny_engine: TorchEngine,
    registry: Registry,
    scorer: TestScorer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(baselines, "MAX_AT_ONCE", 1)
    monkeypatch.setattr(baselines, "MAX_WAITING", 1)
    going_on = asyncio.Event()
    text = StepOutput((1,), "one", finish_reason="stop")
    served = ScriptedGeneration((text,))
    script = Script([served, Waiting(going_on, text), served, served, served])
    monkeypatch.setattr(tiny_engine, "submit", script.submit)
    async with scored_client(tiny_engine, registry, scorer, baseline_sample_rate=1) as client:
        await text_of(client, steering=MAPS)
        await eventually(lambda: len(script.submitted) == 2)  # the first one's baseline runs
        await text_of(client, steering=MAPS)  # its baseline waits
        await text_of(client, steering=MAPS)  # its baseline is dropped
        await until(client, DROPPED, 1)
        assert len(script.submitted) == 4
        going_on.set()
        await until(client, COMPLETED, 2)


async def test_one_that_takes_too_long_is_dropped(
    tiny_engine: TorchEngine,
    registry: Registry,
    scorer: TestScorer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hanging = ScriptedGeneration()
    served = ScriptedGeneration((StepOutput((1,), "one", finish_reason="stop"),))
    monkeypatch.setattr(tiny_engine, "submit", Script([served, hanging]).submit)
    async with scored_client(
        tiny_engine, registry, scorer, baseline_sample_rate=1, request_timeout=1
    ) as client:
        await text_of(client, steering=MAPS)
        await until(client, DROPPED, 1)
    assert hanging.cancelled


async def test_at_the_servers_end_nothing_is_left(
    tiny_engine: TorchEngine, registry: Registry, scorer: TestScorer
) -> None:
    async with scored_client(tiny_engine, registry, scorer, baseline_sample_rate=1) as client:
        await complete(client, steering=MAPS, max_tokens=150, ignore_eos=True)
        await eventually(lambda: not idle(tiny_engine))
    await eventually(lambda: idle(tiny_engine))
