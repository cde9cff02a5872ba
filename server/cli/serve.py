"""`steerserve serve` loads the model, opens the registry and answers requests."""

from typing import Annotated, Any

import typer
from pydantic import ValidationError
from pydantic_settings import SettingsError
from rich.console import Console

from server.cli.launch import announce_failure, launch
from server.cli.setting_options import with_setting_options
from server.config import Settings


@with_setting_options
def serve(
    more_names: Annotated[
        list[str] | None,
        typer.Argument(help="More names of the model, after the one of --served-model-name."),
    ] = None,
    **options: Any,
) -> None:
    """Serve a model with the registry's interventions.

    Each option has an environment variable too, such as STEERSERVE_PORT for --port. The server does
    not start if an unknown variable begins with STEERSERVE_.
    """
    console = Console(stderr=True, highlight=False)
    if more_names and not options["served_model_names"]:
        raise typer.BadParameter(f"unexpected argument {more_names[0]!r}")
    names = (*(options.pop("served_model_names") or ()), *(more_names or ()))
    given = {name: value for name, value in options.items() if value is not None}
    if names:
        given["served_model_names"] = names
    try:
        settings = Settings.model_validate(given)
    except (ValidationError, SettingsError) as error:
        announce_failure(error, console)
        raise typer.Exit(1) from error
    if not launch(settings, console):
        raise typer.Exit(1)
