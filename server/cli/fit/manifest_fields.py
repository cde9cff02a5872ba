"""The fields of a manifest that every fit command has: those that options give, and provenance."""

import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from interventions.manifest import (
    MOST_IN_DESCRIPTION,
    MOST_IN_LABEL,
    NAME_PATTERN,
    TrainingValue,
)
from server.cli.fit.output import FitCommandError
from server.engine.torch.model.loader import LoadedModel
from server.version import installed_version


def manifest_fields(out: Path, name: str | None, description: str, license_: str) -> dict[str, Any]:
    """Check the options before hours are spent on the fit; return the manifest's fields from them.

    `created` is the present time, or SOURCE_DATE_EPOCH if set, which makes the file reproducible.

    Raises:
        FitCommandError: the name or the suffix is not valid, the folder does not exist, the
            licence is empty, or a text is too long or not UTF-8.
    """
    name = out.stem if name is None else name
    if not NAME_PATTERN.fullmatch(name):
        raise FitCommandError(
            f"{name!r} is not a name for an intervention (a-z, 0-9, '.', '_' and '-', at most 64, "
            "the first a letter or a digit): give one with --name"
        )
    if out.suffix != ".safetensors":
        raise FitCommandError(f"--out must end in .safetensors: {out}")
    if not out.parent.is_dir():
        raise FitCommandError(f"the folder of --out does not exist: {out.parent}")
    if not license_.strip():
        raise FitCommandError("--license must name a licence")
    _check_length("--license", license_, MOST_IN_LABEL)
    _check_length("--description", description, MOST_IN_DESCRIPTION)
    for option, text in {
        "--out": str(out),
        "--license": license_,
        "--description": description,
    }.items():
        _check_utf8(option, text)
    return {
        "format": "steerserve/1",
        "name": name,
        "description": description,
        "created": _now(),
        "license": license_,
    }


def provenance(loaded: LoadedModel) -> dict[str, TrainingValue]:
    """Return the device and the versions that made the artifact, for the manifest.

    The command line is left out: it names folders of this machine, and everybody who may list
    interventions can read the manifest.
    """
    return {
        "device": loaded.model.device.type,
        "model_dtype": str(loaded.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "steerserve": installed_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _check_length(option: str, text: str, most: int) -> None:
    if len(text) > most:
        raise FitCommandError(f"{option} has {len(text)} characters: give at most {most}")


def _check_utf8(option: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FitCommandError(f"{option} is not UTF-8: {text!r}") from error


def _now() -> datetime:
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    if epoch is None:
        return datetime.now(UTC).replace(microsecond=0)
    try:
        return datetime.fromtimestamp(int(epoch), UTC)
    except (ValueError, OverflowError) as error:
        raise FitCommandError(f"SOURCE_DATE_EPOCH is not a Unix time: {epoch!r}") from error
