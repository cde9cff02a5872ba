"""Reads one feature of a sparse autoencoder: its row of the decoder, as a vector to add.

* SAELens (github.com/jbloomAus/SAELens): a folder with `sae_weights.safetensors`, which has `W_dec`
  of shape (features, d), and `cfg.json`, which has the TransformerLens name of the place, such as
  `blocks.12.hook_resid_post` (`hook_name`; in older files `hook_point`, in newer ones inside of
  `metadata`).
* EleutherAI's sparsify: `sae.safetensors` with `W_dec`; its `cfg.json` names no place.
* Gemma Scope: `params.npz` with `W_dec`, and no configuration.
* Llama Scope: safetensors with `decoder.weight` of shape (d, features).

Only the two places of the residual stream are translated, because TransformerLens gives the outputs
of attention and of the feed-forward network other meanings than transformers in some families.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from interventions.importers.imported import VECTOR_STRENGTH, ImportedMaps, ImportFileError
from interventions.importers.local_files import check_file, read_bytes, sha256_of
from interventions.importers.npy_arrays import npz_names, read_row
from interventions.importers.sites import check_site, decoder_layers, vector_map
from interventions.importers.torch_files import float_tensor
from interventions.model import ModelDescription
from interventions.strict_json import StrictJSONError, parse_json
from steering.sites import input_site

WEIGHT_FILES: Final = ("sae_weights.safetensors", "sae.safetensors", "params.npz")
CONFIG_FILE: Final = "cfg.json"
ROWS: Final = ("W_dec", "w_dec")  # (features, d)
COLUMNS: Final = "decoder.weight"  # (d, features)

_MAX_CONFIG_BYTES: Final = 1 << 20
_PLACE: Final = re.compile(r"blocks\.(\d{1,4})\.hook_resid_(pre|post)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Feature:
    """The chosen feature, and where and how strongly it is added."""

    number: int
    site: str | None = None  # None: to be read from the configuration
    scale: float = 1.0


def read_sae(path: Path, model: ModelDescription, feature: Feature) -> ImportedMaps:
    """Read a feature as a bias at one site.

    Args:
        path: the weights, or a folder with one of WEIGHT_FILES.
        model: to be edited.
        feature: the chosen one.

    Raises:
        ImportFileError: the weights or the configuration cannot be read, there is no such feature,
            it is zero, or it does not fit the model.
    """
    weights = _weights_in(path) if path.is_dir() else path
    check_file(weights)
    row = _npz_row(weights, feature.number) if _is_npz(weights) else _row(weights, feature.number)
    vector = float_tensor(weights, f"feature {feature.number}", row, (None,)) * feature.scale
    if not torch.isfinite(vector).all():
        raise ImportFileError(f"{weights}: feature {feature.number} is not finite at this scale.")
    if not vector.any():
        raise ImportFileError(f"{weights}: feature {feature.number} is zero at this scale.")
    site = feature.site
    if site is None:
        site = _configured_site(weights.parent / CONFIG_FILE, model)
    check_site(weights, site, vector.numel(), model)
    return ImportedMaps(
        parameters={site: vector_map(vector)},
        method="sae",
        strength=VECTOR_STRENGTH,
        training={
            "file": weights.name,
            "file_sha256": sha256_of(weights),
            "feature": feature.number,
            "scale": feature.scale,
        },
    )


def decoder_name(path: Path) -> str | None:
    """Return the name of the decoder's tensor in a safetensors or .npz file, None if it has none.

    Raises:
        ImportFileError: the file is neither, or is damaged.
    """
    if _is_npz(path):
        names = npz_names(path)
    else:
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                names = list(file.keys())
        except (OSError, SafetensorError) as error:
            raise ImportFileError(f"{path} is no safetensors file: {error}.") from error
    return next((name for name in (*ROWS, COLUMNS) if name in names), None)


def _weights_in(folder: Path) -> Path:
    found = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
    if len(found) != 1:
        raise ImportFileError(
            f"{folder} has {len(found)} of the files {', '.join(WEIGHT_FILES)}; name the file that "
            "is to be read."
        )
    return found[0]


def _is_npz(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"PK\x03\x04"
    except OSError as error:
        raise ImportFileError(f"{path}: {error.strerror}.") from error


def _decoder(path: Path) -> str:
    name = decoder_name(path)
    if name is None:
        raise ImportFileError(f"{path} has no decoder: neither W_dec nor {COLUMNS}.")
    return name


def _npz_row(path: Path, number: int) -> Tensor:
    name = _decoder(path)
    if name == COLUMNS:
        raise ImportFileError(f"{path} has no decoder W_dec.")
    return read_row(path, name, number)


def _row(path: Path, number: int) -> Tensor:
    name = _decoder(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            matrix = file.get_slice(name)
            shape = matrix.get_shape()
            features = shape[1 if name == COLUMNS else 0] if len(shape) == 2 else 0
            if not 0 <= number < features:
                raise ImportFileError(
                    f"{path} has no feature {number}: its {name} has shape {tuple(shape)}."
                )
            part = (
                matrix[:, number : number + 1] if name == COLUMNS else matrix[number : number + 1]
            )
    except (OSError, SafetensorError) as error:
        raise ImportFileError(f"{path} cannot be read: {error}.") from error
    row: Tensor = part.reshape(-1)
    return row.contiguous()


def _configured_site(path: Path, model: ModelDescription) -> str:
    """Return the site that the configuration beside the weights names."""
    if not path.is_file():
        raise ImportFileError(
            f"{path} does not exist, so say by --site where the feature is added."
        )
    try:
        fields = parse_json(read_bytes(path, _MAX_CONFIG_BYTES).decode())
    except (UnicodeDecodeError, StrictJSONError) as error:
        raise ImportFileError(f"{path} is no JSON of a configuration: {error}.") from error
    if not isinstance(fields, dict):
        raise ImportFileError(f"{path} is no JSON object.")
    metadata = fields.get("metadata")
    tables = [fields, metadata if isinstance(metadata, dict) else {}]
    names = [table[key] for table in tables for key in ("hook_name", "hook_point") if key in table]
    match = _PLACE.fullmatch(str(names[0])) if names else None
    if match is None:
        found = f"names {str(names[0])[:100]!r}" if names else "names no place"
        raise ImportFileError(
            f"{path} {found}; hook_resid_pre and hook_resid_post are translated. Say by --site "
            "where the feature is added."
        )
    layers = decoder_layers(path, model)
    if int(match[1]) >= len(layers):
        raise ImportFileError(
            f"{path} names layer {match[1]}, but the model {model.id} has {len(layers)} layers."
        )
    layer = layers[int(match[1])]
    return layer if match[2] == "post" else input_site(layer)
