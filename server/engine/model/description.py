"""Describes a base model, and refuses one that no engine can serve."""

import inspect

import torch
from torch import nn
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from interventions.model import ModelDescription
from steering.site_widths import measure_site_widths

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SERVED_LAYER_TYPES = {"full_attention", "sliding_attention"}


class ModelLoadError(Exception):
    """The model cannot be loaded or served; the message says why."""


def resolve_dtype(dtype: str, device: str, config: PreTrainedConfig) -> torch.dtype:
    """Return the dtype to load in; on a CPU, "auto" is bfloat16 only if the CPU accelerates it."""
    if dtype != "auto":
        if dtype not in _DTYPES:
            raise ModelLoadError(f"dtype must be auto, {', '.join(_DTYPES)}, not {dtype!r}")
        return _DTYPES[dtype]
    if device == "cpu":
        capabilities = torch.cpu.get_capabilities()
        fast = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
        return torch.bfloat16 if fast else torch.float32
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16


def refuse_unservable(config: PreTrainedConfig) -> None:
    """Raise ModelLoadError if the configuration shows that the engine would compute wrongly."""
    name = (config.architectures or [config.model_type])[0]
    if config.is_encoder_decoder:
        raise ModelLoadError(f"{name} is an encoder-decoder; steerserve serves decoders only")
    layer_types = set(getattr(config, "layer_types", None) or ())
    if others := sorted(layer_types - _SERVED_LAYER_TYPES):
        raise ModelLoadError(f"{name} has layers of type {', '.join(others)}, which are not served")


def refuse_unservable_class(model: PreTrainedModel) -> None:
    """Raise ModelLoadError if the model's code lacks an interface that the engine needs."""
    name = type(model).__name__
    if not model._supports_attention_backend:
        raise ModelLoadError(
            f"{name} does not take its attention from transformers' AttentionInterface, "
            "so the engine cannot give it a K/V cache"
        )
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise ModelLoadError(f"{name} cannot compute the logits of chosen rows only")
    if not isinstance(output_embeddings(model), nn.Linear):
        raise ModelLoadError(f"{name} has no linear lm_head before which a reward could act")


def describe(model: PreTrainedModel, identity: str, fingerprint: str) -> ModelDescription:
    """Return what must be known of a model to check artifacts against it.

    Raises:
        ModelLoadError: the model's code lacks an interface that the engine needs.
    """
    refuse_unservable_class(model)
    lm_head = output_embeddings(model)
    assert isinstance(lm_head, nn.Linear)
    config = model.config.get_text_config()
    return ModelDescription(
        id=identity,
        architecture=type(model).__name__,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        vocab_size=config.vocab_size,
        head_width=lm_head.in_features,
        site_widths=measure_site_widths(model, config.vocab_size),
        fingerprint=fingerprint,
    )


def output_embeddings(model: PreTrainedModel) -> object:
    """Return the module that turns hidden states into logits; None if the model has none."""
    return model.get_output_embeddings()  # type: ignore[no-untyped-call]


def end_tokens(
    generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerFast
) -> frozenset[int]:
    """Return the tokens that end a completion."""
    eos = generation.eos_token_id if generation is not None else None
    if eos is None:
        eos = tokenizer.eos_token_id
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)
