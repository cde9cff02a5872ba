"""Parses untrusted JSON: it is bounded before any object is built, and no key may repeat."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from pydantic_core import from_json

_LONGEST_SHOWN: Final = 100  # characters of a key, in messages

# Escaped quotes have been masked. A string without an end takes the rest, so that each character is
# read once.
_STRING: Final = re.compile(r'"[^"]*+"?')
# Text without quotes and brackets, then: a string (group 1) with the colon of a key (group 2), an
# opening bracket (group 3), or a closing one.
_TOKEN: Final = re.compile(
    rf'[^"\[\]{{}}]*+(?:({_STRING.pattern})([ \t\n\r]*+:)?|([\[{{])|[\]}}])?'
)


class StrictJSONError(ValueError):
    """The text is not accepted as JSON; the message completes a sentence that begins "it"."""


class UnknownKeyError(StrictJSONError):
    """The document has an unknown key; `key` is the whole key."""

    def __init__(self, key: str) -> None:
        super().__init__(f"has an unknown key {key[:_LONGEST_SHOWN]!r}")
        self.key = key


@dataclass(frozen=True, slots=True)
class JsonLimits:
    """The limits of a document. Every object and list is work for the garbage collector.

    Building a document holds the interpreter's lock, so these limits, and one on the document's
    bytes, bound how long all other threads wait.
    """

    containers: int = 32_768  # objects and lists
    strings: int = 262_144  # keys included
    commas: int = 524_288  # outside strings
    members: int = 1000  # of each object
    depth: int = 100


DEFAULT_LIMITS: Final = JsonLimits()


def parse_json(
    text: str, limits: JsonLimits | None = DEFAULT_LIMITS, known: Collection[str] | None = None
) -> object:
    """Parse one JSON document into dicts, lists, strings, numbers, booleans and None.

    Args:
        limits: None for the server's own documents, which may be of any size.
        known: the keys that the outermost object may have, None for any. An unknown key is refused
            before its value is built.

    Raises:
        UnknownKeyError: the outermost object has a key that is not known.
        StrictJSONError: the text is not JSON, exceeds a limit, repeats a key, has NaN or Infinity,
            or has text that is not Unicode.
    """
    _Scan(limits, known).run(text)
    try:
        value: object = from_json(text.encode(), allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise StrictJSONError(f"is not valid JSON: {error}") from None
    return value


class _Scan:
    """Checks a document's keys and brackets in one pass that builds nothing.

    If the text is not JSON, the results are right up to the first fault; the parser stops there.
    """

    def __init__(self, limits: JsonLimits | None, known: Collection[str] | None) -> None:
        self._limits = limits
        self._known = known
        self._containers = 0
        self._open: list[set[str] | None] = []  # the keys of each open object; None for a list

    def run(self, text: str) -> None:
        # The masks keep all positions, and no valid string contains them.
        masked = text.replace("\\\\", "\0\0").replace('\\"', "\0\0") if "\\" in text else text
        if self._limits is not None:
            _count(masked, self._limits)
        for token in _TOKEN.finditer(masked):
            match token.lastindex:
                case 1:
                    pass  # a string that is a value
                case 2:
                    self._add_key(_unquoted(text[slice(*token.span(1))]))
                case 3:
                    self._begin(set() if token[3] == "{" else None)
                case _:
                    if self._open:
                        self._open.pop()

    def _begin(self, keys: set[str] | None) -> None:
        self._open.append(keys)
        self._containers += 1
        if (limits := self._limits) is None:
            return
        if len(self._open) > limits.depth:
            raise StrictJSONError("is nested too deeply")
        if self._containers > limits.containers:
            raise StrictJSONError(f"has more than {limits.containers} objects and lists in it")

    def _add_key(self, key: str) -> None:
        keys = self._open[-1] if self._open else None
        if keys is None:
            return  # not JSON, which the parser will report
        if len(self._open) == 1 and self._known is not None and key not in self._known:
            raise UnknownKeyError(key)
        if key in keys:
            raise StrictJSONError(f"repeats the key {key[:_LONGEST_SHOWN]!r}")
        keys.add(key)
        if self._limits is not None and len(keys) > self._limits.members:
            raise StrictJSONError(f"has an object with more than {self._limits.members} members")


def _count(masked: str, limits: JsonLimits) -> None:
    if masked.count('"') > 2 * limits.strings:
        raise StrictJSONError(f"has more than {limits.strings} strings in it")
    commas = masked.count(",")
    if commas > limits.commas:  # long texts may contain commas
        commas -= sum(string[0].count(",") for string in _STRING.finditer(masked))
    if commas > limits.commas:
        raise StrictJSONError(f"has more than {limits.commas} values in it")


def _unquoted(string: str) -> str:
    """Return the key that a JSON string stands for, or its raw text if the string is not valid."""
    if "\\" not in string:
        return string[1:-1]
    try:
        key: str = from_json(string.encode())
    except ValueError:
        return string[1:-1]
    return key
