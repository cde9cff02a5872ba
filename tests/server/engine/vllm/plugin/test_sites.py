import pytest

from server.engine.vllm.plugin.sites import ARCHITECTURES, chosen_sites, possible_sites
from steering.site_widths import measure_site_widths
from steering.sites import DEFAULT_SITES, SiteError, default_sites, match_sites
from tests.tiny import FAMILIES, LAYERS, VOCABULARY, WIDTH, family_sites, tiny_model

LLAMA = "LlamaForCausalLM"


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_has_every_possible_site_as_wide_as_the_residual_stream(family: str) -> None:
    model = tiny_model(family)
    widths = measure_site_widths(model, VOCABULARY)
    sites = possible_sites(type(model).__name__, LAYERS)
    assert {widths[site] for site in sites} == {WIDTH}
    assert len(set(sites)) == len(sites)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_sites_are_possible(family: str) -> None:
    architecture = type(tiny_model(family)).__name__
    chosen = chosen_sites(architecture, LAYERS, [default_sites(architecture)], [])
    assert set(chosen) == set(family_sites(family))


def test_every_architecture_with_default_sites_is_known() -> None:
    assert set(DEFAULT_SITES) == {*ARCHITECTURES}


def test_sites_of_artifacts_are_chosen_if_they_are_possible() -> None:
    stored = ["model.layers.1.mlp", "model.layers.0.self_attn.q_proj", "model.layers.9.mlp"]
    assert chosen_sites(LLAMA, 2, [], stored) == ("model.layers.1.mlp",)


def test_a_pattern_that_matches_no_possible_site_is_an_error() -> None:
    with pytest.raises(SiteError, match="matches no module"):
        chosen_sites(LLAMA, 2, [r"model\.layers\.\d+\.self_attn\.q_proj"], [])


def test_an_unknown_architecture_is_named_beside_the_known_ones() -> None:
    with pytest.raises(SiteError, match=r"MambaForCausalLM is not .*LlamaForCausalLM"):
        possible_sites("MambaForCausalLM", 2)


def test_sites_come_in_one_order_however_they_are_asked_for() -> None:
    """They are part of the key of compiled models."""
    patterns = [r"model\.layers\.\d+\.mlp", r"model\.norm"]
    sites = chosen_sites(LLAMA, 12, patterns, [])
    assert sites == chosen_sites(LLAMA, 12, patterns[::-1], reversed(sites))
    assert sites == (*match_sites(patterns[0], sites), "model.norm")
