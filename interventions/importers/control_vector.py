"""Reads control vectors of repeng and llama.cpp: a GGUF file with a tensor direction.N for layer N.

Both projects number decoder layers from 0, and add direction.N to the residual stream after layer
N, so that N is the index in `model.layers`:

* repeng (github.com/vgel/repeng): `control.py` wraps the layer with that index and adds the vector
  to its output; `extract.py` takes it from `hidden_states[N + 1]`, the same layer's output.
* llama.cpp: `common_control_vector_load_one` in common/common.cpp puts direction.N at offset
  `n_embd * (N - 1)` of a buffer that begins with layer 1; `llama_adapter_cvec::apply` in
  src/llama-adapter.cpp reads layer `il` at `n_embd * (il - 1)`, from il = 1 on. The two
  subtractions cancel out. Layer 0 has no place in the buffer, so llama.cpp refuses direction.0;
  repeng does not.

llama.cpp's own cvector-generator names the difference of the outputs of layer N - 1 direction.N;
what matters for serving is where a file's vectors are added.
"""

import re
from pathlib import Path
from typing import Final

from torch import Tensor

from interventions.importers.gguf_files import read_gguf
from interventions.importers.imported import VECTOR_STRENGTH, ImportedMaps, ImportFileError
from interventions.importers.local_files import sha256_of
from interventions.importers.sites import (
    Place,
    check_site,
    chosen_directions,
    sites_after_layers,
    vector_map,
)
from interventions.importers.torch_files import float_tensor
from interventions.model import ModelDescription

ARCHITECTURE: Final = "controlvector"

_DIRECTION: Final = re.compile(r"direction\.(\d{1,4})", re.ASCII)


def read_control_vector(
    path: Path, model: ModelDescription, layers: frozenset[int] | None, place: Place
) -> ImportedMaps:
    """Read a control vector as biases at the outputs of decoder layers.

    Args:
        path: the GGUF file.
        model: to be edited.
        layers: to be steered; None for all that the file has.
        place: where the vectors are added.

    Raises:
        ImportFileError: the file cannot be read, is no control vector, or does not fit the model.
    """
    file = read_gguf(path, ARCHITECTURE)
    directions: dict[int, Tensor] = {}
    for name, tensor in file.tensors.items():
        match = _DIRECTION.fullmatch(name)
        if match is None or int(match[1]) in directions:
            raise ImportFileError(f"{path}: the tensor {name[:100]!r} is no direction.<layer>.")
        directions[int(match[1])] = float_tensor(path, name, tensor, (None,))
    sites = sites_after_layers(path, model, place)
    maps = {}
    for layer, vector in chosen_directions(path, directions, layers).items():
        if layer >= len(sites):
            raise ImportFileError(
                f"{path} has a direction for layer {layer}, but the model {model.id} has layers 0 "
                f"to {len(sites) - 1}: the file is of another model, or choose other layers."
            )
        check_site(path, sites[layer], vector.numel(), model)
        maps[sites[layer]] = vector_map(vector)
    return ImportedMaps(
        parameters=maps,
        method="caa",
        strength=VECTOR_STRENGTH,
        training={
            "file": path.name,
            "file_sha256": sha256_of(path),
            "model_hint": str(file.metadata.get("controlvector.model_hint", ""))[:300],
            "place": place,
        },
    )
