"""Builds small artifacts, and safetensors files by hand, which may be invalid.

An artifact is a safetensors file with an intervention's tensors (affine maps by site, or a reward
head) and its manifest. A site is a module of the model whose output or input a map edits.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch

from interventions.manifest import AffineManifest, RewardManifest, parse_manifest
from steering.affine import AffineMap, AffineParameters, Gate
from steering.reward import RewardHead

Json = dict[str, object]
Entry = tuple[str, list[int], bytes]  # type, shape, bytes
M = TypeVar("M", AffineManifest, RewardManifest)


def manifest_fields(kind: str = "affine", name: str = "sample") -> Json:
    """Return a complete manifest as JSON fields."""
    defaults: Mapping[str, object] = {"strength": 0.5, "positions": "all"}
    limits: Mapping[str, object] = {"strength": [0, 1]}
    if kind == "reward":
        defaults = {"eta": 0.5, "iterations": 5, "direction_scale": 1.0}
        limits = {"eta": [0, 2], "iterations": [0, 10], "direction_scale": [0, 3]}
    return {
        "format": "steerserve/1",
        "kind": kind,
        "method": "lineas" if kind == "affine" else "argre",
        "name": name,
        "description": "A sample.",
        "created": "2026-11-21T20:41:00Z",
        "license": "Apache-2.0",
        "base_model": {
            "id": "org/tiny",
            "architecture": "LlamaForCausalLM",
            "hidden_size": 4,
            "num_layers": 2,
            "vocab_size": 100,
            "fingerprint": "f" * 64,
        },
        "defaults": dict(defaults),
        "limits": dict(limits),
        "training": {"data": "made up", "samples": 32, "loss": 0.25, "shuffled": True, "x": None},
    }


def affine_manifest(name: str = "sample", **changed: object) -> AffineManifest:
    """Return a manifest of kind affine, with top-level fields replaced."""
    return _parsed(AffineManifest, manifest_fields("affine", name) | changed)


def reward_manifest(name: str = "sample", **changed: object) -> RewardManifest:
    """Return a manifest of kind reward, with top-level fields replaced."""
    return _parsed(RewardManifest, manifest_fields("reward", name) | changed)


def _parsed(kind: type[M], fields: Json) -> M:
    manifest = parse_manifest(json.dumps(fields))
    assert isinstance(manifest, kind)
    return manifest


def affine_parameters(seed: int = 0, width: int = 4) -> dict[str, AffineMap]:
    """Return random maps for two sites, the second with a support."""
    generator = torch.Generator().manual_seed(seed)
    weight, bias, other = torch.randn(3, width, generator=generator)
    return {
        "model.layers.0.norm": AffineMap(weight, bias),
        "model.layers.1.norm": AffineMap(bias, other, low=other - 1, high=other + 1),
    }


def gated_parameters(seed: int = 0, width: int = 4) -> dict[str, AffineMap]:
    """Return random gated maps for a module's output and another's input, this with a support."""
    generator = torch.Generator().manual_seed(seed)
    weight, bias, first, second = torch.randn(4, width, generator=generator)
    opens, closes = torch.randn(2, generator=generator)
    support = {"low": bias - 1, "high": bias + 1}
    return {
        "model.layers.0.norm": AffineMap(weight, bias, gate=Gate(first, opens)),
        "model.layers.1.mlp.input": AffineMap(bias, weight, **support, gate=Gate(second, closes)),
    }


def reward_head(seed: int = 0, units: int = 3, width: int = 4) -> RewardHead:
    """Return a random reward head."""
    generator = torch.Generator().manual_seed(seed)
    return RewardHead(
        w1=torch.randn(units, width, generator=generator),
        b1=torch.randn(units, generator=generator),
        w2=torch.randn(units, generator=generator),
        b2=torch.randn((), generator=generator),
        direction=torch.randn(width, generator=generator),
        positive_reward=torch.randn((), generator=generator),
    )


def same_parameters(
    left: AffineParameters | RewardHead, right: AffineParameters | RewardHead
) -> bool:
    """Return whether two interventions' parameters are equal."""
    if isinstance(left, RewardHead) and isinstance(right, RewardHead):
        fields = ("w1", "b1", "w2", "b2", "direction", "positive_reward")
        return all(torch.equal(getattr(left, name), getattr(right, name)) for name in fields)
    if isinstance(left, RewardHead) or isinstance(right, RewardHead):
        return False
    return left.keys() == right.keys() and all(_same_map(left[site], right[site]) for site in left)


