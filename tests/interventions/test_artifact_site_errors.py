"""Tests that a file with wrong gates or inputs is refused in a sentence that names the tensor."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from interventions.artifact import read_artifact, read_summary
from interventions.header import ArtifactError
from tests.artifact_samples import (
    Entry,
    entry,
    floats,
    gate_entries,
    handmade,
    map_entries,
    support_entries,
    write,
)

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("entries", "name", "reason"),
    [
        # A gate without its map, or without a half.
        (gate_entries("m"), "m.gate.weight", 'site "m" has no map'),
        (map_entries("n") | gate_entries("m"), "m.gate.weight", 'site "m" has no map'),
        (map_entries("m") | gate_entries("m.input"), "m.input.gate.weight", '"m.input" has no map'),
        (map_entries("m.input") | gate_entries("m"), "m.gate.weight", 'site "m" has no map'),
        (gate_entries("input"), "input.gate.weight", 'site "input" has no map'),
        (
            map_entries("m") | {"sites.m.gate.weight": entry([2], [1, 2])},
            "m.gate.weight",
            'has no "sites.m.gate.bias"',
        ),
        (
            map_entries("m") | {"sites.m.gate.bias": entry([], [1])},
            "m.gate.bias",
            'has no "sites.m.gate.weight"',
        ),
        (
            map_entries("m") | {"sites.m.gate.bias": entry([2], [1, 2])},
            "m.gate.bias",
            'has no "sites.m.gate.weight"',
        ),
        # A gate of a gate, which is no map.
        (
            map_entries("m") | gate_entries("m") | gate_entries("m.gate"),
            "m.gate.gate.weight",
            'site "m.gate" has no map',
        ),
        # Wrong shapes.
        (map_entries("m") | gate_entries("m", 3), "m.gate.weight", "shape (3); expected (2)"),
        (
            map_entries("m") | gate_entries("m") | {"sites.m.gate.weight": entry([], [1])},
            "m.gate.weight",
            "shape (); expected (2)",
        ),
        (
            map_entries("m") | gate_entries("m") | {"sites.m.gate.weight": entry([1, 2], [1, 2])},
            "m.gate.weight",
            "shape (1, 2); expected (2)",
        ),
        (
            map_entries("m") | gate_entries("m") | {"sites.m.gate.bias": entry([1], [1])},
            "m.gate.bias",
            'shape (1); expected (2), as "sites.m.gate.weight", or () for a gate of site "m"',
        ),
        (
            map_entries("m") | gate_entries("m") | {"sites.m.gate.bias": entry([1, 1], [1])},
            "m.gate.bias",
            'or () for a gate of site "m"',
        ),
        # At once a gate, by its bias, and a map, by its support.
        (
            map_entries("m") | gate_entries("m") | support_entries("m.gate"),
            "m.gate.low",
            'shape () of "sites.m.gate.bias" makes that a gate of site "m"',
        ),
        # One module's input and output.
        (
            map_entries("m.n") | map_entries("m.n.input"),
            "m.n.input.weight",
            'whose output "sites.m.n.weight" edits',
        ),
        (
            map_entries("m.gate") | map_entries("m.gate.input"),
            "m.gate.input.weight",
            'whose output "sites.m.gate.weight" edits',
        ),
        # The input of no module.
        (map_entries("input"), "input.bias", "names no module"),
        (map_entries("m") | map_entries("input"), "input.bias", "names no module"),
        (map_entries("input") | gate_entries("input"), "input.bias", "names no module"),
    ],
)
def test_refuses_wrong_gates_and_inputs(
    tmp_path: Path, entries: Mapping[str, Entry], name: str, reason: str
) -> None:
    path = write(tmp_path, handmade(dict(sorted(entries.items(), reverse=True))))
    for read in (read_artifact, read_summary):
        with pytest.raises(ArtifactError) as caught:
            read(path)
        assert f'The tensor "sites.{name}"' in str(caught.value)
        assert reason in str(caught.value)


@pytest.mark.parametrize("name", ["sites.m.gate", "sites.m.input", "sites.m.gate.scale"])
def test_refuses_a_name_without_a_known_part(tmp_path: Path, name: str) -> None:
    entries = map_entries("m") | {name: entry([2], [1, 2])}
    with pytest.raises(ArtifactError, match=f"no tensor called '{name}'"):
        read_artifact(write(tmp_path, handmade(entries)))


@pytest.mark.parametrize("site", ["m", "m.input"])
@pytest.mark.parametrize("part", ["weight", "bias"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_refuses_a_gate_that_is_not_finite(
    tmp_path: Path, site: str, part: str, value: float
) -> None:
    entries = map_entries(site) | gate_entries(site)
    name = f"sites.{site}.gate.{part}"
    dtype, shape, data = entries[name]
    entries[name] = dtype, shape, data[:-4] + floats(value)
    with pytest.raises(ArtifactError, match=f'"{name}" holds a value that is not finite'):
        read_artifact(write(tmp_path, handmade(entries)))


def test_refuses_an_inputs_low_above_its_high(tmp_path: Path) -> None:
    entries = map_entries("m.input") | support_entries("m.input")
    entries["sites.m.input.low"] = entry([2], [0, 2])
    with pytest.raises(ArtifactError, match=r'"m\.input" has a low above its high'):
        read_artifact(write(tmp_path, handmade(entries)))
