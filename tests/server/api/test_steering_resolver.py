"""Tests of steering over HTTP: what requests ask for, what is applied, what policies allow."""

from pathlib import Path

import httpx
import pytest
from pydantic import JsonValue

from interventions.artifact import write_artifact
from interventions.registry import Registry
from server.config import ConfigurationError
from server.engine.torch.engine import TorchEngine
from tests.artifact_samples import affine_manifest, affine_parameters
from tests.conftest import MakeClient, WriteArtifact
from tests.serving import Json, build_app, complete, error_of, push, text_of


@pytest.fixture
async def stocked(
    client: httpx.AsyncClient, affine_artifact: WriteArtifact, reward_artifact: WriteArtifact
) -> httpx.AsyncClient:
    """Store the interventions "maps" and "head" on the client's server."""
    await push(client, affine_artifact("maps", limits={"strength": (-1, 1)}))
    await push(client, reward_artifact("head"))
    return client


async def echo_of(client: httpx.AsyncClient, **fields: object) -> list[Json]:
    response = await complete(client, **fields)
    assert response.status_code == 200, response.text
    echo: list[Json] = response.json()["steering"]
    return echo


async def test_settings_are_echoed_in_full(stocked: httpx.AsyncClient, registry: Registry) -> None:
    maps, head = registry.resolve("maps"), registry.resolve("head")
    stack = [{"intervention": "maps", "strength": 0.5}, {"intervention": "head", "iterations": 3}]
    assert await echo_of(stocked, steering=stack) == [
        {
            "intervention": "maps",
            "digest": maps.digest,
            "kind": "affine",
            "settings": {"strength": 0.5, "positions": "all"},
            "source": "request",
        },
        {
            "intervention": "head",
            "digest": head.digest,
            "kind": "reward",
            "settings": {"eta": 0.5, "iterations": 3, "direction_scale": 1.0},
            "source": "request",
        },
    ]
    assert await echo_of(stocked) == []
    assert await echo_of(stocked, steering=None) == []
    assert await echo_of(stocked, steering=[]) == []


async def test_every_setting_reaches_the_engine(stocked: httpx.AsyncClient) -> None:
    steerings: list[object] = [
        None,
        {"intervention": "maps"},
        {"intervention": "maps", "strength": 0.5},
        {"intervention": "maps", "strength": -1},
        {"intervention": "maps", "positions": "generated"},
        {"intervention": "head"},
        {"intervention": "head", "eta": 2, "iterations": 9},
        {"intervention": "head", "direction_scale": 5},
        [{"intervention": "maps"}, {"intervention": "head"}],
    ]
    answers = [
        (await complete(stocked, steering=steering, logprobs=1)).json()["choices"][0]["logprobs"]
        for steering in steerings
    ]
    firsts = [answer["token_logprobs"][0] for answer in answers]
    # With positions="generated" the first token is still the base model's; all others differ.
    assert firsts[4] == firsts[0]
    assert len(set(firsts)) == len(firsts) - 1
    assert answers[4] != answers[0]


async def test_settings_that_do_nothing_give_the_base_models_answer_to_the_bit(
    stocked: httpx.AsyncClient,
) -> None:
    base = (await complete(stocked, logprobs=5)).json()["choices"]
    for steering in (
        {"intervention": "maps", "strength": 0},
        {"intervention": "head", "eta": 0, "direction_scale": 0},
    ):
        response = (await complete(stocked, logprobs=5, steering=steering)).json()
        assert response["choices"] == base
        assert response["steering"][0]["intervention"] == steering["intervention"]


async def test_the_order_of_a_stack_counts(
    stocked: httpx.AsyncClient, affine_artifact: WriteArtifact
) -> None:
    await push(stocked, affine_artifact("more", seed=1))
    stack = [{"intervention": "maps"}, {"intervention": "more"}]
    first = (await complete(stocked, steering=stack, logprobs=0)).json()["choices"]
    second = (await complete(stocked, steering=stack[::-1], logprobs=0)).json()["choices"]
    assert first != second


async def test_by_digest_and_by_model(stocked: httpx.AsyncClient, registry: Registry) -> None:
    digest = registry.resolve("maps").digest
    expected = await text_of(stocked, steering={"intervention": "maps"})
    assert expected != await text_of(stocked)
    assert await text_of(stocked, steering={"intervention": f"sha256:{digest}"}) == expected
    response = (await complete(stocked, model="tiny+maps")).json()
    assert response["choices"][0]["text"] == expected
    assert response["model"] == "tiny+maps"
    assert [item["source"] for item in response["steering"]] == ["model"]


