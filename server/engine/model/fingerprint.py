"""Identifies a model by its weights and its configuration."""

import hashlib
import json
import re
from collections.abc import Iterable
from typing import Final

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

_SAMPLES: Final = 64  # values hashed of each weight
_SIGNIFICANT_DIGITS: Final = 7  # as many as a float32 has: a GGUF's 1e-5 is 9.999999747e-06

# Fields that do not affect what is computed from a prompt: names and paths, how the model was
# stored, options for training only, the tokens at which a text begins or ends, and what the
# weights' names tell already.
_WITHOUT_EFFECT: Final = re.compile(
    r"\w*name_or_path|auto_map|quantization_config|torch_dtype|use_cache|gradient_checkpointing|"
    r"\w*(dropout|pdrop|layerdrop)|initializer_\w+|init_std|\w+_token_id|"
    r"tie_word_embeddings"
)


def fingerprint_of(model: PreTrainedModel) -> str:
    """Return the sha256 of the weights and that of the configuration, as `<hex>-<hex>`.

    Neither depends on the dtype that the model is loaded in, nor on its device.
    """
    return fingerprint_of_weights(model.named_parameters(), model.config)


def fingerprint_of_weights(weights: Iterable[tuple[str, Tensor]], config: PreTrainedConfig) -> str:
    """Return the fingerprint of a model that has these weights and this configuration.

    Args:
        weights: names and weights in the order of the model's parameters. Each is read before the
            next is asked for, and not kept.
        config: the model's configuration.
    """
    return f"{_of_weights(weights)}-{_of_configuration(config.get_text_config())}"


def _of_weights(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Hash the weights' names, their shapes, and 64 values of each, rounded to bfloat16."""
    digest = hashlib.sha256()
    for name, weight in weights:
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        flat = weight.detach().flatten()
        sample = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].to(torch.bfloat16)
        digest.update(sample.view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()


def _of_configuration(config: PreTrainedConfig) -> str:
    """Hash the fields in which a configuration differs from the defaults of its class.

    A default value counts the same whether a file spells it out or not, and whether this version of
    transformers knows the field or not.
    """
    common = PreTrainedConfig().to_dict()  # fields of all models: dtype, version, labels, outputs
    defaults = {} if config.has_no_defaults_at_init else type(config)().to_dict()
    chosen = {
        name: _plain(value)
        for name, value in config.to_dict().items()
        if name not in common
        and not _WITHOUT_EFFECT.fullmatch(name)
        and not (name in defaults and _plain(defaults[name]) == _plain(value))
    }
    chosen["model_type"] = config.model_type
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()


def _plain(value: object) -> object:
    """Return a value for JSON, in which equal numbers are written alike."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{float(value):.{_SIGNIFICANT_DIGITS}g}"
    return value if value is None or isinstance(value, bool) else str(value)
