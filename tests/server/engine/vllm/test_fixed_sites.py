"""Tests what is said of sites that vLLM cannot edit: options that help, and reasons."""

import shlex
from pathlib import Path

import pytest

from server.engine.model.description import describe
from server.engine.vllm.fixed_sites import with_fixed_sites
from server.engine.vllm.plugin.sites import chosen_sites, possible_sites
from steering.sites import default_sites
from tests.tiny import FAMILIES, LAYERS, tiny_model

OPTIONS = Path(__file__).parents[4] / "docs" / "options.md"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_is_prepared_or_has_an_option_or_a_reason(family: str) -> None:
    plain = describe(tiny_model(family), "tiny", "")
    architecture = plain.architecture
    prepared = chosen_sites(architecture, LAYERS, [default_sites(architecture)], [])
    model = with_fixed_sites(plain, prepared)
    unprepared, impossible = model.unprepared_sites.keys(), model.impossible_sites.keys()
    assert model.site_widths == plain.site_widths
    assert len(prepared) + len(unprepared) + len(impossible) == len(model.site_widths)
    assert {*prepared, *unprepared, *impossible} == model.site_widths.keys()
    assert {*prepared, *unprepared} == set(possible_sites(architecture, LAYERS))
    for site, option in model.unprepared_sites.items():
        name, pattern = shlex.split(option)
        assert f"| `{name}` |" in OPTIONS.read_text()
        assert site in chosen_sites(architecture, LAYERS, [pattern], [])


def test_the_reason_names_what_vllm_fuses() -> None:
    model = with_fixed_sites(describe(tiny_model("llama"), "tiny", ""), ())
    reasons = model.impossible_sites
    assert "does not compute" in reasons["model.layers.0.self_attn.q_proj"]
    assert '"model.layers.0.self_attn.q_proj"' in reasons["model.layers.0.self_attn.q_proj"]
    assert "the input of a module" in reasons["model.layers.0.mlp.input"]
    assert model.unprepared_sites["model.layers.1.mlp"] == r"--site 'model\.layers\.\d+\.mlp'"
