"""JSON from strangers: bounded before anything is built of it, and no key twice."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from pydantic_core import from_json

_LONGEST_SHOWN: Final = 100  # characters of a key, in messages

# What looks like the end of a string and is none has been masked. A string without an end takes the
# rest, so that each character is read once.
_STRING: Final = re.compile(r'"[^"]*+"?')
# Whatever has no quote and no bracket in it, then a string, with the colon that makes it a key, or
# a bracket: an opening one is a group.
_TOKEN: Final = re.compile(
    rf'[^"\[\]{{}}]*+(?:({_STRING.pattern})([ \t\n\r]*+:)?|([\[{{])|[\]}}])?'
)


class StrictJSONError(ValueError):
    """The text is not JSON that we accept; the message completes "it ..."."""


class UnknownKeyError(StrictJSONError):
    """The document has a key that it must not have; `key` is all of it."""

    def __init__(self, key: str) -> None:
        super().__init__(f"has an unknown key {key[:_LONGEST_SHOWN]!r}")
        self.key = key


@dataclass(frozen=True, slots=True)
class JsonLimits:
    """The most that a document may hold. Every object and list is work for the garbage collector.

    Building a document keeps the interpreter's lock: these bounds, and one on its bytes, are what
    bounds how long every other thread waits for it.
    """

    containers: int = 32_768  # objects and lists
    strings: int = 262_144  # keys among them
    commas: int = 524_288  # between whatever else, such as the numbers of a list
    members: int = 1000  # of any one object
    depth: int = 100


DEFAULT_LIMITS: Final = JsonLimits()


def parse_json(
    text: str, limits: JsonLimits | None = DEFAULT_LIMITS, known: Collection[str] | None = None
) -> object:
    """Parse one JSON document into dicts, lists, strings, numbers, booleans and None.

    Args:
        limits: None for a document of our own, however large it has become.
        known: the keys that the outermost object may have, None for any. Another is refused before
            anything is built of its value.

    Raises:
        UnknownKeyError: the outermost object has a key that is not known.
        StrictJSONError: the text is not JSON, exceeds a limit, repeats a key, states NaN or
            Infinity, holds text that is no Unicode, or nests too deeply.
    """
    _Scan(limits, known).run(text)
    try:
        value: object = from_json(text.encode(), allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:
        raise StrictJSONError(f"is not valid JSON: {error}") from None
    return value


class _Scan:
    """Looks at a document's strings and brackets, in one pass that builds nothing.

    It is right about all that comes before the first place at which the text is not JSON; the
    parser does not get further either.
    """

    def __init__(self, limits: JsonLimits | None, known: Collection[str] | None) -> None:
        self._limits = limits
        self._known = known
        self._containers = 0
        self._open: list[set[str] | None] = []  # the keys of each open object; None for a list

    def run(self, text: str) -> None:
        # Of equal length, so that places stay what they are. Neither can be in a valid string.
        masked = text.replace("\\\\", "\0\0").replace('\\"', "\0\0") if "\\" in text else text
        if self._limits is not None:
            _count(masked, self._limits)
        for token in _TOKEN.finditer(masked):
            match token.lastindex:
                case 1:
                    pass  # a string that is no key
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
            return  # it is not JSON, as the parser will say
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
    if commas > limits.commas:  # those of long texts may be among them
        commas -= sum(string[0].count(",") for string in _STRING.finditer(masked))
    if commas > limits.commas:
        raise StrictJSONError(f"has more than {limits.commas} values in it")


def _unquoted(string: str) -> str:
    """The key that a string of the document spells; as it is where it is no valid string."""
    if "\\" not in string:
        return string[1:-1]
    try:
        key: str = from_json(string.encode())
    except ValueError:
        return string[1:-1]
    return key
