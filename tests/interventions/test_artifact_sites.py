"""Tests of gates and input sites in artifacts: reading back, tensor names, refusals to write."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from interventions.artifact import read_artifact, read_summary, write_artifact
from interventions.header import ArtifactError, ArtifactLimits
from interventions.layout import AffineShapes, to_tensors
from steering.affine import AffineMap, AffineParameters, Gate
from steering.reward import RewardHead
from tests.artifact_samples import (
    Entry,
    affine_manifest,
    gate_entries,
    gated_parameters,
    handmade,
    map_entries,
    same_parameters,
    support_entries,
    write,
)


def _read(folder: Path, entries: Mapping[str, Entry]) -> AffineParameters:
    parameters = read_artifact(write(folder, handmade(entries))).parameters
    assert not isinstance(parameters, RewardHead)
    return parameters


def _gated(parameters: AffineParameters) -> set[str]:
    return {site for site, map_ in parameters.items() if map_.gate is not None}


# Writing and reading back


def test_gates_and_inputs_read_back(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_artifact(path, affine_manifest(), gated_parameters())

    parameters = read_artifact(path).parameters
    assert not isinstance(parameters, RewardHead)
    assert same_parameters(parameters, gated_parameters())
    for map_ in parameters.values():
        assert map_.gate is not None
        assert (map_.gate.bias.shape, map_.gate.bias.dtype) == ((), torch.float32)
    widths = {"model.layers.0.norm": 4, "model.layers.1.mlp.input": 4}
    assert read_summary(path).shapes == AffineShapes(widths)


def test_the_names_and_shapes_of_the_tensors() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in to_tensors(gated_parameters()).items()}
    assert shapes == {
        "sites.model.layers.0.norm.weight": (4,),
        "sites.model.layers.0.norm.bias": (4,),
        "sites.model.layers.0.norm.gate.weight": (4,),
        "sites.model.layers.0.norm.gate.bias": (),
        "sites.model.layers.1.mlp.input.weight": (4,),
        "sites.model.layers.1.mlp.input.bias": (4,),
        "sites.model.layers.1.mlp.input.low": (4,),
        "sites.model.layers.1.mlp.input.high": (4,),
        "sites.model.layers.1.mlp.input.gate.weight": (4,),
        "sites.model.layers.1.mlp.input.gate.bias": (),
    }


def test_a_gate_that_is_lost_or_changed_is_seen_by_the_comparison() -> None:
    """The tests above compare with `same_parameters`, which must be able to fail."""
    given = gated_parameters()
    site = "model.layers.0.norm"
    gate = given[site].gate
    assert gate is not None
    for other in (None, replace(gate, weight=gate.weight + 1), replace(gate, bias=gate.bias + 1)):
        assert not same_parameters(given, given | {site: replace(given[site], gate=other)})


def test_what_is_stored_in_half_is_read_as_float32(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_artifact(path, affine_manifest(), gated_parameters(), torch.bfloat16)

    parameters = read_artifact(path).parameters
    assert not isinstance(parameters, RewardHead)
    gate, given = parameters["model.layers.0.norm"].gate, gated_parameters()
    expected = given["model.layers.0.norm"].gate
    assert gate is not None
    assert expected is not None
    assert gate.weight.dtype == gate.bias.dtype == torch.float32
    assert torch.equal(gate.weight, expected.weight.bfloat16().float())
    assert torch.equal(gate.bias, expected.bias.bfloat16().float())


def test_a_gate_is_no_site(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_artifact(path, affine_manifest(), gated_parameters())
    shapes = read_summary(path, ArtifactLimits(max_sites=2)).shapes
    assert shapes == AffineShapes(dict.fromkeys(gated_parameters(), 4))
    with pytest.raises(ArtifactError, match="2 sites; the limit is 1"):
        read_summary(path, ArtifactLimits(max_sites=1))


# --- the meaning of a tensor's name ---


@pytest.mark.parametrize(
    ("entries", "sites", "gated"),
    [
        (map_entries("m.gate"), {"m.gate"}, set()),
        (map_entries("gate"), {"gate"}, set()),
        (map_entries("m.gate", width=1), {"m.gate"}, set()),
        (map_entries("m") | map_entries("m.gate"), {"m", "m.gate"}, set()),
        (map_entries("m") | map_entries("m.gate", 3), {"m", "m.gate"}, set()),
        (map_entries("m.gate") | support_entries("m.gate"), {"m.gate"}, set()),
        (map_entries("m") | gate_entries("m"), {"m"}, {"m"}),
        (map_entries("m", 1) | gate_entries("m", 1), {"m"}, {"m"}),
        (map_entries("m.gate") | gate_entries("m.gate"), {"m.gate"}, {"m.gate"}),
        (
            map_entries("m") | map_entries("m.gate") | gate_entries("m.gate"),
            {"m", "m.gate"},
            {"m.gate"},
        ),
        (map_entries("m.gate.gate"), {"m.gate.gate"}, set()),
        (
            map_entries("m") | gate_entries("m") | map_entries("m.gate.gate"),
            {"m", "m.gate.gate"},
            {"m"},
        ),
        (map_entries("m.gate.input"), {"m.gate.input"}, set()),
        (
            map_entries("m") | gate_entries("m") | map_entries("m.gate.input"),
            {"m", "m.gate.input"},
            {"m"},
        ),
        (map_entries("m.gate.input") | gate_entries("m.gate.input"), *2 * ({"m.gate.input"},)),
        (map_entries("m.input") | gate_entries("m.input"), {"m.input"}, {"m.input"}),
        (map_entries("m.input.gate"), {"m.input.gate"}, set()),
        (map_entries("m.input.proj") | map_entries("m"), {"m.input.proj", "m"}, set()),
        # Module m has a child called "input": m.input is m's input, m.input.input the child's.
        (
            map_entries("m.input") | map_entries("m.input.input"),
            {"m.input", "m.input.input"},
            set(),
        ),
        # The input of module m and the output of another module, m.n, whose path begins alike.
        (map_entries("m.input") | map_entries("m.n"), {"m.input", "m.n"}, set()),
    ],
)
def test_the_shape_of_the_bias_tells_a_gate_from_a_module_called_gate(
    tmp_path: Path, entries: Mapping[str, Entry], sites: set[str], gated: set[str]
) -> None:
    parameters = _read(tmp_path, entries)
    assert parameters.keys() == sites
    assert _gated(parameters) == gated
    # No tensor of the file is ignored, and the parameters survive another write and read.
    assert to_tensors(parameters).keys() == entries.keys()
    write_artifact(tmp_path / "again", affine_manifest(), parameters)
    assert same_parameters(read_artifact(tmp_path / "again").parameters, parameters)


def test_a_gate_has_the_values_of_its_tensors(tmp_path: Path) -> None:
    gate = _read(tmp_path, map_entries("m") | gate_entries("m"))["m"].gate
    assert gate is not None
    assert (gate.weight.tolist(), gate.bias.item()) == ([-0.5, -0.5], 0.75)


# --- maps that cannot be written, because they would be read as others ---

ONE, TWO = torch.ones(()), torch.ones(2)
MAP = AffineMap(TWO, TWO)


@pytest.mark.parametrize(
    ("parameters", "name", "reason"),
    [
        ({"m": replace(MAP, gate=Gate(TWO, ONE)), "m.gate": MAP}, "m.gate.weight", "only one"),
        ({"m.gate": MAP, "m": replace(MAP, gate=Gate(TWO, ONE))}, "m.gate.weight", "only one"),
        ({"m": replace(MAP, gate=Gate(TWO, TWO))}, "m.gate.bias", "shape (2); expected ()"),
        ({"m": replace(MAP, gate=Gate(ONE, ONE))}, "m.gate.weight", "shape (); expected (2)"),
        ({"m": MAP, "m.gate": AffineMap(TWO, ONE)}, "m.gate.bias", "shape (); expected (2)"),
        ({"m": MAP, "m.input": MAP}, "m.input.weight", "edits one of them"),
    ],
)
def test_refuses_to_write_what_would_read_as_something_else(
    tmp_path: Path, parameters: AffineParameters, name: str, reason: str
) -> None:
    with pytest.raises(ArtifactError) as caught:
        write_artifact(tmp_path / "a", affine_manifest(), parameters)
    assert f'The tensor "sites.{name}"' in str(caught.value)
    assert reason in str(caught.value)
    assert not list(tmp_path.iterdir())
