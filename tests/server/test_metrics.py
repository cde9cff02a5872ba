"""Tests of the metrics page: exact counts and bounded labels."""

import asyncio

import httpx
import pytest

from interventions.registry import Registry
from server.engine.errors import QueueFullError
from server.engine.torch.engine import TorchEngine
from server.metrics import MAX_INTERVENTION_LABELS, MAX_STACK_LABELS, Metrics
from server.records import OUTCOMES
from tests.conftest import WriteArtifact
from tests.engines import idle
from tests.serving import (
    Connection,
    Json,
    Script,
    build_app,
    complete,
    eventually,
    metric,
    push,
)


async def test_counts_are_exact(client: httpx.AsyncClient) -> None:
    requests: tuple[tuple[Json, int, int, int], ...] = (
        # fields, choices, prompt tokens, tokens of each choice
        ({"max_tokens": 1}, 1, 5, 1),
        ({"max_tokens": 7, "prompt": ["Hello", "Bye!"], "n": 2}, 4, 9, 7),
        ({"max_tokens": 9, "stream": True, "prompt": "x" * 100}, 1, 100, 9),
    )
    for fields, _, _, _ in requests:
        assert (await complete(client, ignore_eos=True, **fields)).status_code == 200
    choices = sum(count for _, count, _, _ in requests)
    prompt = sum(tokens for _, _, tokens, _ in requests)
    generated = sum(count * tokens for _, count, _, tokens in requests)
    expected: dict[str, float] = {
        "time_to_first_token_seconds_count": choices,
        "inter_token_latency_seconds_count": generated - choices,
        "request_queue_seconds_count": choices,
        "request_duration_seconds_count": len(requests),
        "request_prompt_tokens_count": len(requests),
        "request_prompt_tokens_sum": prompt,
        "request_generation_tokens_sum": generated,
        "prompt_tokens_total": prompt,
        "generation_tokens_total": generated,
        "requests_running": 0,
        "requests_waiting": 0,
        "kv_cache_usage_ratio": 0,
        'requests_total{endpoint="/v1/completions",outcome="success"}': len(requests),
    }
    assert {name: await metric(client, name) for name in expected} == expected


FIRST_TOKENS = "time_to_first_token_seconds_count"