@pytest.mark.parametrize("steering", [{"intervention": "head"}, {"intervention": "maps"}, None])
async def test_model_and_field_together(stocked: httpx.AsyncClient, steering: object) -> None:
    response = await complete(stocked, model="tiny+maps", steering=steering)
    assert response.status_code == 400
    assert error_of(response)["param"] == "steering"


async def test_an_unknown_intervention(stocked: httpx.AsyncClient) -> None:
    unknown: tuple[tuple[Json, str], ...] = (
        ({"steering": {"intervention": "mops"}}, "steering.intervention"),
        ({"steering": {"intervention": "sha256:" + "0" * 64}}, "steering.intervention"),
        ({"steering": {"intervention": "../maps"}}, "steering.intervention"),
        (
            {"steering": [{"intervention": "maps"}, {"intervention": "mops"}]},
            "steering[1].intervention",
        ),
        ({"model": "tiny+mops"}, "model"),
        ({"model": "tiny+maps+head"}, "model"),
    )
    for fields, param in unknown:
        response = await complete(stocked, **fields)
        error = error_of(response)
        assert response.status_code == 404, fields
        assert (error["code"], error["param"]) == ("intervention_not_found", param)


async def test_an_unknown_model(stocked: httpx.AsyncClient) -> None:
    for model in ("other", "other+maps", "tiny+", "+maps", "", "Tiny"):
        response = await complete(stocked, model=model)
        error = error_of(response)
        assert response.status_code == 404, model
        assert (error["code"], error["param"]) == ("model_not_found", "model")


REFUSED_SETTINGS = (
    ('{"intervention": "maps", "strength": 1.01}', "strength"),
    ('{"intervention": "maps", "strength": "1"}', "strength"),
    ('{"intervention": "maps", "strength": true}', "strength"),
    ('{"intervention": "maps", "strength": null}', "strength"),
    ('{"intervention": "maps", "strength": 1e999}', "strength"),
    ('{"intervention": "maps", "strngth": 0.5}', "strngth"),
    ('{"intervention": "maps", "eta": 0.5}', "eta"),
    ('{"intervention": "maps", "positions": "some"}', "positions"),
    ('{"intervention": "head", "strength": 0.5}', "strength"),
    ('{"intervention": "head", "iterations": 65}', "iterations"),
    ('{"intervention": "head", "iterations": 1.0}', "iterations"),
    ('{"intervention": "head", "iterations": -1}', "iterations"),
    ('{"intervention": "head", "eta": 1e300}', "eta"),
)


async def test_a_setting_that_is_not_accepted_is_named(stocked: httpx.AsyncClient) -> None:
    for text, field in REFUSED_SETTINGS:
        for steering, param in ((text, f"steering.{field}"), (f"[{text}]", f"steering[0].{field}")):
            response = await stocked.post(
                "/v1/completions",
                content=f'{{"model": "tiny", "prompt": "x", "steering": {steering}}}',
                headers={"Content-Type": "application/json"},
            )
            error = error_of(response)
            assert response.status_code == 400, steering
            assert (error["code"], error["param"]) == ("invalid_setting", param)
            assert field in str(error["message"])


async def test_steering_of_a_wrong_form(stocked: httpx.AsyncClient) -> None:
    wrong: tuple[tuple[object, str], ...] = (
        ("maps", "steering"),
        (1, "steering"),
        (True, "steering"),
        ({}, "steering.intervention"),
        ({"strength": 1}, "steering.intervention"),
        ({"intervention": 1}, "steering.intervention"),
        ({"intervention": None}, "steering.intervention"),
        (["maps"], "steering[0]"),
        ([None], "steering[0]"),
        ([{"intervention": "maps"}] * 5, "steering"),
    )
    for steering, param in wrong:
        response = await complete(stocked, steering=steering)
        assert response.status_code == 400, steering
        assert error_of(response)["param"] == param


async def test_four_can_be_stacked(stocked: httpx.AsyncClient) -> None:
    stack = [{"intervention": "maps", "strength": 0.1}, {"intervention": "head"}] * 2
    assert len(await echo_of(stocked, steering=stack)) == 4


async def test_one_that_the_model_cannot_take(
    client: httpx.AsyncClient, registry: Registry, tmp_path: Path
) -> None:
    """An artifact that was stored for another model is refused, never silently left out."""
    path = tmp_path / "foreign.safetensors"
    write_artifact(path, affine_manifest("foreign"), affine_parameters())
    registry.add(path)
    response = await complete(client, steering={"intervention": "foreign"})
    error = error_of(response)
    assert response.status_code == 400
    assert (error["code"], error["param"]) == (
        "intervention_not_servable",
        "steering.intervention",
    )
    assert "model.layers.0.norm" in str(error["message"])
    assert (await complete(client, model="tiny+foreign")).status_code == 400
    ids = [model["id"] for model in (await client.get("/v1/models")).json()["data"]]
    assert ids == ["tiny"]


