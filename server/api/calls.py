"""Parses the calls of tools in a conversation into the form that chat templates expect."""

import json
from typing import Final

from interventions.strict_json import StrictJSONError, parse_json
from server.api.errors import invalid
from server.api.parsing import string

# Objects and lists in the arguments of all calls: to build them holds up all other requests.
MAX_CONTAINERS: Final = 32_768


class Calls:
    """The calls of one conversation, as far as it has been parsed."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}  # those of the called functions, by the calls' ids
        self._containers = 0

    def add(self, call_id: str, name: str, arguments: object, param: str) -> dict[str, object]:
        """Return a call in the form that chat templates expect.

        Args:
            call_id: the call's.
            name: the function's.
            arguments: the text of a JSON object, or an empty one.
            param: the field that has the arguments; errors name it.

        Raises:
            ApiError: the arguments are something else, or too much with those before.
        """
        text = string(arguments, param)
        self._containers += text.count("{") + text.count("[")
        if self._containers > MAX_CONTAINERS:
            message = (
                f"The arguments of calls up to '{param}' have more than {MAX_CONTAINERS:,} objects "
                "and lists."
            )
            raise invalid(message, param, "invalid_value")
        parsed, fault = _parse(text)
        if not isinstance(parsed, dict):
            message = f"'{param}' must be the text of a JSON object{fault}."
            raise invalid(message, param, "invalid_value")
        self.names[call_id] = name
        function = {"name": name, "arguments": parsed}
        return {"id": call_id, "type": "function", "function": function}


def _parse(text: str) -> tuple[object, str]:
    """Return the value of a JSON text, or None and why there is none."""
    try:
        value = parse_json(text) if text else {}
        json.dumps(value, allow_nan=False)
    except StrictJSONError as error:
        return None, f"; it {error}"
    except ValueError:
        return None, "; it has a number that is too large"
    return value, ""
