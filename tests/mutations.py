"""Makes mostly invalid input from valid: JSON with wrong values, files with wrong bytes."""

import copy
import json
import random
from collections.abc import Iterator
from typing import Final, TypeAlias

Json: TypeAlias = dict[str, object]

# Values that buggy or hostile clients send in place of the right ones.
STRANGE: Final[tuple[object, ...]] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 0.5, -0.0, 1e308, 5e-324),
    *("", " ", "\0", "\ufeff", "\ud7ff", "😀" * 9, "../..", "sha256:", "tiny+", "a" * 5000, "NaN"),
    *([], {}, [[]], [None], [0] * 300, ["x"] * 40, {"": 0}, {"a": {"b": {}}}, [[[[[[[[]]]]]]]]),
)


def mutated_json(valid: Json, chance: random.Random) -> Json:
    """Return a copy in which one to three values are changed, removed, added or nested."""
    changed = copy.deepcopy(valid)
    for _ in range(chance.randint(1, 3)):
        _change(changed, chance)
    return changed


def _change(value: Json, chance: random.Random) -> None:
    places = list(_places(value))
    container, key = chance.choice(places) if places else (value, "x")
    match chance.randrange(5):
        case 0:
            del container[key]  # type: ignore[arg-type]
        case 1:
            name = f"{key}_" if isinstance(container, dict) else key
            _put(container, name, _strange(chance))
        case 2:
            _put(container, key, [container[key]])  # type: ignore[index]
        case 3:
            _put(container, key, {"x": container[key]})  # type: ignore[index]
        case _:
            _put(container, key, _strange(chance))


def _strange(chance: random.Random) -> object:
    return copy.deepcopy(chance.choice(STRANGE))


def _put(container: object, key: object, value: object) -> None:
    assert isinstance(container, dict | list)
    container[key] = value  # type: ignore[call-overload]


def _places(value: object) -> Iterator[tuple[dict[str, object] | list[object], str | int]]:
    """Yield the container and the key or index of each value in a document."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield value, key
            yield from _places(item)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield value, index
            yield from _places(item)


def mutated_bytes(valid: bytes, chance: random.Random, end: int | None = None) -> bytes:
    """Return a copy of the bytes in which a few are changed, removed or doubled.

    Args:
        end: the index before which changes are made, apart from cuts at the end; None for anywhere.
    """
    data = bytearray(valid)
    for _ in range(chance.randint(1, 4)):
        limit = min(len(data), end or len(data))
        first = chance.randrange(limit) if limit else 0
        last = min(limit, first + chance.randint(1, 9))
        match chance.randrange(5):
            case 0:
                del data[first:last]
            case 1:
                data[first:first] = data[first:last]
            case 2:
                data[first:last] = chance.randbytes(last - first)
            case 3 if limit:
                data[first] ^= 1 << chance.randrange(8)
            case _:
                del data[len(data) - chance.randint(0, min(len(data), 40)) :]
    return bytes(data)


def spelled(value: Json, chance: random.Random) -> bytes:
    """Return an object as a JSON body, whose bytes are mutated three times in ten."""
    body = json.dumps(value, ensure_ascii=chance.random() < 0.5).encode(errors="surrogatepass")
    return mutated_bytes(body, chance) if chance.random() < 0.3 else body
