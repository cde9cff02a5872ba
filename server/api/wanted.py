"""Parses the field `steering`, before anything is looked up in the registry."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from server.api.errors import invalid

MAX_STACK: Final = 4


@dataclass(frozen=True, slots=True)
class Wanted:
    """One intervention as a request or the operator wrote it; error messages name the params."""

    reference: str
    settings: Mapping[str, object]
    param: str
    reference_param: str


def parse_steering(value: object, param: str = "steering") -> tuple[Wanted, ...]:
    """Return the interventions that a `steering` value names, in order; none for null.

    Raises:
        ApiError: it is not null, an object with an `intervention`, or a list of at most 4 such.
    """
    if value is None:
        return ()
    if isinstance(value, dict):
        return (_parse_one(value, param),)
    if not isinstance(value, list):
        raise invalid(
            f"'{param}' must be an object, a list of objects, or null.", param, "invalid_type"
        )
    if len(value) > MAX_STACK:
        raise invalid(
            f"'{param}' lists {len(value)} interventions; at most {MAX_STACK} can be stacked.",
            param,
            "too_many_interventions",
        )
    return tuple(_parse_one(item, f"{param}[{place}]") for place, item in enumerate(value))


def _parse_one(value: object, param: str) -> Wanted:
    if not isinstance(value, dict):
        raise invalid(f"'{param}' must be an object.", param, "invalid_type")
    reference_param = f"{param}.intervention"
    if "intervention" not in value:
        message = f"'{param}' lacks 'intervention', the name of what to steer by."
        raise invalid(message, reference_param, "missing_required_parameter")
    reference = value["intervention"]
    if not isinstance(reference, str):
        message = f"'{reference_param}' must be a string: a name or sha256:<digest>."
        raise invalid(message, reference_param, "invalid_type")
    settings = {key: item for key, item in value.items() if key != "intervention"}
    return Wanted(reference, settings, param, reference_param)
