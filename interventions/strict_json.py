"""JSON from strangers: no duplicate keys, no NaN or Infinity, no nesting without end."""

import json
from collections.abc import Callable
from typing import NoReturn


class StrictJSONError(ValueError):
    """The text is not JSON that we accept; the message completes "it ..."."""


def parse_json(text: str, max_members: int | None = None) -> object:
    """Parse one JSON document into dicts, lists, strings, numbers, booleans and None.

    Args:
        max_members: of any one object; None for no limit.

    Raises:
        StrictJSONError: the text is not JSON, repeats a key, states NaN or Infinity, holds text
            that is no Unicode, nests too deeply, or has an object with too many members.
    """
    try:
        value: object = json.loads(
            text, object_pairs_hook=_object_hook(max_members), parse_constant=_refuse
        )
        # What strict UTF-8 cannot say (a lone surrogate, escaped or not) would fail later, and
        # less clearly.
        json.dumps(value, ensure_ascii=False).encode()
        return value
    except StrictJSONError:
        raise
    except RecursionError:
        raise StrictJSONError("is nested too deeply") from None
    except UnicodeEncodeError:
        raise StrictJSONError("is not valid Unicode") from None
    except json.JSONDecodeError as error:
        raise StrictJSONError(
            f"is not valid JSON ({error.msg} at character {error.pos})"
        ) from error
    except ValueError as error:  # an integer of more digits than Python converts
        raise StrictJSONError("holds a number that is too long") from error


def _object_hook(
    max_members: int | None,
) -> Callable[[list[tuple[str, object]]], dict[str, object]]:
    def hook(pairs: list[tuple[str, object]]) -> dict[str, object]:
        if max_members is not None and len(pairs) > max_members:
            raise StrictJSONError(f"has an object with more than {max_members} members")
        fields: dict[str, object] = {}
        for key, value in pairs:
            if key in fields:
                raise StrictJSONError(f"repeats the key {key[:100]!r}")
            fields[key] = value
        return fields

    return hook


def _refuse(constant: str) -> NoReturn:
    raise StrictJSONError(f"holds {constant}, which JSON does not have")
