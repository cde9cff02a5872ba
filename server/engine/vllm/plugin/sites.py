"""Lists the sites that vLLM's own models compute as transformers' models do, by architecture.

vLLM fuses what transformers computes in several modules: a norm adds the residual stream, and the
projections of queries, keys and values are one matrix. A module's output is a site here only if it
is the same tensor as in transformers. It is then as wide as the residual stream, and whole on every
rank of a tensor-parallel group.

The architectures and their modules were read in vLLM 0.32 (`vllm/model_executor/models`).
"""

from collections.abc import Iterable
from typing import Final

from steering.sites import SiteError, match_sites

# Module paths; "{}" stands for a layer's index.
_LLAMA: Final = (
    "model.layers.{}.input_layernorm",
    "model.layers.{}.self_attn",
    "model.layers.{}.self_attn.o_proj",
    "model.layers.{}.post_attention_layernorm",
    "model.layers.{}.mlp",
    "model.layers.{}.mlp.down_proj",
    "model.norm",
)
_GEMMA2: Final = (
    *_LLAMA,
    "model.layers.{}.pre_feedforward_layernorm",
    "model.layers.{}.post_feedforward_layernorm",
)
_GPT2: Final = (
    "transformer.h.{}",
    "transformer.h.{}.ln_1",
    "transformer.h.{}.attn",
    "transformer.h.{}.attn.c_proj",
    "transformer.h.{}.ln_2",
    "transformer.h.{}.mlp",
    "transformer.h.{}.mlp.c_proj",
    "transformer.ln_f",
)
_OPT: Final = (
    "model.decoder.layers.{}",
    "model.decoder.layers.{}.self_attn_layer_norm",
    "model.decoder.layers.{}.self_attn",
    "model.decoder.layers.{}.self_attn.out_proj",
    "model.decoder.layers.{}.final_layer_norm",
    "model.decoder.layers.{}.fc2",
)
_MODULES: Final = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Phi3ForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": _LLAMA,
    "Gemma2ForCausalLM": _GEMMA2,
    "GPT2LMHeadModel": _GPT2,
    "OPTForCausalLM": _OPT,
}

ARCHITECTURES: Final = tuple(sorted(_MODULES))
"""The architectures that are steered inside vLLM, as in a model's `config.architectures`."""


def possible_sites(architecture: str, num_layers: int) -> tuple[str, ...]:
    """Return the sites of a model that can be edited inside vLLM.

    Raises:
        SiteError: the architecture is not one of `ARCHITECTURES`.
    """
    if architecture not in _MODULES:
        raise SiteError(
            f"{architecture} is not steered inside vLLM; these are: {', '.join(ARCHITECTURES)}"
        )
    return tuple(
        module.format(layer)
        for module in _MODULES[architecture]
        for layer in range(num_layers if "{}" in module else 1)
    )


def chosen_sites(
    architecture: str, num_layers: int, patterns: Iterable[str], sites: Iterable[str]
) -> tuple[str, ...]:
    """Return the sites to be prepared before the model is traced.

    Args:
        architecture: the model's class name, e.g. "LlamaForCausalLM".
        num_layers: the number of its layers.
        patterns: regular expressions over whole module paths; each must match a possible site.
        sites: sites of stored artifacts; impossible ones are left out.

    Raises:
        SiteError: the architecture is unknown, or a pattern matches no possible site.
    """
    possible = possible_sites(architecture, num_layers)
    chosen = {*sites, *(site for pattern in patterns for site in match_sites(pattern, possible))}
    return tuple(site for site in possible if site in chosen)
