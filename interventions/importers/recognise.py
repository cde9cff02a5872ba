"""Tells by a file's content which import command takes it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from interventions.importers import argre, gguf_files, sae
from interventions.importers.control_vector import ARCHITECTURE
from interventions.importers.imported import ImportFileError
from interventions.importers.statedicts import SUFFIX, statedict_files
from interventions.importers.torch_files import read_torch_file

_BEGINNING: Final = 1 << 16
_TRANSPORT: Final = "ml-act (of LinEAS: ml-lineas)"


def import_command(path: Path) -> str | None:
    """Return the import command, with its path, for a file or folder of another project.

    Returns:
        None for an artifact, an unknown file, and one that cannot be read.
    """
    try:
        if path.is_dir():
            return _command_for_folder(path)
        if not path.is_file():
            return None
        with path.open("rb") as file:
            beginning = file.read(_BEGINNING)
        return _command_for_file(path, beginning)
    except (ImportFileError, OSError):
        return None


def _command_for_folder(folder: Path) -> str | None:
    if statedict_files(folder):
        return f"{_TRANSPORT} {folder}"
    if (folder / argre.HEAD_FILE).is_file() or (folder / argre.STATES_FILE).is_file():
        return f"argre {folder}"
    if any((folder / name).is_file() for name in sae.WEIGHT_FILES):
        return f"sae {folder}"
    return None


def _command_for_file(path: Path, beginning: bytes) -> str | None:
    if beginning.startswith(gguf_files.MAGIC):
        gguf_files.read_gguf(path, ARCHITECTURE)
        return f"control-vector {path}"
    if beginning.startswith(b"PK\x03\x04"):
        return _command_for_archive(path)
    if beginning.lstrip().startswith(b"{"):
        return f"svec {path}" if b'"directions"' in beginning else None
    return f"sae {path}" if sae.decoder_name(path) else None


def _command_for_archive(path: Path) -> str | None:
    if sae.decoder_name(path):
        return f"sae {path}"
    value = read_torch_file(path)
    if not isinstance(value, Mapping):
        names = (argre.DIRECTION_FILE, argre.STATES_FILE, argre.MASK_FILE)
        return f"argre {path.parent}" if path.name in names else None
    if {"net.w1", "net.b1"} <= value.keys() or {"mu1", "std1"} <= value.keys():
        hint = path.parent if path.name.endswith(SUFFIX) else "FOLDER"
        return f"{_TRANSPORT} {hint}"
    if {"0.weight", "2.weight"} <= value.keys():
        return f"argre {path}"
    return None
