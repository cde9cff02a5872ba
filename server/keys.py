"""Reads keys from files, which the list of processes does not show."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

FILE_SUFFIX: Final = "_file"
MAX_KEY_BYTES: Final = 4096  # more than a header should hold; a device file has no end


def with_keys_read(given: Mapping[str, object]) -> dict[str, object]:
    """Return an operator's settings with the keys that are given in files.

    Args:
        given: settings by name; the file of the key `x_key` is `x_key_file`, a path.

    Raises:
        ValueError: a key is given directly too, or its file holds no key or cannot be read.
    """
    read = dict(given)
    for file_name in [name for name in given if name.endswith(f"_key{FILE_SUFFIX}")]:
        path = given[file_name]
        if not isinstance(path, str | Path):
            continue  # absent, or of a type that pydantic refuses
        name = file_name.removesuffix(FILE_SUFFIX)
        if read.get(name) is not None:
            raise ValueError(f"{name} and {file_name} are both given: give the key once")
        read[name] = _read_key(Path(path), file_name)
    return read


def _read_key(path: Path, setting: str) -> str:
    try:
        with path.expanduser().open("rb") as file:
            data = file.read(MAX_KEY_BYTES + 1)
    except (OSError, RuntimeError) as error:  # the latter for an unknown ~user
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"the file of {setting}, {path}, cannot be read: {reason}") from None
    key = data.decode("latin-1").strip()
    if not key:
        raise ValueError(f"the file of {setting}, {path}, is empty: it must hold the key")
    if len(data) > MAX_KEY_BYTES or not is_key(key):
        raise ValueError(
            f"the file of {setting}, {path}, does not hold one key: that is one or more printable "
            "ASCII characters without blanks"
        )
    return key


def is_key(text: str) -> bool:
    """Tell whether a request's header can carry the text as a key."""
    return bool(text) and all("!" <= character <= "~" for character in text)
