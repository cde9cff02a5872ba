"""Defines what the service and the workers tell each other, in types that vLLM serialises safely.

At start, the service puts a `Layout` into vLLM's `additional_config`. With each request it sends a
`Steering` in the sampling parameters' `extra_args`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any, Final, Literal, TypeAlias, get_args

from steering.dose import DoseTotal
from steering.settings import AffineSettings, RewardSettings

KEY: Final = "steerserve"
# Part of the key under which vLLM stores compiled models. Raise it when the edits inside the model
# change, so that no model that was compiled with others is loaded.
_GRAPH_VERSION: Final = 2
MOST_EDITS: Final = 4  # in one request's stack

_KINDS: Final[Mapping[str, type[AffineSettings] | type[RewardSettings]]] = {
    "affine": AffineSettings,
    "reward": RewardSettings,
}
Runner: TypeAlias = Literal["v1", "v2"]  # which of vLLM's two model runners
Json: TypeAlias = Any  # what vLLM's msgpack carries: numbers, texts, lists, dicts, None


class WireError(ValueError):
    """A message is not one that this version of the service sends."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Says what every worker prepares before the model is traced. It cannot change later."""

    slots: int  # interventions that can be loaded at once; slot 0, the identity, not counted
    sites: tuple[str, ...]
    runner: Runner = "v1"

    def to_config(self) -> dict[str, Json]:
        """Return vLLM's `additional_config`, which vLLM hashes into the key of compiled models."""
        return {
            KEY: {
                "version": _GRAPH_VERSION,
                "slots": self.slots,
                "sites": list(self.sites),
                "runner": self.runner,
            }
        }

    @classmethod
    def from_config(cls, additional_config: Json) -> "Layout":
        """Read a layout from `additional_config`.

        Raises:
            WireError: there is none, or it is of another version.
        """
        match additional_config:
            case {"steerserve": {"version": version}} if version != _GRAPH_VERSION:
                raise WireError(f"the layout has version {version}, not {_GRAPH_VERSION}")
            case {
                "steerserve": {
                    "version": _,
                    "slots": int(slots),
                    "sites": list(sites),
                    "runner": runner,
                }
            } if runner in get_args(Runner):
                return cls(slots, tuple(sites), runner)
        raise WireError("vLLM was started without the layout of the sites: start it by steerserve")


@dataclass(frozen=True, slots=True)
class LoadedEdit:
    """One edit of a request: a slot, the digest of what it must hold, and the settings."""

    slot: int
    digest: str
    settings: AffineSettings | RewardSettings


@dataclass(frozen=True, slots=True)
class Steering:
    """Tells a worker what it must know of a request beside vLLM's own sampling parameters."""

    edits: tuple[LoadedEdit, ...] = ()  # in the order in which they apply
    seed: int | None = None  # fixes the request's draws
    name: str = ""  # by which the worker tells what it measured

    def to_extra_args(self) -> dict[str, Json]:
        """Return the sampling parameters' `extra_args`."""
        edits = [
            [edit.slot, edit.digest, _kind_of(edit.settings), *astuple(edit.settings)]
            for edit in self.edits
        ]
        return {KEY: {"edits": edits, "seed": self.seed, "name": self.name}}

    @classmethod
    def from_extra_args(cls, extra_args: Mapping[str, Json] | None) -> "Steering":
        """Read what a request asks for.

        Raises:
            WireError: it does not say whether it is steered. A request of the service always does.
        """
        match extra_args:
            case {
                "steerserve": {
                    "edits": list(edits),
                    "seed": int() | None as seed,
                    "name": str(name),
                }
            }:
                return cls(tuple(_edit(each) for each in edits), seed, name)
        raise WireError("a request does not say how it is steered")


@dataclass(slots=True)
class Measured:
    """Holds what a worker has measured of its edits since it was last asked."""

    step_seconds: float = 0.0  # of the measured steps; 0 where it cannot be measured
    edit_seconds: float = 0.0  # of the edits in them; likewise
    # Request -> for each of its edits, the doses at the worker's own sites.
    doses: dict[str, tuple[DoseTotal, ...]] = field(default_factory=dict)

    def add(self, other: "Measured") -> None:
        """Add what was measured in other steps, or by other workers at other sites."""
        self.step_seconds += other.step_seconds
        self.edit_seconds += other.edit_seconds
        for name, totals in other.doses.items():
            own = self.doses.get(name, (DoseTotal(0, 0),) * len(totals))
            self.doses[name] = tuple(a.plus(b) for a, b in zip(own, totals, strict=True))

    def to_message(self) -> list[Json]:
        """Return what a worker answers."""
        doses = {name: [list(each) for each in totals] for name, totals in self.doses.items()}
        return [self.step_seconds, self.edit_seconds, doses]

    @classmethod
    def from_message(cls, message: Sequence[Json]) -> "Measured":
        """Read a worker's answer."""
        step_seconds, edit_seconds, doses = message
        totals = {name: tuple(DoseTotal(*each) for each in edits) for name, edits in doses.items()}
        return cls(step_seconds, edit_seconds, totals)


def _kind_of(settings: AffineSettings | RewardSettings) -> str:
    return next(name for name, kind in _KINDS.items() if isinstance(settings, kind))


def _edit(stored: Sequence[Json]) -> LoadedEdit:
    slot, digest, kind, *settings = stored
    return LoadedEdit(slot, digest, _KINDS[kind](*settings))
