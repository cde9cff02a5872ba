"""The route of one step: which slot and which settings each token and each logits row uses.

Computed once a step on the host; the hooks in the model only index the bank by it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from steering.grouped_refinement import tiles
from steering.settings import (
    AffineSettings,
    Positions,
    RewardSettings,
    SlottedEdit,
)


@dataclass(frozen=True, slots=True)
class Span:
    """One request's consecutive tokens in a step."""

    start: int  # of its first token, relative to the request's own prompt
    count: int
    prompt_length: int
    rows: range  # its logits rows in the step
    edits: tuple[SlottedEdit, ...]  # in the order in which they apply


@dataclass(frozen=True, slots=True, eq=False)
class AffineRoute:
    """Every token's stack of affine edits. Slot 0 is the identity."""

    places: tuple[int, ...]  # of the stacks, from 0; those at which no token is edited are left out
    slots: Tensor  # (places, tokens) int64
    strength: Tensor  # (places, tokens) float32
    used: frozenset[int] | None  # the slots in `slots` but 0; None: `slots` may come to hold any

    def to(self, device: torch.device) -> "AffineRoute":
        """The same on a device."""
        return replace(self, slots=self.slots.to(device), strength=self.strength.to(device))


class HeadRows(NamedTuple):
    """How many of a stage's rows a head edits, after the rows of the head before it."""

    slot: int
    rows: int
    most_iterations: int


@dataclass(frozen=True, slots=True, eq=False)
class RewardStage:
    """The k-th reward edit of those rows that have one: the rows of one head after another's."""

    depth: int  # k, from 0
    heads: tuple[HeadRows, ...]
    rows: Tensor  # (n,) int64
    slots: Tensor  # (n,) int32, of each row's head
    counts: Tensor  # (n,) int32: of rows that are computed together, see `tiles`
    direction_scale: Tensor  # (n, 1) float32
    step_sizes: Tensor  # (n, most iterations) float32: eta, and 0 where a row has done its own

    def to(self, device: torch.device) -> "RewardStage":
        """The same on a device."""
        return replace(
            self,
            rows=self.rows.to(device),
            slots=self.slots.to(device),
            counts=self.counts.to(device),
            direction_scale=self.direction_scale.to(device),
            step_sizes=self.step_sizes.to(device),
        )


@dataclass(frozen=True, slots=True)
class Route:
    """A step's edits, in the order in which they apply. Empty where nothing is steered."""

    affine: AffineRoute | None
    reward: tuple[RewardStage, ...]
    device: torch.device  # that the tensors are on
    _copies: dict[torch.device, "Route"] = field(default_factory=dict, compare=False)

    @property
    def edits(self) -> bool:
        """Whether anything is edited."""
        return self.affine is not None or bool(self.reward)

    def on(self, device: torch.device) -> "Route":
        """The route with its tensors on a device, copied there once a step.

        A model may be spread over several devices; each site reads the route where it is.
        """
        if device == self.device:
            return self
        if device not in self._copies:
            self._copies[device] = Route(
                None if self.affine is None else self.affine.to(device),
                tuple(stage.to(device) for stage in self.reward),
                device,
            )
        return self._copies[device]


_AffineEdit: TypeAlias = tuple[int, AffineSettings]
_RewardEdit: TypeAlias = tuple[int, RewardSettings]


def build_route(spans: Sequence[Span], device: torch.device) -> Route:
    """The route of a step whose tokens are those of `spans`, one span after the other."""
    affine = [_affine_edits(span) for span in spans]
    reward = [_reward_edits(span) for span in spans]
    reward_stages = (
        _reward_stage(spans, reward, depth, device)
        for depth in range(max(map(len, reward), default=0))
    )
    return Route(
        _affine_route(spans, affine, device),
        tuple(stage for stage in reward_stages if stage.heads),
        device,
    )


def _affine_edits(span: Span) -> list[_AffineEdit]:
    return [
        (edit.slot, edit.settings)
        for edit in span.edits
        if isinstance(edit.settings, AffineSettings)
    ]


def _reward_edits(span: Span) -> list[_RewardEdit]:
    return [
        (edit.slot, edit.settings)
        for edit in span.edits
        if isinstance(edit.settings, RewardSettings)
    ]


def _edited_tokens(span: Span, positions: Positions) -> range:
    """Which of the span's tokens an edit at `positions` acts on, as offsets into the span."""
    prompt_tokens = min(max(span.prompt_length - span.start, 0), span.count)
    match positions:
        case "all":
            return range(span.count)
        case "prompt":
            return range(prompt_tokens)
        case "generated":
            return range(prompt_tokens, span.count)


def _affine_route(
    spans: Sequence[Span], edits: Sequence[Sequence[_AffineEdit]], device: torch.device
) -> AffineRoute | None:
    """None where no token is edited."""
    places: list[int] = []
    slots: list[list[int]] = []
    strength: list[list[float]] = []
    for place in range(max(map(len, edits), default=0)):
        own_slots, own_strength = _affine_place(spans, edits, place)
        if any(own_slots):
            places.append(place)
            slots.append(own_slots)
            strength.append(own_strength)
    if not places:
        return None
    return AffineRoute(
        places=tuple(places),
        slots=torch.tensor(slots, device=device),
        strength=torch.tensor(strength, dtype=torch.float32, device=device),
        used=frozenset[int]().union(*slots) - {0},
    )


def _affine_place(
    spans: Sequence[Span], edits: Sequence[Sequence[_AffineEdit]], place: int
) -> tuple[list[int], list[float]]:
    """Each token's slot and strength at one place of the stacks."""
    tokens = sum(span.count for span in spans)
    slots = [0] * tokens
    strength = [0.0] * tokens
    first = 0
    for span, stack in zip(spans, edits, strict=True):
        if place < len(stack):
            slot, settings = stack[place]
            edited = _edited_tokens(span, settings.positions)
            where = slice(first + edited.start, first + edited.stop)
            slots[where] = [slot] * len(edited)
            strength[where] = [settings.strength] * len(edited)
        first += span.count
    return slots, strength


def _reward_stage(
    spans: Sequence[Span],
    edits: Sequence[Sequence[_RewardEdit]],
    depth: int,
    device: torch.device,
) -> RewardStage:
    by_slot: dict[int, list[tuple[int, RewardSettings]]] = {}
    for span, stack in zip(spans, edits, strict=True):
        if depth < len(stack) and span.rows:
            slot, settings = stack[depth]
            by_slot.setdefault(slot, []).extend((row, settings) for row in span.rows)
    rows = [each for own in by_slot.values() for each in own]
    most = max((settings.iterations for _, settings in rows), default=0)
    steps = [[settings.direction_scale, *_step_sizes(settings, most)] for _, settings in rows]
    table = torch.tensor(steps, dtype=torch.float32, device=device).view(len(rows), 1 + most)
    slots, counts = tiles([(slot, len(own)) for slot, own in by_slot.items()])
    return RewardStage(
        depth=depth,
        heads=tuple(
            HeadRows(slot, len(own), max(settings.iterations for _, settings in own))
            for slot, own in by_slot.items()
        ),
        rows=torch.tensor([row for row, _ in rows], dtype=torch.int64, device=device),
        slots=torch.tensor(slots, dtype=torch.int32, device=device),
        counts=torch.tensor(counts, dtype=torch.int32, device=device),
        direction_scale=table[:, :1],
        step_sizes=table[:, 1:],
    )


def _step_sizes(settings: RewardSettings, most: int) -> list[float]:
    """Of `most` iterations, some of which are not the row's."""
    return [settings.eta] * settings.iterations + [0.0] * (most - settings.iterations)
