"""The options of gates, which `steerserve fit lineas` and `fit gate` have."""

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer

from server.cli.fit.options import finite
from steering.fit.pooling import Pooling

GateKind: TypeAlias = Literal["none", "regression", "end-to-end"]

GateChoice: TypeAlias = Annotated[
    GateKind,
    typer.Option(
        help="Gates on the maps (DSAS), which leave text like that of --control as it is: fitted "
        "by a regression beside the maps, or learnt together with them."
    ),
]
Control: TypeAlias = Annotated[
    Path, typer.Option(help="File of neutral sentences that must stay as they are, one per line.")
]
OptionalControl: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        help="With --gate: file of neutral sentences that must stay as they are, one per line."
    ),
]
ControlWeight: TypeAlias = Annotated[
    float,
    typer.Option(help="With --gate end-to-end: weight of the control's part of the loss."),
]
GateComponents: TypeAlias = Annotated[
    int, typer.Option(min=1, help="Principal components of activations that a gate is fitted on.")
]
GateL2: TypeAlias = Annotated[
    float, typer.Option("--gate-l2", help="Penalty on the squared weights of a gate's regression.")
]
GateHeldOut: TypeAlias = Annotated[
    float,
    typer.Option(help="Share of the sentences that only measure how often a gate is right."),
]
GatePooling: TypeAlias = Annotated[
    Pooling,
    typer.Option(help="How a sentence's tokens become the vector that a gate is fitted on."),
]
GateMinAccuracy: TypeAlias = Annotated[
    float,
    typer.Option(
        min=0,
        max=1,
        callback=finite,
        help="Leave out the map of a site whose gate is right less often on held-out sentences.",
    ),
]
