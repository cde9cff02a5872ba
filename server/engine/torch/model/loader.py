"""Loads a base model for the torch engine, or says why it cannot be served."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

from interventions.model import ModelDescription
from server.engine.model.description import (
    ModelLoadError,
    describe,
    end_tokens,
    output_embeddings,
    refuse_unservable,
    resolve_dtype,
)
from server.engine.model.fingerprint import fingerprint_of
from server.engine.model.source import find_source, load_tokenizer, reading
from server.engine.model.weights import load_weights
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
    source = find_source(model, say)
    say(f"loading {source.location}")
    with reading(source):
        config = AutoConfig.from_pretrained(source.location)
        refuse_unservable(config)
        torch_dtype = resolve_dtype(dtype, device, config)
        place = device if device_map == "none" else device_map
        loaded = load_weights(source.location, config, torch_dtype, place)
    tokenizer = load_tokenizer(source)
    module: nn.Module = loaded
    module.eval().requires_grad_(False)
    if is_offloaded(loaded):
        raise ModelLoadError(
            f"{model!r} does not fit in the memory of the devices; what was left over would have "
            "to be copied there for every token"
        )
    keep_rows_on_host(loaded)
    return LoadedModel(loaded, tokenizer, describe(loaded, source.identity, fingerprint_of(loaded)))
