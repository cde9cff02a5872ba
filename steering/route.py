"""The route of one step: which slot and which settings each token and each logits row uses.

The host computes it once a step; the hooks in the model only index the bank by it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeAlias, TypeVar

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

    start: int  # the first token's position in the request, whose prompt begins at 0
    count: int  # tokens
    prompt_length: int
    rows: range  # its logits rows in the step
    edits: tuple[SlottedEdit, ...]  # in the order in which they apply


@dataclass(frozen=True, slots=True, eq=False)
class AffineRoute:
    """Each token's stack of affine edits. Slot 0 is the identity."""

    indices: tuple[int, ...]  # in the stacks, from 0, without those at which no token is edited
    slots: Tensor  # (len(indices), tokens) int64
    strength: Tensor  # (len(indices), tokens) float32
    # The slots in `slots`, without 0; None: `slots` may later hold any.
    used_slots: frozenset[int] | None


class HeadRows(NamedTuple):
    """A head's slot, and the number of consecutive rows of a stage that it edits."""

    slot: int
    row_count: int
    max_iterations: int  # the largest among these rows


@dataclass(frozen=True, slots=True, eq=False)
class RewardStage:
    """The k-th reward edit of every row that has one. Rows are grouped by head, as in `heads`."""

    index: int  # k, from 0
    heads: tuple[HeadRows, ...]
    rows: Tensor  # (n,) int64, indices among the step's logits rows
    slots: Tensor  # (n,) int32, the slot of each row's head
    tile_sizes: Tensor  # (n,) int32, the size of the tile that a row begins, or 0; see `tiles`
    direction_scale: Tensor  # (n, 1) float32
    step_sizes: Tensor  # (n, most iterations) float32, eta for each of a row's iterations, then 0


@dataclass(frozen=True, slots=True)
class Route:
    """A step's edits, in the order in which they apply: at sites, then before `lm_head`."""

    affine: AffineRoute | None
    reward: tuple[RewardStage, ...]
    device: torch.device  # of the tensors
    _copies: dict[torch.device, "Route"] = field(default_factory=dict, compare=False)

    @property
    def edits_anything(self) -> bool:
        """True if the step edits anything."""
        return self.affine is not None or bool(self.reward)

    def on(self, device: torch.device) -> "Route":
        """Return the route with its tensors on a device. Copies them there at most once.

        A model may be spread over several devices; each site reads the route on its own device.
        """
        if device == self.device:
            return self
        if device not in self._copies:
            copies = [each.to(device) for each in self.tensors()]
            self._copies[device] = self.with_tensors(copies, device)
        return self._copies[device]

    def tensors(self) -> list[Tensor]:
        """List the route's tensors."""
        tensors = [] if self.affine is None else [self.affine.slots, self.affine.strength]
        for stage in self.reward:
            tensors += [stage.rows, stage.slots, stage.tile_sizes]
            tensors += [stage.direction_scale, stage.step_sizes]
        return tensors

    def with_tensors(self, tensors: Sequence[Tensor], device: torch.device) -> "Route":
        """Return the route with other tensors on a device, in the order of `tensors()`."""
        rest = iter(tensors)
        affine = self.affine
        if affine is not None:
            affine = replace(affine, slots=next(rest), strength=next(rest))
        reward = tuple(
            replace(
                stage,
                rows=next(rest),
                slots=next(rest),
                tile_sizes=next(rest),
                direction_scale=next(rest),
                step_sizes=next(rest),
            )
            for stage in self.reward
        )
        return Route(affine, reward, device)


_AffineEdit: TypeAlias = tuple[int, AffineSettings]
_RewardEdit: TypeAlias = tuple[int, RewardSettings]
_Settings = TypeVar("_Settings", AffineSettings, RewardSettings)