async def test_a_default_that_may_be_overridden(
    stocked: httpx.AsyncClient, make_client: MakeClient
) -> None:
    steered = await text_of(stocked, steering={"intervention": "maps"})
    base = await text_of(stocked)
    client = make_client(default_steering={"intervention": "maps"})
    assert await text_of(client) == steered
    assert [item["source"] for item in await echo_of(client)] == ["default"]
    assert await text_of(client, steering=None) == base
    assert await echo_of(client, steering=None) == []
    [echo] = await echo_of(client, steering={"intervention": "head"})
    assert (echo["intervention"], echo["source"]) == ("head", "request")
    [echo] = await echo_of(client, model="tiny+head")
    assert (echo["intervention"], echo["source"]) == ("head", "model")


async def test_required(stocked: httpx.AsyncClient, make_client: MakeClient) -> None:
    client = make_client(steering_policy="required")
    unsteered: tuple[Json, ...] = (
        {},
        {"steering": None},
        {"steering": []},
        {"steering": {"intervention": "maps", "strength": 0}},
        {"model": "tiny", "steering": [{"intervention": "head", "eta": 0, "direction_scale": 0}]},
    )
    for fields in unsteered:
        response = await complete(client, **fields)
        assert response.status_code == 400
        assert error_of(response)["code"] == "steering_required"
    assert await echo_of(client, steering={"intervention": "maps"})
    assert await echo_of(client, model="tiny+maps")
    with_default = make_client(
        steering_policy="required", default_steering=[{"intervention": "maps"}]
    )
    assert await echo_of(with_default)
    assert await echo_of(with_default, steering={"intervention": "head"})
    assert (await complete(with_default, steering=None)).status_code == 400


async def test_locked(
    stocked: httpx.AsyncClient, make_client: MakeClient, registry: Registry
) -> None:
    default: dict[str, JsonValue] = {"intervention": "maps", "strength": 1}
    client = make_client(steering_policy="locked", default_steering=default)
    expected = await text_of(stocked, steering=default)
    digest = registry.resolve("maps").digest
    same: tuple[Json, ...] = (
        {},
        {"steering": default},
        {"steering": [default]},
        {"steering": {"intervention": "maps"}},  # its default strength is 1
        {"steering": {"intervention": f"sha256:{digest}", "positions": "all"}},
        {"model": "tiny+maps"},
    )
    for fields in same:
        assert await text_of(client, **fields) == expected
    others: tuple[Json, ...] = (
        {"steering": None},
        {"steering": []},
        {"steering": {"intervention": "maps", "strength": 0.99}},
        {"steering": {"intervention": "maps", "strength": 7}},
        {"steering": {"intervention": "head"}},
        {"steering": {"intervention": "unknown"}},
        {"steering": [default, default]},
        {"model": "tiny+head"},
        {"model": "tiny+unknown"},
    )
    for fields in others:
        for stream in (False, True):
            response = await complete(client, **fields, stream=stream)
            assert response.status_code == 403, fields
            assert error_of(response)["code"] == "steering_locked"


@pytest.mark.parametrize(
    "default",
    [
        {"intervention": "unknown"},
        {"intervention": "maps", "strength": 3},
        {"intervention": "maps", "strngth": 1},
    ],
)
@pytest.mark.usefixtures("stocked")
async def test_invalid_default_prevents_start(
    tiny_engine: TorchEngine, registry: Registry, default: dict[str, JsonValue]
) -> None:
    with pytest.raises(ConfigurationError, match="default steering cannot be applied"):
        build_app(tiny_engine, registry, default_steering=default)
    build_app(tiny_engine, registry)


async def test_a_malformed_default_is_no_application(
    tiny_engine: TorchEngine, registry: Registry
) -> None:
    with pytest.raises(ConfigurationError, match=r"default_steering\[1\]"):
        build_app(tiny_engine, registry, default_steering=[{"intervention": "a"}, {"strength": 1}])


async def test_moving_a_name_moves_new_requests_only(
    stocked: httpx.AsyncClient, affine_artifact: WriteArtifact, registry: Registry
) -> None:
    before = registry.resolve("maps").digest
    old = await text_of(stocked, steering={"intervention": "maps"})
    await push(stocked, affine_artifact("maps", seed=5))
    new = await text_of(stocked, steering={"intervention": "maps"})
    assert new != old
    assert await text_of(stocked, steering={"intervention": f"sha256:{before}"}) == old
