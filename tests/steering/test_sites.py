"""Tests the table of default sites, and matching of patterns against module paths."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from steering.sites import (
    DEFAULT_SITES,
    SiteError,
    choose_sites,
    default_sites,
    match_sites,
)

_LAYERS = 11  # more than ten, so that numeric order (2 before 10) differs from alphabetical order

_TINY_ROPE: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "pad_token_id": 0,
}


def _tiny(architecture: str) -> PreTrainedConfig:
    rope_families: dict[str, type[PreTrainedConfig]] = {
        "LlamaForCausalLM": LlamaConfig,
        "MistralForCausalLM": MistralConfig,
        "Phi3ForCausalLM": Phi3Config,
        "Qwen2ForCausalLM": Qwen2Config,
        "Qwen3ForCausalLM": Qwen3Config,
        "Gemma2ForCausalLM": Gemma2Config,
    }
    if architecture == "GPT2LMHeadModel":
        return GPT2Config(vocab_size=16, n_embd=8, n_layer=_LAYERS, n_head=2)
    if architecture == "OPTForCausalLM":
        return OPTConfig(
            vocab_size=16,
            hidden_size=8,
            ffn_dim=8,
            num_hidden_layers=_LAYERS,
            num_attention_heads=2,
            word_embed_proj_dim=8,
        )
    return rope_families[architecture](**_TINY_ROPE)


_EXPECTED = {
    "Gemma2ForCausalLM": 2,
    "GPT2LMHeadModel": 2,
    "LlamaForCausalLM": 1,
    "MistralForCausalLM": 1,
    "OPTForCausalLM": 2,
    "Phi3ForCausalLM": 1,
    "Qwen2ForCausalLM": 1,
    "Qwen3ForCausalLM": 1,
}


def test_the_table_covers_what_is_tested() -> None:
    assert sorted(DEFAULT_SITES) == sorted(_EXPECTED)


@pytest.mark.parametrize(("architecture", "sites_a_layer"), _EXPECTED.items())
def test_default_sites_exist_in_the_real_module_tree(architecture: str, sites_a_layer: int) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            _tiny(architecture)
        )
    assert type(model).__name__ == architecture
    paths = [path for path, _ in model.named_modules()]
    sites = match_sites(default_sites(architecture), paths)
    assert len(sites) == _LAYERS * sites_a_layer
    layers = [next(int(part) for part in site.split(".") if part.isdigit()) for site in sites]
    assert layers == sorted(layers)


def test_unknown_architecture_lists_the_known_ones() -> None:
    with pytest.raises(SiteError, match=r"MambaForCausalLM.*LlamaForCausalLM"):
        default_sites("MambaForCausalLM")
    assert issubclass(SiteError, ValueError)


def test_whole_paths_are_matched_in_natural_order() -> None:
    paths = ["", "h.10.ln", "h.2.ln", "h.2.ln.inner", "x.h.2.ln", "h.2.ln"]
    assert match_sites(r"h\.\d+\.ln", paths) == ("h.2.ln", "h.10.ln")
    assert match_sites(r".*\.ln", paths) == ("h.2.ln", "h.10.ln", "x.h.2.ln")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("(", "not a regular expression"), ("nothing", "matches no module"), ("", "no module")],
)
def test_bad_patterns_are_refused(pattern: str, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        match_sites(pattern, ["", "a", "b.c"])


def test_an_input_is_chosen_where_its_module_is_not() -> None:
    sites = ["a.o", "a.o.input", "a.mlp", "a.mlp.input", "a.rotary.input"]
    assert choose_sites(r".*", sites) == ("a.mlp", "a.o")
    assert choose_sites(r"a\.o(\.input)?", sites) == ("a.o",)
    assert choose_sites(r"a\.o\.input", sites) == ("a.o.input",)
    assert choose_sites(r"a\.(mlp|o\.input)", sites) == ("a.mlp", "a.o.input")
    assert choose_sites(r".*\.input", sites) == ("a.mlp.input", "a.o.input", "a.rotary.input")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [("(", "not a regular expression"), ("b", "matches no module"), ("a", "one vector for each")],
)
def test_a_pattern_that_chooses_no_site_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        choose_sites(pattern, ["a.input", "c"])
