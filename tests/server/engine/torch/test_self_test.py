"""Tests that the engine refuses models that it computes wrongly, and sites that it cannot steer."""

import pytest
import torch

from server.engine.errors import UnservableInterventionError
from server.engine.model.description import ModelLoadError
from server.engine.torch.attention import slab_attention
from server.engine.torch.build import build_core, context_length
from server.engine.torch.options import EngineOptions
from steering.bank import Bank
from tests.conftest import TINY_OPTIONS, LoadTiny
from tests.tiny import SITES, WIDTH, random_head, random_maps

ALL_SITES = (
    *SITES,
    "model.layers.0.input_layernorm",
    "model.layers.0.self_attn",
    "model.layers.0.self_attn.k_proj",
    "model.layers.1.mlp",
    "model.layers.1",
    "model.norm",
    "model.norm.input",
    "model.layers.1.input",
    "model.layers.0.self_attn.input",
    "model.layers.0.self_attn.o_proj.input",
    "model.layers.1.mlp.down_proj.input",
)


def test_every_kind_of_site_reaches_the_logits(load_tiny: LoadTiny) -> None:
    core = build_core(load_tiny(), TINY_OPTIONS)
    maps = {site: random_maps(1, width, (site,))[site] for site, width in widths().items()}
    assert core.interventions.install("all", maps) == 1


def widths() -> dict[str, int]:
    other = {"k_proj": 16, "down_proj.input": 48}
    return {
        site: next((other[end] for end in other if site.endswith(end)), WIDTH) for site in ALL_SITES
    }


def test_a_site_whose_edit_does_not_reach_the_logits_is_refused(load_tiny: LoadTiny) -> None:
    loaded = load_tiny()
    # With these weights, the last layer's MLP returns zeros for any input.
    with torch.no_grad():
        loaded.model.get_parameter("model.layers.1.mlp.down_proj.weight").zero_()
    core = build_core(loaded, TINY_OPTIONS)
    with pytest.raises(UnservableInterventionError, match=rf"{SITES[1]} does not reach"):
        core.interventions.install("a", random_maps(1))
    with pytest.raises(UnservableInterventionError):  # the first probe's result is remembered
        core.interventions.install("a", random_maps(1))
    assert core.interventions.slots.used == 0
    assert core.interventions.install("b", random_maps(1, sites=SITES[:1])) == 1


def test_a_wrong_attention_is_noticed(load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slab_attention, "_first_key", lambda place, window: place)
    with pytest.raises(ModelLoadError, match="other logits"):
        build_core(load_tiny(), TINY_OPTIONS)


def test_attention_that_raises_is_a_model_that_cannot_be_served(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_tiny()
    monkeypatch.setattr(loaded.model.config, "head_dim", 5)
    with pytest.raises(ModelLoadError, match="does not run with the engine's attention"):
        build_core(loaded, TINY_OPTIONS)


def test_a_window_that_the_attention_is_not_told_of_is_refused(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some models put their window into the mask alone, which the engine's attention ignores.

    A short probe does not reach the window, so its logits would not show the error.
    """
    loaded = load_tiny("llama")
    monkeypatch.setattr(loaded.model.config, "sliding_window", 100, raising=False)
    with pytest.raises(ModelLoadError, match="sliding windows"):
        build_core(loaded, TINY_OPTIONS)


def test_longrope_is_served_up_to_its_original_context(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_tiny()
    core = build_core(loaded, TINY_OPTIONS)
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 128}
    monkeypatch.setattr(loaded.model.config, "rope_parameters", rope)
    assert context_length(loaded, TINY_OPTIONS, core.scheduler.pool) == 128


def test_a_probe_that_failed_is_made_again(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = build_core(load_tiny(), TINY_OPTIONS)

    def fail(_sites: frozenset[str]) -> frozenset[str]:
        raise MemoryError

    with monkeypatch.context() as failing:
        failing.setattr(core.interventions._probes, "_probe", fail)
        with pytest.raises(MemoryError):
            core.interventions.install("a", random_maps(1))
    with monkeypatch.context() as dead:
        dead.setattr(core.interventions._probes, "_probe", lambda sites: sites)
        with pytest.raises(UnservableInterventionError):
            core.interventions.install("a", random_maps(1))
    assert core.interventions.slots.used == 0


def test_an_installation_that_fails_leaves_its_slot_free(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = build_core(load_tiny(), TINY_OPTIONS)

    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as failing:
        failing.setattr(core.interventions.bank, "put", fail)
        with pytest.raises(MemoryError):
            core.interventions.install("a", random_maps(1))
    assert core.interventions.slots.used == core.interventions.slots._pins.total() == 0
    assert core.interventions.install("a", random_maps(1)) == 1


def test_rewards_that_do_not_reach_the_logits_are_noticed(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bank, "edit_rows", lambda _bank, hidden, _route, _meter: hidden)
    with pytest.raises(ModelLoadError, match="before lm_head"):
        build_core(load_tiny(), TINY_OPTIONS)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (EngineOptions(kv_cache_gb=1e-9), "single block"),
        (EngineOptions(max_model_len=1000), "512 positions"),
    ],
)
def test_options_that_cannot_be_met_are_refused(
    load_tiny: LoadTiny, options: EngineOptions, says: str
) -> None:
    loaded = load_tiny()
    with pytest.raises(ModelLoadError, match=says):
        context_length(loaded, options, build_core(loaded, options).scheduler.pool)


def test_the_context_is_what_the_memory_holds(load_tiny: LoadTiny) -> None:
    loaded = load_tiny()
    options = EngineOptions(kv_cache_gb=100 * 256 / 1e9)  # room for 100 tokens of 256 bytes
    pool = build_core(loaded, options).scheduler.pool
    assert context_length(loaded, options, pool) == 96


def test_a_head_can_be_loaded_beside_maps(load_tiny: LoadTiny) -> None:
    core = build_core(load_tiny(), TINY_OPTIONS)
    slots = {
        core.interventions.install("a", random_maps(1)),
        core.interventions.install("r", random_head(1)),
    }
    assert slots == {1, 2}
