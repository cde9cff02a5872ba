"""Names and checks the tensors of an affine artifact.

A site is named "<module path>" (the module's output) or "<module path>.input". Site X has

    sites.X.weight       (d,)    sites.X.bias         (d,)    its map
    sites.X.low          (d,)    sites.X.high         (d,)    a support, or neither
    sites.X.gate.weight  (d,)    sites.X.gate.bias    ()      a gate, or neither

A module may be named "gate" too, such as the router of a mixture of experts. `sites.X.gate.weight`
and `sites.X.gate.bias` could then be a map at the output of module X.gate. If the bias has shape
(), they are a gate of X, otherwise a map at X.gate. An artifact cannot hold both.
"""

import re
from collections.abc import Collection, Mapping
from typing import Final, TypeAlias

from torch import Tensor

from interventions.header import ArtifactError
from steering.affine import AffineParameters
from steering.sites import locate_site

Shape: TypeAlias = tuple[int, ...]
_Parts: TypeAlias = Mapping[str, Shape]  # "weight", "bias", "low" or "high" -> shape

_PATTERN: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*")
_MAX_LENGTH: Final = 300
_PREFIX: Final = "sites."
_GATE: Final = ".gate"
_PARTS: Final = ("weight", "bias", "low", "high")
_PARTNERS: Final = (("weight", "bias"), ("bias", "weight"), ("low", "high"), ("high", "low"))


def site_tensors(maps: AffineParameters) -> dict[str, Tensor]:
    """Return the tensors to store for maps, by name.

    Raises:
        ArtifactError: a gate and another site's map would have one name, or a tensor has a wrong
            shape.
    """
    tensors: dict[str, Tensor] = {}
    for site, map_ in maps.items():
        shape = tuple(map_.weight.shape)
        named = (map_.weight, map_.bias, map_.low, map_.high)
        for part, tensor in zip(_PARTS, named, strict=True):
            if tensor is not None:
                _add(tensors, _name(site, part), tensor, shape)
        if map_.gate is not None:
            _add(tensors, _name(site + _GATE, "weight"), map_.gate.weight, shape)
            _add(tensors, _name(site + _GATE, "bias"), map_.gate.bias, ())
    return tensors


def _add(tensors: dict[str, Tensor], name: str, tensor: Tensor, shape: Shape) -> None:
    if name in tensors:
        raise ArtifactError(
            f'The tensor "{name}" would be both of a gate and of a map at another site; an '
            "artifact can hold only one of them."
        )
    if tuple(tensor.shape) != shape:
        raise ArtifactError(
            f'The tensor "{name}" has shape {shape_text(tuple(tensor.shape))}; expected '
            f"{shape_text(shape)}."
        )
    tensors[name] = tensor


def site_widths(shapes: Mapping[str, Shape], max_sites: int) -> dict[str, int]:
    """Check that the tensors are the maps of some sites; return the width of each site.

    Raises:
        ArtifactError: a tensor is missing, unknown, ambiguous or of a wrong shape; a site's name is
            not valid; a module's input and output are both edited; or there are too many sites.
    """
    # A stem is a tensor's name without its last part: a site, or a site and ".gate".
    stems: dict[str, dict[str, Shape]] = {}
    for name, shape in shapes.items():
        stem, part = _split(name)
        stems.setdefault(stem, {})[part] = shape
    if not stems:
        raise ArtifactError("The artifact holds no site.")
    gates = {stem: parts for stem, parts in sorted(stems.items()) if _is_gate(stem, parts)}
    maps = {stem: parts for stem, parts in sorted(stems.items()) if stem not in gates}
    if len(maps) > max_sites:
        raise ArtifactError(
            f"The artifact holds {len(maps)} sites; the limit is {max_sites}. The tensor "
            f'"{_name(list(maps)[max_sites], "weight")}" is beyond it.'
        )
    for stem, parts in stems.items():
        _check_pairs(stem, parts)
    for site, parts in maps.items():
        _check_map(site, parts)
    for stem, parts in gates.items():
        _check_gate(stem, parts, maps)
    _check_places(maps)
    return {site: parts["weight"][0] for site, parts in maps.items()}


