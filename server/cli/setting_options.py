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

# Names a value of each type for the operator; a value of any other type is given as JSON.
_WORDS: Final = {int: "integer", float: "number", str: "text", Path: "path", SecretStr: "key"}
_LIMITS: Final = ("ge", "gt", "le", "lt")

Command = TypeVar("Command", bound=Callable[..., None])


@dataclass(frozen=True, slots=True)
class SettingOption:
    """A setting as an operator meets it: on the command line, in the environment, in the docs."""

    name: str  # of the field
    field: FieldInfo

    @property
    def type(self) -> Any:
        """The type of a value that is given."""
        annotation = self.field.annotation
        given = [part for part in get_args(annotation) if part is not NoneType]
        # Of several types, such as those of JSON, there is none to name.
        return given[0] if NoneType in get_args(annotation) and len(given) == 1 else annotation

    @property
    def takes_several(self) -> bool:
        """Whether it holds several values, of which the option gives one at a time."""
        return takes_several(self.field)

    @property
    def flags(self) -> tuple[str, ...]:
        """The option; of a switch, the one that turns it on and the one that turns it off."""
        word = option_name(self.name, self.field)
        return (f"--{word}", f"--no-{word}") if self.type is bool else (f"--{word}",)

    @property
    def variable(self) -> str:
        """The variable that is read where the option is not given."""
        return variable_name(self.name, self.field)

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that it takes and no other; none where it takes more than words."""
        if self.type is bool:
            return ("on", "off")
        return get_args(self.type) if get_origin(self.type) is Literal else ()

    @property
    def kind(self) -> str:
        """What a value is called that is not one of a few words."""
        several = self.name.rpartition("_")[2]  # "names", "hosts" and the like
        return several if self.takes_several else _WORDS.get(self.type, "JSON")

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
        """The value where none is given, in the words of an operator; empty for none."""
        value = self.field.default
        if isinstance(value, bool):
            return "on" if value else "off"
        if isinstance(value, float):
            return f"{value:g}"
        return "" if value is None or value == () else str(value)

    @property
    def description(self) -> str:
        """The sentence that says what it is for."""
        return " ".join((self.field.description or "").split())


def setting_options() -> tuple[SettingOption, ...]:
    """An option for each field of `Settings`, in their order."""
    return tuple(SettingOption(name, field) for name, field in Settings.model_fields.items())


def with_setting_options(command: Command) -> Command:
    """Show typer a parameter for each setting in place of a command's `**options`.

    A parameter is None where its option is not given: then the variable holds, or the default.
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
        # typer knows no limit that the value must not reach; pydantic has the last word anyway.
        min=option.limits.get("ge"),
        max=option.limits.get("le"),
        # Both flags of a switch take columns of their own: beside others they leave no room.
        rich_help_panel="Switches" if option.type is bool else None,
    )
    return inspect.Parameter(
        option.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=info,
        annotation=_command_line_type(option),
    )


def _command_line_type(option: SettingOption) -> Any:
    """The type that typer turns a word into; what is text to it, pydantic reads."""
    if option.takes_several:
        return list[str] | None
    if option.choices or option.type in (int, float, Path):
        return option.type | None
    return str | None
