"""Finds a model's parameters among the weights in its files."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from server.engine.model.checkpoint import Checkpoint
from server.engine.model.weights import missing_weights


class OtherNamesError(Exception):
    """Only transformers can tell which weight is which parameter; the message says why."""


class _Parameter(NamedTuple):
    """A parameter by its names, of which there are several if the configuration ties it."""

    names: list[str]
    shape: tuple[int, ...]


def stored_parameters(
    location: str, model: PreTrainedModel, checkpoint: Checkpoint
) -> Iterator[tuple[str, Tensor]]:
    """Return the values of a model's parameters by name, in the order of `named_parameters`.

    Each weight is read when it is asked for.

    Args:
        location: the checkpoint's, for messages.
        model: gives names and shapes. Its parameters' values are not read.
        checkpoint: the model's weights.

    Raises:
        ModelLoadError: the checkpoint lacks parameters.
        ValueError: a weight has another shape than the parameter.
        OtherNamesError: the checkpoint may have parameters under other names, or weights that the
            configuration ties differ.
    """
    places: dict[str, str] = {}  # parameter -> weight
    missing: list[str] = []
    used: set[str] = set()
    for parameter in _parameters(model):
        found = _weights_of(parameter, model.base_model_prefix, checkpoint)
        if found:
            _check(parameter, found, checkpoint)
            places[parameter.names[0]] = found[0]
            used.update(found)
        else:
            missing.append(parameter.names[0])
    if missing and used != set(checkpoint.names):
        raise OtherNamesError(f"{location} names weights otherwise than {type(model).__name__}")
    if missing:
        raise missing_weights(location, missing)
    return ((name, checkpoint.read(place)) for name, place in places.items())


def _parameters(model: nn.Module) -> list[_Parameter]:
    """Return the parameters in the order of `named_parameters`."""
    found: dict[int, _Parameter] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(tensor), _Parameter([], tuple(tensor.shape))).names.append(name)
    return list(found.values())


def _weights_of(parameter: _Parameter, prefix: str, checkpoint: Checkpoint) -> list[str]:
    """Return the names under which a checkpoint has a parameter.

    A checkpoint of a model without `lm_head` (GPT-2's, for one) lacks the prefix of all names.
    """
    spelt = ((name, name.removeprefix(f"{prefix}.")) for name in parameter.names)
    found = (next((each for each in both if each in checkpoint.names), None) for both in spelt)
    return [name for name in found if name is not None]


def _check(parameter: _Parameter, weights: list[str], checkpoint: Checkpoint) -> None:
    """Check a parameter's shape, and that weights are equal which the configuration ties."""
    for weight in weights:
        if (shape := checkpoint.shape(weight)) != parameter.shape:
            raise ValueError(
                f"the weight {weight} has shape {shape}, the model's has {parameter.shape}"
            )
    first, *others = weights
    if others:
        tensor = checkpoint.read(first)
        if not all(torch.equal(tensor, checkpoint.read(other)) for other in others):
            raise OtherNamesError(f"the weights {', '.join(weights)} differ, though they are tied")
