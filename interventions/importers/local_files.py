"""Opens the files to import: regular ones of a bounded size, with their sha256."""

import hashlib
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from interventions.artifact import artifact_digest
from interventions.importers.imported import ImportFileError

_MAX_FILE_BYTES: Final = 1 << 36  # 64 GiB: ARGRE's hidden states of 2000 long pairs fit


def check_file(path: Path, max_bytes: int = _MAX_FILE_BYTES) -> int:
    """Return the size of a file in bytes.

    Raises:
        ImportFileError: there is no such file, it is not a regular file, or it is too large.
    """
    try:
        state = path.stat()
    except OSError as error:
        raise ImportFileError(f"{path}: {error.strerror}.") from error
    # Checked before opening, because opening a pipe would wait for a writer.
    if not stat.S_ISREG(state.st_mode):
        raise ImportFileError(f"{path} is not a file.")
    if state.st_size > max_bytes:
        raise ImportFileError(f"{path} has {state.st_size} bytes; the limit is {max_bytes}.")
    return state.st_size


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Return the content of a file of at most `max_bytes`.

    Raises:
        ImportFileError: the file cannot be read or is too large.
    """
    size = check_file(path, max_bytes)
    try:
        with path.open("rb") as file:
            return file.read(size)  # if it has grown since, its new end is left out
    except OSError as error:
        raise ImportFileError(f"{path}: {error.strerror}.") from error


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, hexadecimal.

    Raises:
        ImportFileError: the file cannot be read.
    """
    try:
        return artifact_digest(path)
    except OSError as error:
        raise ImportFileError(f"{path}: {error.strerror}.") from error


def sha256_of_all(paths: Iterable[Path]) -> str:
    """Return one sha256 for the names and contents of several files, in the order of the names.

    Raises:
        ImportFileError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        digest.update(f"{path.name} {sha256_of(path)}\n".encode())
    return digest.hexdigest()
