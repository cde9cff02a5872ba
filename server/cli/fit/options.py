"""The options that several fit commands have."""

import math
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias

import typer

from steering.fit.pooling import Pooling as PoolingName

_MOST_IN_PATTERN: Final = 32 << 10  # bytes; half of a manifest

Model: TypeAlias = Annotated[
    str, typer.Option(help="Model to fit on: embedded, a Hugging Face id or a folder.")
]
Out: TypeAlias = Annotated[Path, typer.Option(help="The artifact to write, X.safetensors.")]
Source: TypeAlias = Annotated[
    Path, typer.Option(help="File of sentences to steer away from, one per line.")
]
Target: TypeAlias = Annotated[
    Path, typer.Option(help="File of sentences to steer towards, one per line.")
]
AllOrSamples: TypeAlias = Annotated[
    int | None, typer.Option(min=1, help="Sentences drawn from each file; if unset, all.")
]
ForwardBatch: TypeAlias = Annotated[
    int, typer.Option(min=1, help="Sentences in one forward pass, which bound the memory.")
]
Pooling: TypeAlias = Annotated[
    PoolingName, typer.Option(help="How a sentence's tokens become one vector.")
]
Name: TypeAlias = Annotated[
    str | None,
    typer.Option(help="The intervention's name; if unset, the file's name without its suffix."),
]
Description: TypeAlias = Annotated[str, typer.Option(help="Description for the manifest.")]
License: TypeAlias = Annotated[
    str, typer.Option("--license", help="The artifact's licence, as an SPDX identifier.")
]
Seed: TypeAlias = Annotated[
    int, typer.Option(min=0, max=2**64 - 1, help="Seed of random draws and initial values.")
]
MaxTokens: TypeAlias = Annotated[
    int, typer.Option(min=1, help="Tokens to which longer texts are cut.")
]
Dtype: TypeAlias = Annotated[
    str, typer.Option(help="Number format of the weights: auto, float32, bfloat16 or float16.")
]
Device: TypeAlias = Annotated[Literal["cpu", "cuda"], typer.Option(help="Device to fit on.")]
Threads: TypeAlias = Annotated[
    int | None, typer.Option(min=1, max=1024, help="CPU threads; if unset, torch decides.")
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]


def chosen_sites(otherwise: str) -> Any:
    """Make the option --sites; `otherwise` says which sites are taken if it is unset."""
    return typer.Option(
        metavar="REGEX",
        callback=_recordable,
        help="Regular expression for module paths, to map the modules' outputs; it chooses inputs "
        f"where it matches '<module path>.input' and not the path. If unset, {otherwise}.",
    )


def default_setting(limits: tuple[float, float], what: str) -> Any:
    """Make the option of a setting that the artifact has for requests that give none.

    Args:
        limits: the least and greatest value.
        what: the setting, in words.
    """
    low, high = limits
    text = f"Default {what}, for requests that give none."
    return typer.Option(min=low, max=high, help=text, callback=finite)


def _recordable(pattern: str | None) -> str | None:
    """Refuse a pattern that the manifest, which is limited in size, could not record.

    Raises:
        BadParameter: the pattern is too long or not UTF-8.
    """
    try:
        size = len((pattern or "").encode())
    except UnicodeEncodeError as error:
        raise typer.BadParameter(f"{pattern!r} is not UTF-8.") from error
    if size > _MOST_IN_PATTERN:
        raise typer.BadParameter(f"it has {size} bytes, the most are {_MOST_IN_PATTERN}.")
    return pattern


def finite(value: float | None) -> float | None:
    """Refuse NaN, which a range may let pass since it compares with nothing.

    Raises:
        BadParameter: the value is not finite.
    """
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value
