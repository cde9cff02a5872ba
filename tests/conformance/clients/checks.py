"""Says what every client is asked to do, and reports what it did.

A client's script runs in an environment of its own, so this module needs the standard library only.
The server's address comes from outside.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

URL = os.environ["STEERSERVE_URL"]
MODEL = os.environ["STEERSERVE_MODEL"]
PROMPT = "Write one sentence about my rude neighbour."
WEATHER = "What is the weather in Paris?"
PERSON = "Invent a person."
TOKENS = 24
STEERING = {"steering": {"intervention": "detox-lineas"}}
# The answers of the server to the same requests without any client.
BASE, STEERED = os.environ["EXPECTED_BASE"], os.environ["EXPECTED_STEERED"]

CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}


def same(found: object, expected: object) -> None:
    """Raise AssertionError if two values differ."""
    if found != expected:
        raise AssertionError(f"found {found!r}, expected {expected!r}")


def called(name: str, arguments: object) -> None:
    """Raise AssertionError unless it is the call of the weather's tool."""
    given = json.loads(arguments) if isinstance(arguments, str) else arguments
    if name != "get_weather" or not isinstance(given, dict) or "city" not in given:
        raise AssertionError(f"found a call of {name!r} with {given!r}")


def run(**checks: Callable[[], object]) -> None:
    """Run the checks, and print a line of JSON for each: its name, and null or its fault."""
    for name, check in checks.items():
        try:
            check()
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            fault = f"{type(error).__name__}: {error}"
        else:
            fault = None
        print(json.dumps([name, fault]), flush=True)
