"""Reads steering vectors of IBM's activation-steering, a JSON file `.svec`.

github.com/IBM/activation-steering: `SteeringVector.save` writes `model_type`, `directions` (layer
-> list of numbers) and `explained_variances`. `LeashLayer.forward` adds a layer's direction to the
hidden states *before* it calls the layer, so that direction N changes the input of layer N, though
it was computed from the layer's output. The file does not tell which layers to steer;
`MalleableModel.steer` takes 10 to 15 if it is not told.
"""

import math
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from interventions.importers.imported import VECTOR_STRENGTH, ImportedMaps, ImportFileError
from interventions.importers.local_files import read_bytes, sha256_of
from interventions.importers.sites import (
    Place,
    check_site,
    chosen_directions,
    sites_before_layers,
    vector_map,
)
from interventions.model import ModelDescription
from interventions.strict_json import JsonLimits, StrictJSONError, parse_json

_MAX_BYTES: Final = 128 << 20  # the vectors of 100 layers of width 32768 have about 70 MB
_JSON: Final = JsonLimits(containers=4096, strings=16_384, commas=4_000_000)
_KEYS: Final = ("model_type", "directions", "explained_variances")


def read_svec(
    path: Path, model: ModelDescription, layers: frozenset[int], place: Place
) -> ImportedMaps:
    """Read a steering vector as biases at the inputs of decoder layers.

    Args:
        path: the .svec file.
        model: to be edited.
        layers: to be steered.
        place: where the vectors are added.

    Raises:
        ImportFileError: the file cannot be read, is not of this format, or does not fit the model.
    """
    model_type, directions = _parse(path)
    sites = sites_before_layers(path, model, place)
    maps = {}
    for layer, vector in chosen_directions(path, directions, layers).items():
        if layer >= len(sites):
            raise ImportFileError(
                f"{path}: layer {layer} was chosen, but the model {model.id} has layers 0 to "
                f"{len(sites) - 1}."
            )
        site = sites[layer]
        if site is None:
            raise ImportFileError(
                f"{path}: no layer comes before layer 0, so its input has no feed-forward network. "
                "Leave layer 0 out, or choose the residual stream."
            )
        check_site(path, site, vector.numel(), model)
        maps[site] = vector_map(vector)
    return ImportedMaps(
        parameters=maps,
        method="caa",
        strength=VECTOR_STRENGTH,
        training={
            "file": path.name,
            "file_sha256": sha256_of(path),
            "model_type": model_type,
            "layers": ",".join(map(str, sorted(layers))),
            "place": place,
        },
    )


def _parse(path: Path) -> tuple[str, dict[int, Tensor]]:
    """Return the file's model type, and its directions by layer."""
    try:
        fields = parse_json(read_bytes(path, _MAX_BYTES).decode(), _JSON)
    except UnicodeDecodeError as error:
        raise ImportFileError(f"{path} is not JSON: it is not UTF-8.") from error
    except StrictJSONError as error:
        raise ImportFileError(f"{path} {error}.") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("directions"), dict):
        raise ImportFileError(f"{path} has no directions: it is not a steering vector.")
    if unknown := [key for key in fields if key not in _KEYS]:
        raise ImportFileError(f"{path} has an unknown field {unknown[0][:100]!r}.")
    directions: dict[int, Tensor] = {}
    for key, values in fields["directions"].items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 4 and int(key) not in directions):
            raise ImportFileError(f"{path}: {key[:100]!r} is not the number of a layer.")
        directions[int(key)] = _vector(path, key, values)
    return str(fields.get("model_type", ""))[:300], directions


def _vector(path: Path, layer: str, values: object) -> Tensor:
    numbers = values if isinstance(values, list) else []
    largest = torch.finfo(torch.float32).max
    # Python compares integers of any size with floats exactly.
    finite = all(type(v) in (int, float) and -largest <= v <= largest for v in numbers)
    if not numbers or not finite or any(math.isnan(v) for v in numbers):
        raise ImportFileError(f"{path}: direction {layer} is not a list of finite numbers.")
    return torch.tensor(numbers, dtype=torch.float64).float()
