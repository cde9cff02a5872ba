"""The commands below `steerserve fit`."""

import typer

from server.cli.fit.argre import argre
from server.cli.fit.baselines import caa, lin_act, mean_act
from server.cli.fit.gate import gate
from server.cli.fit.iti import iti
from server.cli.fit.lineas import lineas

app = typer.Typer(no_args_is_help=True, help="Fit an intervention to a model.")
app.command()(lineas)
app.command()(argre)
app.command()(lin_act)
app.command()(mean_act)
app.command()(caa)
app.command()(iti)
app.command()(gate)
