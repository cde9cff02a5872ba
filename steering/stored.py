"""Reads an intervention's parameters from the tensors of an artifact, by the tensors' names.

A map at site X has the tensors

    sites.X.weight       (d,)    sites.X.bias         (d,)    its map
    sites.X.low          (d,)    sites.X.high         (d,)    a support, or neither
    sites.X.gate.weight  (d,)    sites.X.gate.bias    ()      a gate, or neither

A module may be called "gate" too (the router of a mixture of experts is): `sites.X.gate.weight` and
`sites.X.gate.bias` could be the map at the output of module X.gate. The bias decides: if its shape
is (), the two are a gate of X, otherwise a map at X.gate.
"""

from collections.abc import Iterator, Mapping
from typing import Final

from torch import Tensor

from steering.affine import AffineMap, AffineParameters, Gate
from steering.reward import RewardHead

HEAD_TENSORS: Final = (
    "head.0.weight",
    "head.0.bias",
    "head.2.weight",
    "head.2.bias",
    "direction",
    "positive_reward",
)
_PREFIX: Final = "sites."
_WEIGHT: Final = ".weight"
_GATE: Final = ".gate"


def parameters_of(tensors: Mapping[str, Tensor]) -> AffineParameters | RewardHead:
    """Return the parameters that an artifact's tensors hold.

    Args:
        tensors: name -> tensor, float32, of a checked artifact: names and shapes are the format's.
    """
    if "direction" in tensors:
        w1, b1, w2, b2, direction, positive_reward = (tensors[name] for name in HEAD_TENSORS)
        return RewardHead(w1, b1, w2.reshape(-1), b2.reshape(()), direction, positive_reward)
    return {site: _map(site, tensors) for site in _sites(tensors)}


def _sites(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    stems = (name for name in tensors if name.endswith(_WEIGHT))
    for stem in (name.removeprefix(_PREFIX).removesuffix(_WEIGHT) for name in stems):
        if not _is_gate(stem, tensors):
            yield stem


def _is_gate(stem: str, tensors: Mapping[str, Tensor]) -> bool:
    """Return whether a stem names a gate of a site, and not a site."""
    return stem.endswith(_GATE) and tensors[_name(stem, "bias")].dim() == 0


def _map(site: str, tensors: Mapping[str, Tensor]) -> AffineMap:
    gate = site + _GATE
    has_gate = _name(gate, "weight") in tensors and _is_gate(gate, tensors)
    return AffineMap(
        weight=tensors[_name(site, "weight")],
        bias=tensors[_name(site, "bias")],
        low=tensors.get(_name(site, "low")),
        high=tensors.get(_name(site, "high")),
        gate=Gate(tensors[_name(gate, "weight")], tensors[_name(gate, "bias")])
        if has_gate
        else None,
    )


def _name(stem: str, part: str) -> str:
    return f"{_PREFIX}{stem}.{part}"
