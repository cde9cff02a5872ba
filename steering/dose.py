"""How large a step's edits are beside what they edit: the dose, ‖edit‖ / ‖activation‖.

And how long they take, where that can be told.
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Final, TypeAlias

import torch
from torch import Tensor

from steering.route import Span
from steering.settings import AffineSettings, RewardSettings

LARGEST: Final = 1e6

# The kind of an edit, and its place among those of its kind in a stack.
_Place: TypeAlias = tuple[type[AffineSettings] | type[RewardSettings], int]


class DoseMeter:
    """Learns in one forward pass how large the edits were, without waiting for the device."""

    def __init__(self, tokens: int, rows: int) -> None:
        """`tokens` and `rows` of logits are those of the whole step."""
        self._tokens = tokens
        self._rows = rows
        self._places: tuple[int, ...] = ()  # of the stacks of affine edits
        # Doses added up, and how many they were: (2, places, tokens) float32.
        self._affine: dict[torch.device, Tensor] = {}
        self._reward: dict[int, Tensor] = {}  # by place of the stacks: (2, rows) float32
        # Of the edits without what measuring them took. Only true of a device that computes at
        # once, as a CPU does.
        self.edit_seconds = 0.0
        self.own_seconds = 0.0

    @contextmanager
    def editing(self) -> Iterator[None]:
        """The block edits; what is measured in it is not counted among its time."""
        own, began = self.own_seconds, time.perf_counter()
        yield
        self.edit_seconds += time.perf_counter() - began - (self.own_seconds - own)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """The block measures: its time is not the edits'."""
        began = time.perf_counter()
        yield
        self.own_seconds += time.perf_counter() - began

    def affine(self, places: tuple[int, ...], device: torch.device) -> Tensor:
        """What the sites on a device add their edits' doses to, as `edit_stacks` does.

        Args:
            places: of the stacks of affine edits, the same for all sites of a step.

        Returns:
            (2, places, tokens) float32: doses added up, and how many they are.
        """
        self._places = places
        if device not in self._affine:  # a model may be spread over several
            self._affine[device] = torch.zeros(2, len(places), self._tokens, device=device)
        return self._affine[device]

    def reward(self, place: int, before: Tensor, after: Tensor, rows: Tensor) -> None:
        """Take in the rows' reward edits at one place of their stacks.

        Args:
            before, after: (n, d) float32.
            rows: (n,) int64, which of the step's rows they are.
        """
        with self.measuring():
            sums = self._reward.setdefault(place, torch.zeros(2, self._rows, device=before.device))
            sums[0, rows] += relative_change(before, after)
            sums[1, rows] += 1

    def sums(self, device: torch.device) -> Tensor:
        """All that was learnt, on a device, to be copied to the host and read: (n,) float32."""
        affine = [each.to(device) for each in self._affine.values()]
        total = [torch.stack(affine).sum(0).transpose(0, 1).flatten()] if affine else []
        rewards = [each.to(device).flatten() for each in self._reward.values()]
        return torch.cat([*total, *rewards, torch.empty(0, device=device)])

    def read(self, sums: Tensor, spans: Sequence[Span]) -> list[tuple[float | None, ...]]:
        """Each span's doses, one for each of its edits.

        A dose is the mean over the span's edited tokens (or rows) and the edit's sites, and None
        where the edit acted on none of them.

        Args:
            sums: what `sums` gave, on the host.
        """
        by_place = self._divided(sums)
        found = []
        first = 0
        for span in spans:
            found.append(_doses_of(span, range(first, first + span.count), by_place))
            first += span.count
        return found

    def _divided(self, sums: Tensor) -> dict[_Place, tuple[list[float], list[float]]]:
        """What `sums` gave, by place: doses, and how many they were."""
        values: list[float] = sums.tolist()
        rest = iter(values)
        sizes: list[tuple[_Place, int]] = [
            *(((AffineSettings, place), self._tokens) for place in self._places),
            *(((RewardSettings, place), self._rows) for place in self._reward),
        ]
        return {
            place: (list(islice(rest, size)), list(islice(rest, size))) for place, size in sizes
        }


def relative_change(before: Tensor, after: Tensor) -> Tensor:
    """‖after - before‖ / ‖before‖ of each row: (n, d) float32 twice -> (n,) float32."""
    doses: Tensor = (after - before).norm(dim=-1) / before.norm(dim=-1)
    # Of a vector of zeros there is no dose, and one that overflows is as good as this large one: a
    # mean must stay a number.
    return doses.nan_to_num(nan=LARGEST, posinf=LARGEST).clamp(max=LARGEST)


def _doses_of(
    span: Span, tokens: range, sums: Mapping[_Place, tuple[Sequence[float], Sequence[float]]]
) -> tuple[float | None, ...]:
    doses: list[float | None] = []
    seen: Counter[type[AffineSettings] | type[RewardSettings]] = Counter()
    for edit in span.edits:
        kind = type(edit.settings)
        totals, counts = sums.get((kind, seen[kind]), ((), ()))
        seen[kind] += 1
        places = tokens if kind is AffineSettings else span.rows
        edits = sum(counts[place] for place in places) if counts else 0
        doses.append(sum(totals[place] for place in places) / edits if edits else None)
    return tuple(doses)
