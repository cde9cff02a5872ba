"""The default strength of an affine intervention and its limits: their options and their check."""

from typing import Annotated, Any, Final, TypeAlias

import typer

from interventions.request_settings import Caps
from server.cli.fit import output
from server.cli.fit.options import default_setting, finite

SERVABLE: Final = Caps().strength
"""The strengths that a server takes, whatever the manifest says."""


def greatest_strength(limits: str) -> Any:
    """Make the option --max-strength X; `limits` says what requests may ask for, with X."""
    return typer.Option(
        min=0,
        max=SERVABLE[1],
        metavar="X",
        help=f"Requests may ask for strengths from {limits}.",
        callback=finite,
    )


Strength: TypeAlias = Annotated[float, default_setting((0.0, SERVABLE[1]), "strength")]
MaxStrength: TypeAlias = Annotated[float, greatest_strength("0 to X")]
SignedStrength: TypeAlias = Annotated[float, default_setting(SERVABLE, "strength")]
SignedMaxStrength: TypeAlias = Annotated[float, greatest_strength("-X to X")]
KeptStrength: TypeAlias = Annotated[
    float | None,
    typer.Option(
        min=SERVABLE[0],
        max=SERVABLE[1],
        help="Default strength, for requests that give none; if unset, the artifact's.",
        callback=finite,
    ),
]
KeptMaxStrength: TypeAlias = Annotated[
    float | None,
    greatest_strength(
        "0 to X, or from -X to X if the artifact takes negative ones; if unset, the artifact's"
    ),
]


def limits(strength: float, max_strength: float, *, negative: bool = False) -> tuple[float, float]:
    """Return the least and the greatest strength that a request may ask for.

    Args:
        strength: the default, for requests that give none.
        max_strength: the greatest.
        negative: True if requests may ask for as much in the other direction.

    Raises:
        FitCommandError: the default lies outside of the limits.
    """
    chosen = (-max_strength if negative else 0.0, max_strength)
    check_default(strength, chosen)
    return chosen


def check_default(strength: float, within: tuple[float, float]) -> None:
    """Refuse a default strength that requests may not ask for.

    Raises:
        FitCommandError: it lies outside of the limits.
    """
    low, high = within
    if not low <= strength <= high:
        raise output.FitCommandError(
            f"the default strength {strength:g} lies outside of [{low:g}, {high:g}]: "
            "give another --strength, or a greater --max-strength"
        )