def build_route(spans: Sequence[Span], device: torch.device) -> Route:
    """Build the route of a step whose tokens are those of `spans`, in order."""
    affine = [_edits_of(span, AffineSettings) for span in spans]
    reward = [_edits_of(span, RewardSettings) for span in spans]
    reward_stages = (
        _reward_stage(spans, reward, index, device)
        for index in range(max(map(len, reward), default=0))
    )
    return Route(
        _affine_route(spans, affine, device),
        tuple(stage for stage in reward_stages if stage.heads),
        device,
    )


def _edits_of(span: Span, kind: type[_Settings]) -> list[tuple[int, _Settings]]:
    """Return the slot and the settings of each of a span's edits of one kind."""
    return [(edit.slot, edit.settings) for edit in span.edits if isinstance(edit.settings, kind)]


def _edited_tokens(span: Span, positions: Positions) -> range:
    """Return the offsets in the span of the tokens that an edit at `positions` acts on."""
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
    """Build the affine part of a route; None if no token is edited."""
    indices: list[int] = []
    slots: list[list[int]] = []
    strength: list[list[float]] = []
    for index in range(max(map(len, edits), default=0)):
        own_slots, own_strength = _affine_edits_at(spans, edits, index)
        if any(own_slots):
            indices.append(index)
            slots.append(own_slots)
            strength.append(own_strength)
    if not indices:
        return None
    return AffineRoute(
        indices=tuple(indices),
        slots=torch.tensor(slots, device=device),
        strength=torch.tensor(strength, dtype=torch.float32, device=device),
        used_slots=frozenset[int]().union(*slots) - {0},
    )


def _affine_edits_at(
    spans: Sequence[Span], edits: Sequence[Sequence[_AffineEdit]], index: int
) -> tuple[list[int], list[float]]:
    """Return each token's slot and strength in its edit at one index of the stacks."""
    tokens = sum(span.count for span in spans)
    slots = [0] * tokens
    strength = [0.0] * tokens
    first = 0
    for span, stack in zip(spans, edits, strict=True):
        if index < len(stack):
            slot, settings = stack[index]
            edited = _edited_tokens(span, settings.positions)
            where = slice(first + edited.start, first + edited.stop)
            slots[where] = [slot] * len(edited)
            strength[where] = [settings.strength] * len(edited)
        first += span.count
    return slots, strength


def _reward_stage(
    spans: Sequence[Span],
    edits: Sequence[Sequence[_RewardEdit]],
    index: int,
    device: torch.device,
) -> RewardStage:
    by_slot: dict[int, list[tuple[int, RewardSettings]]] = {}
    for span, stack in zip(spans, edits, strict=True):
        if index < len(stack) and span.rows:
            slot, settings = stack[index]
            by_slot.setdefault(slot, []).extend((row, settings) for row in span.rows)
    rows = [each for own in by_slot.values() for each in own]
    most = max((settings.iterations for _, settings in rows), default=0)
    steps = [[settings.direction_scale, *_step_sizes(settings, most)] for _, settings in rows]
    table = torch.tensor(steps, dtype=torch.float32, device=device).view(len(rows), 1 + most)
    slots, tile_sizes = tiles([(slot, len(own)) for slot, own in by_slot.items()])
    return RewardStage(
        index=index,
        heads=tuple(
            HeadRows(slot, len(own), max(settings.iterations for _, settings in own))
            for slot, own in by_slot.items()
        ),
        rows=torch.tensor([row for row, _ in rows], dtype=torch.int64, device=device),
        slots=torch.tensor(slots, dtype=torch.int32, device=device),
        tile_sizes=torch.tensor(tile_sizes, dtype=torch.int32, device=device),
        direction_scale=table[:, :1],
        step_sizes=table[:, 1:],
    )


def _step_sizes(settings: RewardSettings, most: int) -> list[float]:
    """Return eta for each of the request's iterations, padded with zeros to `most` entries."""
    return [settings.eta] * settings.iterations + [0.0] * (most - settings.iterations)
