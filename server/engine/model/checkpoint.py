"""Reads a model's weights from its safetensors files, one at a time."""

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file


class NoSafetensorsError(Exception):
    """A model has no safetensors files."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The open safetensors files of a model. They are mapped, so memory holds no whole weight."""

    _files: Mapping[str, Any]  # a weight's name -> the open file that has it

    @property
    def names(self) -> Collection[str]:
        """The names of all weights."""
        return self._files.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a weight's shape, without reading the weight."""
        return tuple(self._files[name].get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """Return a weight in the dtype in which it is stored."""
        weight: Tensor = self._files[name].get_tensor(name)
        return weight


@contextmanager
def open_checkpoint(location: str) -> Iterator[Checkpoint]:
    """Open a model's safetensors files; a model of the Hugging Face hub is downloaded first.

    Args:
        location: a folder or a Hugging Face id.

    Raises:
        NoSafetensorsError: the model has none.
        OSError, ValueError, SafetensorError: a file is missing or broken.
    """
    with ExitStack() as stack:
        files: dict[str, Any] = {}
        for path in _paths(location):
            file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            files |= dict.fromkeys(file.keys(), file)
        yield Checkpoint(MappingProxyType(files))


def _paths(location: str) -> list[Path]:
    """Return the paths of the files: one file, or those that an index names."""
    if (whole := _find(location, SAFE_WEIGHTS_NAME)) is not None:
        return [whole]
    if (index := _find(location, SAFE_WEIGHTS_INDEX_NAME)) is None:
        raise NoSafetensorsError(f"{location!r} has no safetensors files")
    match json.loads(index.read_text(encoding="utf-8")):
        case {"weight_map": dict(places)} if all(isinstance(each, str) for each in places.values()):
            return [_shard(location, name) for name in sorted(set(places.values()))]
    raise ValueError(f"{index.name} has no weight_map")


def _find(location: str, name: str) -> Path | None:
    found: str | None = None
    with suppress(OSError):  # raised for a model that the hub does not have or show
        found = cached_file(location, name, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def _shard(location: str, name: str) -> Path:
    """Return the path of a file that the index names."""
    found = cached_file(location, name)
    assert found is not None  # it raises an OSError instead
    return Path(found)
