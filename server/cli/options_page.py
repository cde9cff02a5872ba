"""Writes docs/options.md: `python -m server.cli.options_page > docs/options.md`."""

import sys
from collections.abc import Iterable
from typing import Final

from server.cli.setting_options import SettingOption, setting_options
from server.variables import OTHER_VARIABLES

_SIGNS: Final = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
_HEAD: Final = """\
# Options of `steerserve serve`

Written by `python -m server.cli.options_page > docs/options.md` from the fields of `Settings` in
[server/config.py](../server/config.py): change them there. A test holds this page to them.

An option comes before its variable, and that before the default. An empty variable is not set.
The variable of a switch takes `on` or `off`. Several names follow one `--served-model-name`,
separated by blanks; several hosts or origins have an option each; in a variable blanks or commas
separate them. Keys are best given by file or as variables: options are seen by whoever lists the
machine's processes. A key that is given twice, directly and by file, ends the start.
[security.md](security.md) says which of them an operator should set.

Names of variables are in capitals. A variable that begins with `STEERSERVE_` and is not on this
page ends the start, with the name that is nearest. What Kubernetes sets for a service called
steerserve, such as `STEERSERVE_SERVICE_HOST` or `STEERSERVE_PORT=tcp://…`, is ignored.

| option | variable | value | default | what it does |
|---|---|---|---|---|
"""
_OTHERS: Final = """
## Variables that are no settings

From the table in [server/variables.py](../server/variables.py).

| variable | what it is for |
|---|---|
"""


def options_page() -> str:
    """Return the page, with a row for each setting and for each other variable."""
    settings = (" | ".join(_cells(option)) for option in setting_options())
    others = (f"{_code(variable.name)} | {variable.description}" for variable in OTHER_VARIABLES)
    return _HEAD + _rows(settings) + _OTHERS + _rows(others)


def _rows(rows: Iterable[str]) -> str:
    return "".join(f"| {row} |\n" for row in rows)


def _cells(option: SettingOption) -> tuple[str, ...]:
    return (
        ", ".join(map(_code, option.flags)),
        _code(option.variable),
        _value(option),
        _code(option.default) if option.default else "",
        option.description,
    )


def _value(option: SettingOption) -> str:
    if option.choices:
        return ", ".join(map(_code, option.choices))
    limits = [f"{_SIGNS[name]} {limit:g}" for name, limit in option.limits.items()]
    return ", ".join((option.kind, *limits))


def _code(word: str) -> str:
    return f"`{word}`"


if __name__ == "__main__":
    sys.stdout.write(options_page())