def gate_owner(site: str) -> str | None:
    """Return X if the site is X.gate, whose map has the tensor names of a gate of X; else None."""
    return site.removesuffix(_GATE) if site.endswith(_GATE) else None


def _is_gate(stem: str, parts: _Parts) -> bool:
    return gate_owner(stem) is not None and parts.get("bias") == ()


def _split(name: str) -> tuple[str, str]:
    stem, _, part = name.removeprefix(_PREFIX).rpartition(".")
    if not name.startswith(_PREFIX) or part not in _PARTS:
        raise ArtifactError(f"An affine artifact has no tensor called {name[:300]!r}.")
    if len(stem) > _MAX_LENGTH or not _PATTERN.fullmatch(stem):
        raise ArtifactError(f"The site {stem[:300]!r} is not the path of a module.")
    if not locate_site(stem).module:
        raise ArtifactError(
            f'The tensor "{name}" names no module: the site of an input is called '
            '"<module path>.input".'
        )
    return stem, part


def _check_pairs(stem: str, parts: _Parts) -> None:
    """Check that weight and bias come together, and low and high."""
    for first, second in _PARTNERS:
        if first in parts and second not in parts:
            raise ArtifactError(
                f'The tensor "{_name(stem, first)}" has no "{_name(stem, second)}" beside it.'
            )


def _check_map(site: str, parts: _Parts) -> None:
    if "weight" not in parts:
        raise ArtifactError(
            f'The tensor "{_name(site, "low")}" has no "{_name(site, "weight")}" beside it.'
        )
    shape = parts["weight"]
    if len(shape) != 1 or shape[0] == 0:
        raise ArtifactError(
            f'The tensor "{_name(site, "weight")}" has shape {shape_text(shape)}; expected one '
            "dimension."
        )
    for part, other in parts.items():
        if other != shape:
            owner = gate_owner(site)
            asked = f', or () for a gate of site "{owner}"' if owner and part == "bias" else ""
            raise ArtifactError(
                f'The tensor "{_name(site, part)}" has shape {shape_text(other)}; expected '
                f'{shape_text(shape)}, as "{_name(site, "weight")}"{asked}.'
            )


def _check_gate(stem: str, parts: _Parts, maps: Mapping[str, _Parts]) -> None:
    owner, weight = stem.removesuffix(_GATE), _name(stem, "weight")
    for part in ("low", "high"):
        if part in parts:
            raise ArtifactError(
                f'The tensor "{_name(stem, part)}" belongs to a map at site "{stem}", but the '
                f'shape () of "{_name(stem, "bias")}" makes that a gate of site "{owner}".'
            )
    if owner not in maps:
        raise ArtifactError(
            f'The tensor "{weight}" is of a gate (its bias has shape ()), but site "{owner}" has '
            "no map."
        )
    expected = maps[owner]["weight"]
    if parts["weight"] != expected:
        raise ArtifactError(
            f'The tensor "{weight}" has shape {shape_text(parts["weight"])}; expected '
            f'{shape_text(expected)}, as "{_name(owner, "weight")}", which it scales.'
        )


def _check_places(sites: Collection[str]) -> None:
    """Check that the artifact edits at most one of a module's input and output."""
    for site in sites:
        module, is_input = locate_site(site)
        # A site of the module's name is its output, unless the module itself is named "input".
        if is_input and module in sites and not locate_site(module).is_input:
            raise ArtifactError(
                f'The tensor "{_name(site, "weight")}" edits the input of module "{module}", whose '
                f'output "{_name(module, "weight")}" edits; an artifact edits one of them.'
            )


def _name(stem: str, part: str) -> str:
    return f"{_PREFIX}{stem}.{part}"


def shape_text(shape: Shape) -> str:
    """Return a shape as error messages write it."""
    return f"({', '.join(map(str, shape))})"
