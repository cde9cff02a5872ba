"""Loads a model's weights by transformers."""

from collections.abc import Collection

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from server.engine.model.description import ModelLoadError


def load_weights(
    location: str, config: PreTrainedConfig, dtype: torch.dtype, device_map: str
) -> PreTrainedModel:
    """Load a model.

    Args:
        location: a folder or a Hugging Face id.
        config: the model's configuration.
        dtype: number format of the weights.
        device_map: a device, or "auto" to have accelerate spread the layers over all GPUs.

    Raises:
        ModelLoadError: some are missing; transformers would make them up at random.
    """
    loaded: PreTrainedModel
    found: dict[str, Collection[str]]
    loaded, found = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
        location,
        config=config,
        dtype=dtype,
        attn_implementation=reference_attention(config),
        device_map=device_map,
        output_loading_info=True,
    )
    if missing := sorted(found["missing_keys"]):
        raise missing_weights(location, missing)
    return loaded


def missing_weights(location: str, names: Collection[str]) -> ModelLoadError:
    """Return the error for weights of the model that its files lack."""
    first = ", ".join(list(names)[:5])
    return ModelLoadError(f"{location!r} lacks {len(names)} of the model's weights: {first}")


def reference_attention(config: PreTrainedConfig) -> str:
    """Return which of transformers' own attentions computes what the model's authors meant."""
    soft_capped = getattr(config, "attn_logit_softcapping", None) is not None
    return "eager" if soft_capped else "sdpa"  # sdpa would silently leave the cap out
