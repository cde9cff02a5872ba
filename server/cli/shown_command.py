"""Shows the command line in reports."""

from collections.abc import Sequence


def shown_command(words: Sequence[str]) -> str:
    """Return the command line of `steerserve` with the API key replaced by dots."""
    shown: list[str] = []
    for word in words:
        if shown and shown[-1] == "--api-key":
            shown.append("...")
        else:
            shown.append("--api-key=..." if word.startswith("--api-key=") else word)
    return " ".join(["steerserve", *shown])
