"""Loads a base model for the torch engine, or says why it cannot be served."""

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
from server.engine.model.description import (
    ModelLoadError,
    describe,
    end_tokens,
    output_embeddings,
    refuse_unservable,
    resolve_dtype,
)
from server.engine.model.embedded import EMBEDDED_MODEL_ID, embedded_model_folder
from server.engine.torch.model.devices import is_offloaded, keep_rows_on_host

DeviceMap: TypeAlias = Literal["none", "auto"]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A causal language model in evaluation mode, its tokenizer, and its description."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    description: ModelDescription

    @property
    def lm_head(self) -> nn.Module:
        """The module that turns hidden states into logits."""
        lm_head = output_embeddings(self.model)
        assert isinstance(lm_head, nn.Module)
        return lm_head

    @property
    def eos_tokens(self) -> frozenset[int]:
        """The tokens that end a completion."""
        return end_tokens(self.model.generation_config, self.tokenizer)


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
