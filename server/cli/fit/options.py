"""The options that several fit commands have."""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import typer

Model: TypeAlias = Annotated[
    str, typer.Option(help="Model to fit on: embedded, a Hugging Face id or a folder.")
]
Out: TypeAlias = Annotated[Path, typer.Option(help="The artifact to write, X.safetensors.")]
Name: TypeAlias = Annotated[
    str | None,
    typer.Option(help="The intervention's name; if unset, the file's name without its suffix."),
]
Description: TypeAlias = Annotated[str, typer.Option(help="Description for the manifest.")]
License: TypeAlias = Annotated[
    str, typer.Option("--license", help="The artifact's licence, as an SPDX identifier.")
]
Seed: TypeAlias = Annotated[
    int, typer.Option(min=0, help="Seed of random draws and initial values.")
]
MaxTokens: TypeAlias = Annotated[
    int, typer.Option(min=1, help="Tokens to which longer texts are cut.")
]
Dtype: TypeAlias = Annotated[
    str, typer.Option(help="Number format of the weights: auto, float32, bfloat16 or float16.")
]
Device: TypeAlias = Annotated[Literal["cpu", "cuda"], typer.Option(help="Device to fit on.")]
Threads: TypeAlias = Annotated[
    int | None, typer.Option(min=1, help="CPU threads; if unset, torch decides.")
]
AsJson: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]


def default_setting(limits: tuple[float, float], what: str) -> Any:
    """Make the option of a setting that the artifact has for requests that give none."""
    low, high = limits
    return typer.Option(min=low, max=high, help=f"Default {what}, for requests that give none.")
