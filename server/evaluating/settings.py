"""The settings to compare: the base model, given steerings, and sweeps of one setting."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pydantic import JsonValue

from server.evaluating import EvaluationInputError
from server.strict_json import parse_json

BASE_LABEL: Final = "base model"  # an intervention's name has no blank
_SWEPT: Final = ("strength", "eta", "iterations", "direction_scale")
_WHOLE: Final = re.compile(r"-?\d+")


@dataclass(frozen=True, slots=True)
class Setting:
    """One column of the comparison: a request's `steering`, and a name for it in the report."""

    label: str
    steering: JsonValue  # None is the base model
    curve: str | None = None  # the sweep that it belongs to
    value: float | None = None  # of the swept setting

    @property
    def items(self) -> Sequence[JsonValue]:
        """The interventions that are asked for, in order."""
        if self.steering is None:
            return ()
        return self.steering if isinstance(self.steering, list) else (self.steering,)


BASE: Final = Setting(BASE_LABEL, None)


def parse_steering(text: str) -> Setting:
    """Read `--steering`: JSON as in a request's body, or an intervention's name alone.

    Raises:
        EvaluationInputError: the text is neither.
    """
    steering: JsonValue = {"intervention": text}
    if text.lstrip()[:1] in ("{", "["):
        try:
            steering = parse_json(text)
        except ValueError as error:
            raise EvaluationInputError(f"--steering is not JSON: {error}") from error
    items = steering if isinstance(steering, list) else [steering]
    if not text.strip() or not items or not all(map(_names_intervention, items)):
        raise EvaluationInputError(
            '--steering is a name, an object as {"intervention": NAME}, or a list of such objects, '
            f"not {text!r}"
        )
    return Setting(label(steering), steering)


def parse_sweep(text: str) -> list[Setting]:
    """Read `--sweep NAME:SETTING=VALUE,VALUE,...` to one setting for each value, in their order.

    Raises:
        EvaluationInputError: the text has another form, or a value is no finite number.
    """
    head, equals, tail = text.partition("=")
    name, colon, swept = head.rpartition(":")
    if not (name and colon and equals) or swept not in _SWEPT:
        raise EvaluationInputError(
            f"--sweep is NAME:SETTING=VALUE,VALUE, with a SETTING of {', '.join(_SWEPT)}, "
            f"not {text!r}"
        )
    settings = []
    for part in tail.split(","):
        value = _number(part, text)
        steering: JsonValue = {"intervention": name, swept: value}
        settings.append(Setting(label(steering), steering, f"{name} ({swept})", float(value)))
    return settings


def compared(steerings: Sequence[str], sweeps: Sequence[str]) -> list[Setting]:
    """Return the base model and the settings of both options, each steering once.

    Raises:
        EvaluationInputError: an option is wrong.
    """
    for text in (*steerings, *sweeps):
        _check_unicode(text)
    swept = [setting for text in sweeps for setting in parse_sweep(text)]
    found = {BASE.label: BASE}
    for setting in (*map(parse_steering, steerings), *swept):
        same = found.setdefault(setting.label, setting)
        if same.steering != setting.steering:
            raise EvaluationInputError(
                f"two steerings differ in the types of their values only: {setting.label}"
            )
        if setting.curve is not None:  # a steering that is also a sweep's belongs to the curve
            found[setting.label] = setting
    return list(found.values())


def label(steering: JsonValue) -> str:
    """Describe a steering in few words: the names, each with the settings that were given."""
    if isinstance(steering, list):
        return " + ".join(map(label, steering))
    assert isinstance(steering, dict)
    given = [f"{key} {value}" for key, value in steering.items() if key != "intervention"]
    return " ".join([str(steering["intervention"]), *given])


def _check_unicode(text: str) -> None:
    """Refuse bytes of the command line that are not UTF-8: no request can hold them."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise EvaluationInputError(f"{text!r} is not UTF-8") from error


def _names_intervention(item: JsonValue) -> bool:
    return isinstance(item, dict) and isinstance(item.get("intervention"), str)


def _number(part: str, text: str) -> float:
    try:
        value = int(part) if _WHOLE.fullmatch(part.strip()) else float(part)
    except ValueError as error:
        raise EvaluationInputError(
            f"--sweep has a value {part!r} that is no number: {text!r}"
        ) from error
    if not math.isfinite(value):
        raise EvaluationInputError(f"--sweep has a value that is not finite: {text!r}")
    return value