async def test_after_errors_and_clients_that_leave_the_counts_add_up_and_the_gauges_are_zero(
    tiny_engine: TorchEngine, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = build_app(tiny_engine, registry)
    endless: Json = {"model": "tiny", "prompt": "x", "max_tokens": 400, "ignore_eos": True}
    leaving = [Connection({**endless, "stream": stream}) for stream in (True, True, False)]
    running = [asyncio.create_task(connection.run(app)) for connection in leaving]
    await eventually(lambda: tiny_engine.stats().running == len(leaving))
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        async with asyncio.timeout(20):  # until each has its first token
            while await metric(client, FIRST_TOKENS) < len(leaving):  # noqa: ASYNC110 - a page
                await asyncio.sleep(0.001)
        assert await metric(client, "requests_running") == len(leaving)
        assert await metric(client, "kv_cache_usage_ratio") > 0
        for connection in leaving:
            connection.leave.set()
        await asyncio.gather(*running)
        assert (await complete(client, max_tokens=7, ignore_eos=True)).status_code == 200
        assert (await complete(client, max_tokens=100_000)).status_code == 400
        with monkeypatch.context() as patch:
            patch.setattr(tiny_engine._core._runner, "run", _fail)
            assert (await complete(client)).status_code == 500
            patch.setattr(tiny_engine, "submit", Script([QueueFullError("full")]).submit)
            assert (await complete(client)).status_code == 429
        await eventually(lambda: idle(tiny_engine))
        outcomes = {
            outcome: await metric(
                client, f'requests_total{{endpoint="/v1/completions",outcome="{outcome}"}}'
            )
            for outcome in OUTCOMES
        }
        assert outcomes == {
            "success": 1,
            "client_error": 1,
            "rejected": 1,
            "unavailable": 0,
            "server_error": 1,
            "cancelled": 3,
        }
        begun = await metric(client, "time_to_first_token_seconds_count")
        tokens = await metric(client, "generation_tokens_total")
        assert begun == 1 + len(leaving)
        assert await metric(client, "inter_token_latency_seconds_count") == tokens - begun
        assert await metric(client, "request_duration_seconds_count") == 1
        for gauge in ("requests_running", "requests_waiting", "kv_cache_usage_ratio"):
            assert await metric(client, gauge) == 0


def _fail(*_: object) -> None:
    raise RuntimeError("the step fails, as the test wants")


async def test_times_are_seconds_and_add_up(client: httpx.AsyncClient) -> None:
    await complete(client, ignore_eos=True, max_tokens=50)
    first = await metric(client, "time_to_first_token_seconds_sum")
    between = await metric(client, "inter_token_latency_seconds_sum")
    duration = await metric(client, "request_duration_seconds_sum")
    queue = await metric(client, "request_queue_seconds_sum")
    assert 0 < queue < first < duration < 10
    assert first + between == pytest.approx(duration, rel=0.2)


async def test_steered_tokens_by_kind_and_name(
    client: httpx.AsyncClient,
    affine_artifact: WriteArtifact,
    reward_artifact: WriteArtifact,
    registry: Registry,
) -> None:
    await push(client, affine_artifact("maps"))
    await push(client, reward_artifact("head"))
    digest = registry.resolve("maps").digest
    maps, head = {"intervention": "maps"}, {"intervention": "head"}
    for fields in (
        {},
        {"steering": maps},
        {"steering": {"intervention": f"sha256:{digest}"}},
        {"steering": {**maps, "strength": 0}},
        {"steering": head},
        {"steering": [maps, head]},
        {"steering": [{**maps, "strength": 0}, head]},
    ):
        assert (await complete(client, ignore_eos=True, **fields)).status_code == 200
    steered = {
        labels: await metric(client, f"steered_tokens_total{labels}")
        for labels in (
            '{intervention="maps",kind="affine"}',
            '{intervention="head",kind="reward"}',
            '{intervention="maps+head",kind="affine+reward"}',
        )
    }
    assert list(steered.values()) == [12, 12, 6]
    page = (await client.get("/metrics")).text
    assert page.count("steerserve_steered_tokens_total{") == 3
    assert digest not in page
    assert await metric(client, "interventions_stored") == 2
    assert await metric(client, "intervention_slots_used") == 2


async def test_what_a_client_writes_never_becomes_a_label(client: httpx.AsyncClient) -> None:
    await client.get("/some/secret/path")
    await client.get("/v1/interventions/secret-name")
    await client.get("/v1/models/secret/model")
    await client.request("SECRET", "/v1/completions")
    await complete(client, steering={"intervention": "secret-name"}, user="secret")
    await complete(client, model="secret")
    page = (await client.get("/metrics")).text
    assert "secret" not in page.lower()
    for labels in (
        'endpoint="unmatched",outcome="client_error"',
        'endpoint="/v1/interventions/{reference}",outcome="client_error"',
        'endpoint="/v1/models/{model_id:path}",outcome="client_error"',
    ):
        assert await metric(client, f"requests_total{{{labels}}}") == 1
    completions = 'requests_total{endpoint="/v1/completions",outcome="client_error"}'
    assert await metric(client, completions) == 3


async def test_the_page_is_prometheus_text(client: httpx.AsyncClient) -> None:
    response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    names = {line.split()[2] for line in response.text.splitlines() if line.startswith("# TYPE")}
    for name in (
        "steerserve_time_to_first_token_seconds",
        "steerserve_steered_tokens_total",
        "steerserve_requests_total",
        "steerserve_kv_cache_usage_ratio",
    ):
        assert name in names


async def test_intervention_labels_are_capped(tiny_engine: TorchEngine, registry: Registry) -> None:
    metrics = Metrics(tiny_engine, registry, "tiny")
    for number in range(MAX_INTERVENTION_LABELS + 10):
        for _ in range(2):
            metrics.generated(1, "affine", f"name-{number}")
    page = metrics.render().decode()
    # The cap counts the label "none", of unsteered tokens, but not "other", of names beyond it.
    assert page.count("steerserve_steered_tokens_total{") == MAX_INTERVENTION_LABELS
    assert 'steered_tokens_total{intervention="other",kind="affine"} 22.0' in page
    assert 'steered_tokens_total{intervention="name-0",kind="affine"} 2.0' in page


async def test_stacks_that_clients_make_up_leave_room_for_names(
    tiny_engine: TorchEngine, registry: Registry
) -> None:
    metrics = Metrics(tiny_engine, registry, "tiny")
    for number in range(2 * MAX_STACK_LABELS):
        metrics.generated(1, "affine", f"a+{'b+' * number}b")
    metrics.generated(1, "affine", "new")
    page = metrics.render().decode()
    assert page.count("steerserve_steered_tokens_total{") == MAX_STACK_LABELS + 2
    assert 'steered_tokens_total{intervention="new",kind="affine"} 1.0' in page


async def test_reserved_label_names_count_as_other(
    client: httpx.AsyncClient, affine_artifact: WriteArtifact
) -> None:
    for name in ("none", "other"):
        await push(client, affine_artifact("maps"), name)
        await complete(client, steering={"intervention": name}, ignore_eos=True)
    labels = '{intervention="other",kind="affine"}'
    assert await metric(client, f"steered_tokens_total{labels}") == 12


async def test_what_is_stored_is_shown_from_the_start_but_not_without_end(
    tiny_engine: TorchEngine, registry: Registry, affine_artifact: WriteArtifact
) -> None:
    """A rate over a counter misses its first value, so the series starts with 0 before it."""
    path = affine_artifact("maps")
    for number in range(MAX_INTERVENTION_LABELS):
        registry.add(path, f"name-{number:03}")
    metrics = Metrics(tiny_engine, registry, "tiny")
    page = metrics.render().decode()
    for sample in (
        'steered_tokens_total{intervention="name-000",kind="affine"} 0.0',
        'steering_dose_count{intervention="name-000"} 0.0',
        'completion_toxicity_count{arm="baseline",intervention="name-000"} 0.0',
        'toxic_completions_total{arm="served",intervention="none",threshold="0.5"} 0.0',
        'baselines_total{outcome="dropped"} 0.0',
        'model_info{model="tiny"} 1.0',
        "engine_up 1.0",
        "preemptions_total 0.0",
        "prefix_cache_queries_total 0.0",
    ):
        assert f"steerserve_{sample}" in page
    # There is room for the labels of later requests, stacks among them.
    assert page.count("steerserve_steered_tokens_total{") < MAX_INTERVENTION_LABELS
    metrics.generated(1, "affine", "name-090+name-091")
    page = metrics.render().decode()
    assert 'intervention="name-090+name-091",kind="affine"} 1.0' in page
    assert 'intervention="other"' not in page


async def test_a_dose_has_the_name_of_its_own_edit(
    client: httpx.AsyncClient, affine_artifact: WriteArtifact, reward_artifact: WriteArtifact
) -> None:
    await push(client, affine_artifact("maps"))
    await push(client, reward_artifact("head"))
    maps, head = {"intervention": "maps"}, {"intervention": "head"}
    # One in sixteen steered steps is measured, the first one among them.
    await complete(client, steering=[maps, head], max_tokens=33, ignore_eos=True)
    assert await metric(client, 'steering_dose_count{intervention="maps"}') == 3
    assert await metric(client, 'steering_dose_count{intervention="head"}') == 3
    await complete(client, steering=[{**maps, "strength": 0}, head], max_tokens=16)
    assert await metric(client, 'steering_dose_count{intervention="maps"}') == 3
    assert await metric(client, 'steering_dose_count{intervention="head"}') == 4
    assert 0.01 < await metric(client, 'steering_dose_sum{intervention="maps"}') / 3 < 10


async def test_two_applications_count_apart(tiny_engine: TorchEngine, registry: Registry) -> None:
    first, second = Metrics(tiny_engine, registry, "tiny"), Metrics(tiny_engine, registry, "tiny")
    first.requests.labels("/x", "success").inc()
    assert b'endpoint="/x"' in first.render()
    assert b'endpoint="/x"' not in second.render()
