"""Loads a base model for the torch engine, or says why it cannot be served."""

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from interventions.model import ModelDescription
from server.engine.torch.model.devices import is_offloaded, keep_rows_on_host
from server.engine.torch.model.embedded import EMBEDDED_MODEL_ID, embedded_model_folder
from server.engine.torch.model.fingerprint import fingerprint_of
from steering.site_widths import measure_site_widths

DeviceMap: TypeAlias = Literal["none", "auto"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SERVED_LAYER_TYPES = {"full_attention", "sliding_attention"}


class ModelLoadError(Exception):
    """The model cannot be loaded or served; the message says why."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A causal language model in evaluation mode, its tokenizer, and its description."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    description: ModelDescription

    @property
    def lm_head(self) -> nn.Module:
        """The module that turns hidden states into logits."""
        lm_head = _output_embeddings(self.model)
        assert isinstance(lm_head, nn.Module)
        return lm_head

    @property
    def eos_tokens(self) -> frozenset[int]:
        """The tokens that end a completion."""
        generation = self.model.generation_config
        eos = generation.eos_token_id if generation is not None else None
        if eos is None:
            eos = self.tokenizer.eos_token_id
        if eos is None:
            return frozenset()
        return frozenset([eos] if isinstance(eos, int) else eos)


def load_model(
    model: str,
    dtype: str = "auto",
    device: str = "cpu",
    say: Callable[[str], None] = lambda _sentence: None,
    *,
    device_map: DeviceMap = "none",
) -> LoadedModel:
    """Load a model from "embedded", a folder or a Hugging Face id.

    Args:
        dtype: auto, float32, bfloat16 or float16.
        device: where the whole model goes, unless `device_map` is "auto".
        say: called with a sentence about each step that takes time.
        device_map: "auto" has accelerate spread the layers over all GPUs.

    Raises:
        EmbeddedModelError: "embedded" was asked for and is not installed.
        ModelLoadError: there is no such model, or its architecture cannot be served.
    """
    embedded = model == "embedded"
    source = str(embedded_model_folder(say)) if embedded else model
    say(f"loading {source}")
    try:
        config = AutoConfig.from_pretrained(source)
        refuse_unservable(config)
        torch_dtype = resolve_dtype(dtype, device, config)
        place = device if device_map == "none" else device_map
        loaded = _load_weights(source, config, torch_dtype, place)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelLoadError(f"cannot load {model!r}: {error}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelLoadError(f"{model!r} has no fast tokenizer (tokenizer.json)")
    module: nn.Module = loaded
    module.eval().requires_grad_(False)
    if is_offloaded(loaded):
        raise ModelLoadError(
            f"{model!r} does not fit in the memory of the devices; what was left over would have "
            "to be copied there for every token"
        )
    keep_rows_on_host(loaded)
    identity = EMBEDDED_MODEL_ID if embedded else Path(model).name.lower()
    return LoadedModel(loaded, tokenizer, describe(loaded, identity))


def _load_weights(
    source: str, config: PreTrainedConfig, dtype: torch.dtype, device_map: str
) -> PreTrainedModel:
    """Load the weights.

    Raises:
        ModelLoadError: some are missing; transformers would make them up at random.
    """
    loaded: PreTrainedModel
    found: dict[str, Collection[str]]
    loaded, found = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
        source,
        config=config,
        dtype=dtype,
        attn_implementation=reference_attention(config),
        device_map=device_map,
        output_loading_info=True,
    )
    if missing := sorted(found["missing_keys"]):
        names = ", ".join(missing[:5])
        raise ModelLoadError(f"{source!r} lacks {len(missing)} of the model's weights: {names}")
    return loaded


def reference_attention(config: PreTrainedConfig) -> str:
    """Return which of transformers' own attentions computes what the model's authors meant."""
    soft_capped = getattr(config, "attn_logit_softcapping", None) is not None
    return "eager" if soft_capped else "sdpa"  # sdpa would silently leave the cap out


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
    if not isinstance(_output_embeddings(model), nn.Linear):
        raise ModelLoadError(f"{name} has no linear lm_head before which a reward could act")


def describe(model: PreTrainedModel, identity: str) -> ModelDescription:
    """Return what must be known of a model to check artifacts against it."""
    refuse_unservable_class(model)
    lm_head = _output_embeddings(model)
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
        fingerprint=fingerprint_of(model),
    )


def _output_embeddings(model: PreTrainedModel) -> object:
    return model.get_output_embeddings()  # type: ignore[no-untyped-call]
