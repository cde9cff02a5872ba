"""Describes a model without loading it, for an engine that loads it by itself."""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from interventions.model import ModelDescription
from server.engine.model.checkpoint import Checkpoint, NoSafetensorsError, open_checkpoint
from server.engine.model.description import (
    ModelLoadError,
    describe,
    end_tokens,
    refuse_unservable,
    resolve_dtype,
)
from server.engine.model.fingerprint import fingerprint_of, fingerprint_of_weights
from server.engine.model.matching import OtherNamesError, stored_parameters
from server.engine.model.source import ModelSource, find_source, load_tokenizer, reading
from server.engine.model.weights import load_weights, reference_attention


@dataclass(frozen=True, slots=True)
class UnloadedModel:
    """A model on a disk or on the Hugging Face hub."""

    location: str  # a folder or a Hugging Face id
    dtype: torch.dtype  # to be loaded in
    config: PreTrainedConfig  # that of the text model
    tokenizer: PreTrainedTokenizerFast
    description: ModelDescription
    eos_tokens: frozenset[int]  # those that end a completion


def describe_unloaded(
    model: str,
    dtype: str,
    device: str,
    say: Callable[[str], None],
    *,
    architectures: Collection[str] | None = None,
) -> UnloadedModel:
    """Describe a model from its configuration and samples of its weights.

    Where the weights cannot be told apart in its files, transformers loads the model once.

    Args:
        model: "embedded", a folder or a Hugging Face id.
        dtype: auto, float32, bfloat16 or float16.
        device: where an engine will run it: cpu or cuda.
        say: called with a sentence about each step that takes time.
        architectures: class names of the models that the engine serves; None for all.

    Raises:
        EmbeddedModelError: "embedded" was asked for and is not installed.
        ModelLoadError: there is no such model, its files are broken or incomplete, or its
            architecture cannot be served.
    """
    source = find_source(model, say)
    say(f"reading {source.location}")
    with reading(source):
        config = AutoConfig.from_pretrained(source.location)
        refuse_unservable(config)
        torch_dtype = resolve_dtype(dtype, device, config)
        generation = _generation_config(source.location, config)
    tokenizer = load_tokenizer(source)
    with reading(source):
        # Its tensors have shapes and no values. Unlike a model on the meta device, it runs:
        # transformers leaves out checks of its values, as it does when a compiler traces it.
        with FakeTensorMode():
            skeleton = _skeleton(config)
            _refuse_others(skeleton, architectures)
            described = describe(skeleton, source.identity, "")
        fingerprint = _fingerprint(source, skeleton, torch_dtype, say)
    return UnloadedModel(
        location=source.location,
        dtype=torch_dtype,
        config=config.get_text_config(),
        tokenizer=tokenizer,
        description=replace(described, fingerprint=fingerprint),
        eos_tokens=end_tokens(generation, tokenizer),
    )


def _skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, attn_implementation=reference_attention(config)
    )
    module: nn.Module = model
    module.eval()
    return model


def _refuse_others(model: PreTrainedModel, architectures: Collection[str] | None) -> None:
    name = type(model).__name__
    if architectures is not None and name not in architectures:
        raise ModelLoadError(
            f"{name} is not served by this engine; these are: {', '.join(sorted(architectures))}"
        )


def _generation_config(location: str, config: PreTrainedConfig) -> GenerationConfig:
    """Return the configuration that transformers gives a loaded model."""
    try:
        return GenerationConfig.from_pretrained(location)
    except OSError:  # the model has no file of it
        return GenerationConfig.from_model_config(config)


def _fingerprint(
    source: ModelSource,
    skeleton: PreTrainedModel,
    dtype: torch.dtype,
    say: Callable[[str], None],
) -> str:
    """Return the fingerprint that the loaded model has; a quantized model's is of its files."""
    config = skeleton.config
    try:
        with open_checkpoint(source.location) as checkpoint:
            if getattr(config, "quantization_config", None) is not None:
                weights = _all_stored(checkpoint)
            else:
                weights = stored_parameters(source.location, skeleton, checkpoint)
            return fingerprint_of_weights(weights, config)
    except (NoSafetensorsError, OtherNamesError) as error:
        say(f"{error}: transformers loads the model once to identify it")
        return fingerprint_of(load_weights(source.location, config, dtype, "cpu"))


def _all_stored(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Yield all weights of a checkpoint by name: a quantized model has more than its parameters."""
    return ((name, checkpoint.read(name)) for name in sorted(checkpoint.names))
