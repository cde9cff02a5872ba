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

An option takes precedence over its variable, and the variable over the default. An empty variable
counts as not set. The variable of a switch takes `on` or `off`. `--served-model-name` takes several
names, separated by blanks; `--allowed-host` and `--cors-origin` are repeated for several values. In
a variable, blanks or commas separate the values. Give keys in files or variables, because everybody
who can list the machine's processes sees its options. The server does not start if a key is given
both directly and in a file. [security.md](security.md) says which options an operator should set.

Names of variables are in capitals. The server does not start if a variable begins with
`STEERSERVE_` and is not on this page; the error names the most similar variable. Variables that
Kubernetes sets for a service named steerserve, such as `STEERSERVE_SERVICE_HOST` or
`STEERSERVE_PORT=tcp://…`, are ignored.

| option | variable | value | default | what it does |
|---|---|---|---|---|
"""
_OTHERS: Final = """
## Other variables

Their table is in [server/variables.py](../server/variables.py).

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
