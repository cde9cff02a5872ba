"""Tests what vLLM's workers measure, and which sites they had prepared: `make test-vllm`."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from interventions.artifact import write_artifact
from server.engine.request import Edit
from server.engine.vllm.options import VllmOptions
from server.engine.vllm.plugin.wire import Measured
from steering.affine import AffineMap
from steering.hooks import edit_activations
from steering.reward import RewardHead
from steering.settings import AffineSettings, RewardSettings
from steering.sites import locate_site
from tests import oracles
from tests.both_engines import INTERVENTIONS, Subject, each_vllm, request
from tests.manifests import manifest_of
from tests.serving import build_app, complete, error_of, push
from tests.steered import GREEDY, tokens_of
from tests.tiny import random_maps
from tests.vllm_models import vllm_model

pytestmark = [pytest.mark.asyncio(loop_scope="session"), each_vllm]
STRENGTH = 0.9
A = (Edit("a", AffineSettings(STRENGTH)),)
BOTH = (Edit("b", AffineSettings(0.5, "generated")), Edit("r", RewardSettings(0.5, 3)))


def doses_by_hand(tokens: Sequence[int]) -> list[float]:
    """Return the doses of A at each token and site, from activations of transformers' model."""
    model = vllm_model("llama")
    found: list[float] = []
    maps = INTERVENTIONS["a"]
    assert not isinstance(maps, RewardHead)

    def edited(site_map: AffineMap, before: Tensor) -> Tensor:
        [rows] = before
        after = oracles.affine_rows(rows, site_map, STRENGTH)
        found.extend(oracles.dose(*pair) for pair in zip(rows, after, strict=True))
        return after[None]

    for site, site_map in maps.items():
        edit_activations(model.get_submodule(site), locate_site(site), partial(edited, site_map))
    with torch.no_grad():
        model(torch.tensor([tokens]))
    return found


async def test_the_workers_measure_what_the_edits_do(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: Any = subject.engine
    monkeypatch.setattr(engine._measurements, "_interval", 0)  # it would read them meanwhile
    await engine._measurements.close()  # the reading after the last test's request is still to come
    await engine._call("steering_measurements")  # what was measured before
    await engine._call("steering_measure", (1,))
    outputs = await subject.answer(request(b"hello", A))
    [message] = await engine._call("steering_measurements")
    found = Measured.from_message(message)
    doses = doses_by_hand([*b"hello", *tokens_of(outputs)][:-1])
    [[total]] = found.doses.values()
    assert total.number == len(doses)
    assert total.sum == pytest.approx(sum(doses), rel=1e-3)
    # A compiled model edits by itself what has one map a site, and there no clock is read.
    assert (found.edit_seconds == 0) == subject.setup.compiled
    assert found.edit_seconds < found.step_seconds
    await engine._call("steering_measure", (VllmOptions().dose_interval,))


async def test_outputs_tell_doses_now_and_then(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: Any = subject.engine
    monkeypatch.setattr(engine._measurements, "_period", 0.02)
    before = engine.stats()
    sampling = replace(GREEDY, max_tokens=180)
    steered, plain = await subject.generate(
        request(b"hello", BOTH, sampling), request(b"hello", (), sampling)
    )
    doses = [output.doses for output in steered if output.doses]
    assert doses
    assert all(0 < dose < 1e6 for each in doses for dose in each if dose is not None)
    assert {len(each) for each in doses} == {len(BOTH)}
    assert not any(output.doses for output in plain)
    after = engine.stats()
    seconds = after.measured_step_seconds - before.measured_step_seconds
    assert 0 < after.measured_edit_seconds - before.measured_edit_seconds < seconds


@pytest.mark.parametrize(
    ("site", "says"),
    [
        ("model.layers.0.mlp", r"add --site 'model\.layers\.\d+\.mlp'"),
        ("model.layers.0.self_attn.q_proj", "vLLM fuses modules"),
    ],
)
async def test_an_upload_with_other_sites_is_stored_and_refused(
    subject: Subject, tmp_path: Path, site: str, says: str
) -> None:
    model = subject.engine.model
    maps = random_maps(4, model.site_widths[site], (site,))
    path = tmp_path / "other.safetensors"
    write_artifact(path, manifest_of(maps, model, "other"), maps)
    app = build_app(subject.engine, subject.registry)
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        stored = await push(client, path)
        assert not stored["servable"]
        assert says in str(stored["reason"])
        assert (await client.get("/v1/interventions/other")).json()["reason"] == stored["reason"]
        response = await complete(client, steering={"intervention": "other"})
        error = error_of(response)
        assert (response.status_code, error["code"]) == (400, "intervention_not_servable")
        assert says in str(error["message"])
        assert (await complete(client)).status_code == 200
        assert (await client.delete("/v1/interventions/other")).status_code in (200, 204)
