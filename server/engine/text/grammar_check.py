"""Compiles a client's grammar within limits of time and memory, in a process of its own.

A few characters of a grammar can ask for all memory, for minutes, or for more of the stack than
there is, and llguidance has no limit against that. So this program tries first what the server will
do. It reads a grammar, and prints a line of JSON for each fault that it finds, the last one being
the most exact. It prints nothing if the grammar can be used.
"""

import json
import resource
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, Final

from llguidance import LLMatcher, LLTokenizer

CPU_SECONDS: Final = 2
MEMORY: Final = 512 * 1024 * 1024  # bytes of addresses, for this program and the grammar
# Half of the stack that the server's threads have, so that what is compiled here has room there.
_STACK: Final = 4 * 1024 * 1024
_JSON: Final = "start: %json "
# The keywords whose values hold schemas by name, and those whose values are one schema or several.
# Definitions come first: a fault in one is a fault of every schema that refers to it.
_NAMED: Final = ("$defs", "definitions", "properties", "patternProperties")
_NESTED: Final = ("items", "prefixItems", "additionalProperties", "anyOf", "allOf", "oneOf")

_BYTES: Final = LLTokenizer("byte")


def fault_of(lark: str) -> str | None:
    """Return why a grammar cannot be used; None if it can."""
    matcher = LLMatcher(_BYTES, lark, log_level=0)
    if not matcher.is_error():
        matcher.compute_bitmask()
    if not matcher.is_error():
        return None
    message = matcher.get_error()
    if message.startswith("NoExtension"):
        return "no text has this structure"
    if message.startswith("panic"):
        return "it is too complex"
    return (
        message.partition("\n   1 | ")[0].partition("<state>")[0].removeprefix("at 1(8): ").strip()
    )


def schema_of(lark: str) -> Mapping[str, Any] | None:
    """Return the JSON schema that a grammar is made of; None if there is more in the grammar."""
    if not lark.startswith(_JSON):
        return None
    try:
        schema = json.loads(lark.removeprefix(_JSON))
    except ValueError:
        return None
    return schema if isinstance(schema, dict) else None


def exact_faults(schema: Mapping[str, Any], fault: str) -> Iterator[tuple[str, str]]:
    """Yield the places in a schema, each inside of the one before, that have its fault alone."""
    shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
    place, parts = "", _parts(schema)
    while (found := next(parts, None)) is not None:
        step, part = found
        if fault_of(_JSON + json.dumps({**shared, **part})) == fault:
            place, parts = place + step, _parts(part)
            yield place, fault


def _parts(schema: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for keyword in _NAMED:
        named = schema.get(keyword)
        for name, part in named.items() if isinstance(named, dict) else ():
            if isinstance(part, dict):
                yield f".{keyword}.{name}", part
    for keyword in _NESTED:
        nested = schema.get(keyword)
        if isinstance(nested, dict):
            yield f".{keyword}", nested
        for index, part in enumerate(nested if isinstance(nested, list) else ()):
            if isinstance(part, dict):
                yield f".{keyword}[{index}]", part


def _report(place: str, fault: str) -> None:
    print(json.dumps([place, fault]), flush=True)  # noqa: T201


def _check(lark: str) -> None:
    fault = fault_of(lark)
    if fault is None:
        return
    _report("", fault)
    if (schema := schema_of(lark)) is not None:
        for place, inner in exact_faults(schema, fault):
            _report(place, inner)


def main() -> None:
    """Check the grammar on the standard input."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    with suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(_STACK)
    checking = threading.Thread(target=_check, args=(sys.stdin.read(),))
    checking.start()
    checking.join()


if __name__ == "__main__":
    main()
