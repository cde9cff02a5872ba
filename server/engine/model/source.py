"""Finds a model's files and its tokenizer, and says in one sentence why they cannot be read."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from server.engine.model.description import ModelLoadError
from server.engine.model.embedded import EMBEDDED_MODEL_ID, embedded_model_folder

# A configuration whose values are of a wrong kind raises errors of many kinds.
_FAULTS: Final = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError),
    *(SafetensorError, StrictDataclassError, TypeError, ValueError),
)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """The place that a model is read from."""

    name: str  # as the operator gave it
    location: str  # a folder or a Hugging Face id
    identity: str  # the name by which clients and manifests call the model


def find_source(model: str, say: Callable[[str], None]) -> ModelSource:
    """Find a model that is given as "embedded", a folder or a Hugging Face id.

    Args:
        model: the operator's choice.
        say: called with a sentence about each step that takes time.

    Raises:
        EmbeddedModelError: "embedded" was asked for and is not installed.
    """
    if model == "embedded":
        return ModelSource(model, str(embedded_model_folder(say)), EMBEDDED_MODEL_ID)
    return ModelSource(model, model, Path(model).name.lower())


@contextmanager
def reading(source: ModelSource) -> Iterator[None]:
    """Turn the errors that libraries raise for a model's files into ModelLoadError."""
    try:
        yield
    except _FAULTS as error:
        raise ModelLoadError(f"cannot load {source.name!r}: {error}") from error


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerFast:
    """Load a model's tokenizer.

    Raises:
        ModelLoadError: the model has none, or it is not a fast one.
    """
    with reading(source):
        tokenizer = AutoTokenizer.from_pretrained(source.location)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelLoadError(f"{source.name!r} has no fast tokenizer (tokenizer.json)")
    return tokenizer
