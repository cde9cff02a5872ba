"""The `steerserve` command."""

import typer

from server.cli import import_files, registry_client
from server.cli.bench.command import bench
from server.cli.evaluate import evaluate
from server.cli.fit import commands as fit
from server.cli.serve import serve

app = typer.Typer(
    name="steerserve",
    help="Serve a language model with stored interventions, chosen per request.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command()(serve)
app.add_typer(fit.app, name="fit")
app.add_typer(import_files.app, name="import")
app.add_typer(registry_client.app)  # push, list, show, delete
app.command()(evaluate)
app.command()(bench)


def main() -> None:
    """Run the command line; the console script's entry point."""
    app()


if __name__ == "__main__":
    main()
