"""Tells by a file's content which import command takes it."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from interventions.importers import argre, gguf_files, sae
from interventions.importers.control_vector import ARCHITECTURE
from interventions.importers.imported import ImportFileError
from interventions.importers.statedicts import SUFFIX, statedict_files
from interventions.importers.torch_files import read_torch_file

_BEGINNING: Final = 1 << 16


def import_command(path: Path) -> str | None:
    """Return the import command for a file or folder of another project.

    Returns:
        The command with its path, quoted for a shell, and its required options but the model and
        the artifact. Hooks of LinEAS and of Lin-AcT look alike: for both it is ml-lineas. None for
        an artifact, an unknown file, and one that cannot be read.
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
    if files := statedict_files(folder):
        return _with_path(_transport(read_torch_file(files[0])), folder)
    if (folder / argre.HEAD_FILE).is_file() or (folder / argre.STATES_FILE).is_file():
        return _with_path("argre", folder)
    if any((folder / name).is_file() for name in sae.WEIGHT_FILES):
        return _with_path("sae", folder)
    return None


def _command_for_file(path: Path, beginning: bytes) -> str | None:
    if beginning.startswith(gguf_files.MAGIC):
        gguf_files.read_gguf(path, ARCHITECTURE)
        return _with_path("control-vector", path)
    if beginning.startswith(b"PK\x03\x04"):
        return _command_for_archive(path)
    if beginning.lstrip().startswith(b"{"):
        return _with_path("svec", path) if b'"directions"' in beginning else None
    return _with_path("sae", path) if sae.decoder_name(path) else None


def _command_for_archive(path: Path) -> str | None:
    if sae.decoder_name(path):
        return _with_path("sae", path)
    value = read_torch_file(path)
    if not isinstance(value, Mapping):
        names = (argre.DIRECTION_FILE, argre.STATES_FILE, argre.MASK_FILE)
        return _with_path("argre", path.parent) if path.name in names else None
    if command := _transport(value):
        return _with_path(command, path.parent if path.name.endswith(SUFFIX) else Path("FOLDER"))
    if {"0.weight", "2.weight"} <= value.keys():
        return _with_path("argre", path)
    return None


def _transport(value: object) -> str | None:
    """Return the command for the value of a hook's file, or None if it is none."""
    names = value.keys() if isinstance(value, Mapping) else set()
    if {"net.w1", "net.b1"} <= names:
        return "ml-lineas"
    return "ml-act" if {"mu1", "std1"} <= names else None


def _with_path(command: str | None, path: Path) -> str | None:
    if command is None:
        return None
    return f"{command} {shlex.quote(str(path))}{' --feature N' if command == 'sae' else ''}"
