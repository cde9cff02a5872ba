"""Describes a model that vLLM is to run, and chooses the sites that the workers prepare."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerFast

from interventions.model import ModelDescription
from server.config import ConfigurationError
from server.engine.model.embedded import embedded_model_folder
from server.engine.torch.model.loader import load_model
from server.engine.vllm.options import VllmOptions
from server.engine.vllm.plugin.sites import chosen_sites
from server.engine.vllm.plugin.wire import Layout
from steering.sites import SiteError, default_sites


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that vLLM is to run. Its description lists only the sites that are prepared."""

    source: str  # a folder or a Hugging Face id
    dtype: str  # float32, bfloat16 or float16
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
    """Describe a model.

    It is loaded once by transformers, for its fingerprint and widths, and given up again.

    Args:
        model: "embedded", a folder or a Hugging Face id.
        dtype: auto, float32, bfloat16 or float16.
        options: the operator's.
        stored_sites: those of all stored artifacts.
        say: called with a sentence about each step that takes time.

    Raises:
        ModelLoadError: the model cannot be loaded.
        ConfigurationError: vLLM's model of this architecture is not steered, a pattern matches none
            of its sites, or the context is longer than the model's.
    """
    loaded = load_model(model, dtype, say=say)
    description, config = loaded.description, loaded.model.config.get_text_config()
    try:
        patterns = (default_sites(description.architecture), *options.sites)
        sites = chosen_sites(
            description.architecture, description.num_layers, patterns, stored_sites
        )
    except SiteError as error:
        raise ConfigurationError(str(error)) from error
    longest: int = config.max_position_embeddings
    if options.max_model_len is not None and options.max_model_len > longest:
        raise ConfigurationError(
            f"max_model_len {options.max_model_len} exceeds the model's {longest} positions"
        )
    return ServedModel(
        source=str(embedded_model_folder(say)) if model == "embedded" else model,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        description=replace(
            description, site_widths={site: description.site_widths[site] for site in sites}
        ),
        tokenizer=loaded.tokenizer,
        eos_tokens=loaded.eos_tokens,
        max_model_len=options.max_model_len or longest,
        layout=Layout(options.max_loaded_interventions, sites),
    )
