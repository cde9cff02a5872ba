"""Parses JSON that a user or another program has written."""

import json

from pydantic import JsonValue
from pydantic_core import from_json


def parse_json(text: str) -> JsonValue:
    """Return the value of a JSON text that can be written as JSON again.

    Raises:
        ValueError: the text is not JSON, is nested too deeply, or has a number that is not finite
            or half of a surrogate pair. The message says which.
    """
    value: JsonValue = from_json(text.encode(), allow_inf_nan=False)
    json.dumps(value, allow_nan=False)  # 1e999 is infinite
    return value
