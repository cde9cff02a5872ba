"""The progress bar of commands that take long."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def progress(*further: TextColumn) -> Progress:
    """Return a progress bar on stderr, with further columns at its end."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        *further,
        console=Console(stderr=True),
    )
