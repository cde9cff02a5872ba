"""Translates other projects' places in a model to sites, and checks them against the model."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal, TypeAlias

import torch
from torch import Tensor

from interventions.importers.imported import ImportFileError
from interventions.model import ModelDescription
from interventions.spelling import nearest_name
from steering.affine import AffineMap
from steering.sites import input_site

Place: TypeAlias = Literal["residual", "feed-forward"]
"""Says where a vector is added to the residual stream: after a decoder layer, or to the
output of the layer's feed-forward network, which the layer then adds to the stream. Both give the
same sum; vLLM, which fuses modules, computes only the second in many models."""

_LAYER: Final = re.compile(r"(?P<list>.+)\.(?P<index>\d+)")

# The module whose output a decoder layer adds to the residual stream last, by architecture.
_FEED_FORWARD: Final[Mapping[str, str]] = {
    "LlamaForCausalLM": "mlp",
    "MistralForCausalLM": "mlp",
    "Phi3ForCausalLM": "mlp",
    "Qwen2ForCausalLM": "mlp",
    "Qwen3ForCausalLM": "mlp",
    "Gemma2ForCausalLM": "post_feedforward_layernorm",
}


def check_site(path: Path, site: str, width: int, model: ModelDescription) -> None:
    """Check that the model has a site of this width.

    Raises:
        ImportFileError: it has not.
    """
    if site not in model.site_widths:
        near = nearest_name(site, model.site_widths, 0.8)
        hint = f' Its nearest site is "{near}".' if near is not None else ""
        raise ImportFileError(f'{path}: the model {model.id} has no site "{site}".{hint}')
    if width != model.site_widths[site]:
        raise ImportFileError(
            f"{path} has width {width}, but the model {model.id} has "
            f'{model.site_widths[site]} at "{site}": the file is of another model.'
        )


def decoder_layers(path: Path, model: ModelDescription) -> list[str]:
    """Return the module paths of the model's decoder layers, in their order.

    Raises:
        ImportFileError: the model has no list of layers that give the residual stream.
    """
    found: dict[str, set[int]] = {}
    for site, width in model.site_widths.items():
        if (match := _LAYER.fullmatch(site)) and width == model.hidden_size:
            found.setdefault(match["list"], set()).add(int(match["index"]))
    lists = [name for name, indices in found.items() if indices == set(range(model.num_layers))]
    if not lists:
        raise ImportFileError(f"{path}: the decoder layers of {model.architecture} are not known.")
    shortest = min(lists, key=len)  # a mixture of experts has lists inside of its layers
    return [f"{shortest}.{index}" for index in range(model.num_layers)]


def sites_after_layers(path: Path, model: ModelDescription, place: Place) -> list[str]:
    """Return, for each decoder layer, the site at which a vector is added to its output.

    Raises:
        ImportFileError: the model's layers, or their feed-forward networks, are not known.
    """
    layers = decoder_layers(path, model)
    if place == "residual":
        return layers
    module = _FEED_FORWARD.get(model.architecture)
    if module is None:
        raise ImportFileError(
            f"{path}: the feed-forward networks of {model.architecture} are not known; those of "
            f"{', '.join(_FEED_FORWARD)} are. Choose the residual stream."
        )
    return [f"{layer}.{module}" for layer in layers]


def sites_before_layers(path: Path, model: ModelDescription, place: Place) -> list[str | None]:
    """Return, for each decoder layer, the site at which a vector is added to its input.

    The first is None if there is no layer before it whose feed-forward network could be edited.

    Raises:
        ImportFileError: see `sites_after_layers`.
    """
    if place == "residual":
        return [input_site(layer) for layer in decoder_layers(path, model)]
    return [None, *sites_after_layers(path, model, place)[:-1]]


def vector_map(vector: Tensor) -> AffineMap:
    """Return the map that adds strength times a vector, (d,) float32."""
    return AffineMap(torch.ones_like(vector), vector)


def parse_layers(text: str) -> frozenset[int]:
    """Return the layers in a list of numbers and ranges, both ends included, such as 4,10-15.

    Raises:
        ImportFileError: the text is no such list.
    """
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})(?:\s*-\s*(\d{1,4}))?\s*", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ImportFileError(f"The layers {text!r} are no list of numbers such as 4,10-15.")
        layers.update(range(first, last + 1))
    return frozenset(layers)


def chosen_directions(
    path: Path, directions: Mapping[int, Tensor], layers: frozenset[int] | None
) -> dict[int, Tensor]:
    """Return the directions of the chosen layers, ordered by layer, without those that are zero.

    Args:
        path: the file, for messages.
        directions: layer -> direction, (d,) float32.
        layers: the chosen ones; None for all.

    Raises:
        ImportFileError: a chosen layer has no direction, or all of them are zero.
    """
    chosen = directions.keys() if layers is None else layers
    if missing := sorted(chosen - directions.keys()):
        known = ", ".join(map(str, sorted(directions)))
        raise ImportFileError(f"{path} has no direction for layer {missing[0]}; it has {known}.")
    kept = {layer: directions[layer] for layer in sorted(chosen) if directions[layer].any()}
    if not kept:
        raise ImportFileError(f"{path}: every direction is zero, so nothing would be steered.")
    return kept
