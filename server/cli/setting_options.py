"""The options of `steerserve serve`, made from the fields of `Settings`."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Final, Literal, TypeVar, get_args, get_origin

import typer
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from server.config import Settings
from server.environment import option_name, takes_several, variable_name

# The names of types in the help; a value of any other type is given as JSON.
_WORDS: Final = {int: "integer", float: "number", str: "text", Path: "path", SecretStr: "key"}
_LIMITS: Final = ("ge", "gt", "le", "lt")

Command = TypeVar("Command", bound=Callable[..., None])


@dataclass(frozen=True, slots=True)
class SettingOption:
    """A setting's option, variable and description, for the command line and the docs."""

    name: str  # the field's name
    field: FieldInfo

    @property
    def type(self) -> Any:
        """The type of a given value; None is left out of an optional type."""
        annotation = self.field.annotation
        given = [part for part in get_args(annotation) if part is not NoneType]
        # A union of several types, such as JSON's, stays as it is.
        return given[0] if NoneType in get_args(annotation) and len(given) == 1 else annotation

    @property
    def flags(self) -> tuple[str, ...]:
        """The option; a switch has one option that turns it on and one that turns it off."""
        word = option_name(self.name, self.field)
        return (f"--{word}", f"--no-{word}") if self.type is bool else (f"--{word}",)

    @property
    def variable(self) -> str:
        """The environment variable that is read if the option is not given."""
        return variable_name(self.name, self.field)

    @property
    def choices(self) -> tuple[str, ...]:
        """The only words that the setting takes; empty if it takes other values."""
        if self.type is bool:
            return ("on", "off")
        return get_args(self.type) if get_origin(self.type) is Literal else ()

    @property
    def kind(self) -> str:
        """The name of the setting's values, if they are not a few fixed words."""
        several = self.name.rpartition("_")[2]  # "names", "hosts" and the like
        return several if takes_several(self.field) else _WORDS.get(self.type, "JSON")

    @property
    def limits(self) -> dict[str, float]:
        """The limits of a number, by pydantic's names for them: ge, gt, le, lt."""
        return {
            name: getattr(constraint, name)
            for constraint in self.field.metadata
            for name in _LIMITS
            if hasattr(constraint, name)
        }

    @property
    def default(self) -> str:
        """The default as an operator writes it; empty if there is none."""
        value = self.field.default
        if isinstance(value, bool):
            return "on" if value else "off"
        if isinstance(value, float):
            return f"{value:g}"
        return "" if value is None or value == () else str(value)

    @property
    def description(self) -> str:
        """The sentence that says what the setting is for."""
        return " ".join((self.field.description or "").split())


def setting_options() -> tuple[SettingOption, ...]:
    """Return an option for each field of `Settings`, in the order of the fields."""
    return tuple(SettingOption(name, field) for name, field in Settings.model_fields.items())


def with_setting_options(command: Command) -> Command:
    """Show typer a parameter for each setting in place of a command's `**options`.

    A parameter is None if its option is not given; then the variable or the default counts.
    """
    signature = inspect.signature(command)
    own = [part for part in signature.parameters.values() if part.kind is not part.VAR_KEYWORD]
    generated = [_parameter(option) for option in setting_options()]
    command.__signature__ = signature.replace(parameters=[*own, *generated])  # type: ignore[attr-defined]
    return command


def _parameter(option: SettingOption) -> inspect.Parameter:
    default = f" Default: {option.default}." if option.default else ""
    info = typer.Option(
        None,
        "/".join(option.flags),
        help=option.description + default,
        metavar=None if option.choices else option.kind.upper(),
        # typer has no exclusive limits; pydantic checks all limits anyway.
        min=option.limits.get("ge"),
        max=option.limits.get("le"),
        # The two flags of a switch are so wide that the other options' texts would have no room.
        rich_help_panel="Switches" if option.type is bool else None,
    )
    return inspect.Parameter(
        option.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=info,
        annotation=_command_line_type(option),
    )


def _command_line_type(option: SettingOption) -> Any:
    """Return the type that typer turns a word into; pydantic parses the words that stay text."""
    if takes_several(option.field):
        return list[str] | None
    if option.choices or option.type in (int, float, Path):
        return option.type | None
    return str | None