def _same_map(left: AffineMap, right: AffineMap) -> bool:
    if (left.gate is None) != (right.gate is None):
        return False
    pairs = [
        (left.weight, right.weight),
        (left.bias, right.bias),
        (left.low, right.low),
        (left.high, right.high),
    ]
    if left.gate is not None and right.gate is not None:
        pairs += [(left.gate.weight, right.gate.weight), (left.gate.bias, right.gate.bias)]
    return all(_same(one, other) for one, other in pairs)


def _same(left: torch.Tensor | None, right: torch.Tensor | None) -> bool:
    if left is None or right is None:
        return left is right
    return torch.equal(left, right)


def floats(*values: float) -> bytes:
    """Return the values' float32 bytes."""
    return torch.tensor(values, dtype=torch.float32).numpy().tobytes()


def entry(shape: list[int], values: list[float]) -> Entry:
    """Return a float32 tensor for a handmade file."""
    return "F32", shape, floats(*values)


def affine_entries() -> dict[str, Entry]:
    """Return the tensors of a valid handmade affine file with one site."""
    return {
        "sites.model.layers.0.norm.weight": entry([2], [1, 2]),
        "sites.model.layers.0.norm.bias": entry([2], [3, 4]),
    }


def map_entries(site: str, width: int = 2) -> dict[str, Entry]:
    """Return the tensors of a handmade map at a site."""
    return {
        f"sites.{site}.weight": entry([width], [1.5] * width),
        f"sites.{site}.bias": entry([width], [0.25] * width),
    }


def support_entries(site: str) -> dict[str, Entry]:
    """Return the tensors of a handmade support for the map at a site of width 2."""
    return {f"sites.{site}.{part}": entry([2], [1, 1]) for part in ("low", "high")}


def gate_entries(site: str, width: int = 2) -> dict[str, Entry]:
    """Return the tensors of a handmade gate for the map at a site."""
    return {
        f"sites.{site}.gate.weight": entry([width], [-0.5] * width),
        f"sites.{site}.gate.bias": entry([], [0.75]),
    }


def reward_entries(units: int = 3, width: int = 2) -> dict[str, Entry]:
    """Return the tensors of a valid handmade reward file."""
    return {
        "head.0.weight": entry([units, width], [0.5] * (units * width)),
        "head.0.bias": entry([units], [0.5] * units),
        "head.2.weight": entry([1, units], [0.5] * units),
        "head.2.bias": entry([1], [0.5]),
        "direction": entry([width], [0.5] * width),
        "positive_reward": entry([], [1.0]),
    }


def header_fields(entries: Mapping[str, Entry], metadata: object) -> Json:
    """Return the JSON fields of a handmade safetensors file's header."""
    fields: Json = {} if metadata is None else {"__metadata__": metadata}
    offset = 0
    for name, (dtype, shape, data) in entries.items():
        end = offset + len(data)
        fields[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    return fields


def with_header(header: bytes, data: bytes) -> bytes:
    """Return a safetensors file's bytes: the header's length, the header, the tensors' bytes."""
    return len(header).to_bytes(8, "little") + header + data


def handmade(entries: Mapping[str, Entry], kind: str = "affine") -> bytes:
    """Return a safetensors file's bytes, made without the safetensors library."""
    metadata = {"manifest": json.dumps(manifest_fields(kind))}
    header = json.dumps(header_fields(entries, metadata)).encode()
    return with_header(header, b"".join(data for _, _, data in entries.values()))


def write(folder: Path, data: bytes) -> Path:
    """Write the bytes to a file in the folder, and return its path."""
    path = folder / "file.safetensors"
    path.write_bytes(data)
    return path
