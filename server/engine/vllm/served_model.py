"""Describes a model that vLLM is to run, and chooses the sites that the workers prepare."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from interventions.model import ModelDescription
from server.config import ConfigurationError
from server.engine.model.unloaded import describe_unloaded
from server.engine.vllm.fixed_sites import with_fixed_sites
from server.engine.vllm.options import VllmOptions
from server.engine.vllm.plugin.sites import ARCHITECTURES, chosen_sites
from server.engine.vllm.plugin.wire import Layout
from steering.sites import SiteError, default_sites


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that vLLM is to run."""

    source: str  # a folder or a Hugging Face id
    dtype: str  # float32, bfloat16 or float16
    device: str  # cpu or cuda
    description: ModelDescription
    tokenizer: PreTrainedTokenizerFast
    eos_tokens: frozenset[int]
    max_model_len: int  # tokens of a prompt and its completion
    layout: Layout


def describe_served_model(
    model: str,
    dtype: str,
    options: VllmOptions,
    stored_sites: Iterable[str],
    say: Callable[[str], None],
) -> ServedModel:
    """Describe a model without loading it.

    Args:
        model: "embedded", a folder or a Hugging Face id.
        dtype: auto, float32, bfloat16 or float16.
        options: the operator's.
        stored_sites: those of all stored artifacts; the ones that vLLM cannot edit are left out.
        say: called with a sentence about each step that takes time.

    Raises:
        ModelLoadError: the model cannot be described, or vLLM's model of its architecture is not
            steered; see `describe_unloaded`.
        ConfigurationError: a pattern matches no site that vLLM can edit, or the context is longer
            than the model's.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = describe_unloaded(model, dtype, device, say, architectures=ARCHITECTURES)
    sites = _chosen_sites(found.description, options, stored_sites)
    longest: int = found.config.max_position_embeddings
    if options.max_model_len is not None and options.max_model_len > longest:
        raise ConfigurationError(
            f"max_model_len {options.max_model_len} exceeds the model's {longest} positions"
        )
    return ServedModel(
        source=found.location,
        dtype=str(found.dtype).removeprefix("torch."),
        device=device,
        description=with_fixed_sites(found.description, sites),
        tokenizer=found.tokenizer,
        eos_tokens=found.eos_tokens,
        max_model_len=options.max_model_len or longest,
        layout=Layout(options.max_loaded_interventions, sites, options.runner),
    )


def _chosen_sites(
    model: ModelDescription, options: VllmOptions, stored_sites: Iterable[str]
) -> tuple[str, ...]:
    architecture, layers = model.architecture, model.num_layers
    try:
        patterns = (default_sites(architecture), *options.sites)
        return chosen_sites(architecture, layers, patterns, stored_sites)
    except SiteError as error:
        raise ConfigurationError(str(error)) from error
