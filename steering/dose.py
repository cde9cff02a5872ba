"""Measures how large a step's edits are (the dose, ‖edit‖ / ‖activation‖) and how long they take.

Times are right only on devices that compute synchronously.
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

LARGEST: Final = 1e6  # the dose of a zero vector, and the cap of every other

# An edit's kind, and its index among the edits of this kind in its request's stack.
_Place: TypeAlias = tuple[type[AffineSettings] | type[RewardSettings], int]


class DoseMeter:
    """Adds up the doses of one forward pass's edits, without waiting for the device."""

    def __init__(self, tokens: int, rows: int) -> None:
        """Take the whole step's numbers of tokens and of logits rows."""
        self._tokens = tokens
        self._rows = rows
        self._places: tuple[int, ...] = ()  # in the stacks of affine edits
        # The sum of the doses, and their number: (2, places, tokens) float32.
        self._affine: dict[torch.device, Tensor] = {}
        self._reward: dict[int, Tensor] = {}  # place in the stacks -> (2, rows) float32, likewise
        # The time of the edits alone, and the time of measuring them. Both are right only on a
        # device that computes synchronously, as a CPU does.
        self.edit_seconds = 0.0
        self.own_seconds = 0.0

    @contextmanager
    def editing(self) -> Iterator[None]:
        """Add the block's duration to `edit_seconds`, less that of `measuring` blocks within it."""
        own, began = self.own_seconds, time.perf_counter()
        yield
        self.edit_seconds += time.perf_counter() - began - (self.own_seconds - own)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Add the block's duration to `own_seconds`."""
        began = time.perf_counter()
        yield
        self.own_seconds += time.perf_counter() - began

    def affine(self, places: tuple[int, ...], device: torch.device) -> Tensor:
        """Return the tensor to which `edit_stacks` adds the doses at all sites on a device.

        Args:
            places: the route's places in the stacks, the same for all sites of a step.
            device: the device of the sites' activations.

        Returns:
            (2, places, tokens) float32: the sum of the doses, and their number.
        """
        self._places = places
        if device not in self._affine:  # a model may be spread over several devices
            self._affine[device] = torch.zeros(2, len(places), self._tokens, device=device)
        return self._affine[device]

    def reward(self, place: int, before: Tensor, after: Tensor, rows: Tensor) -> None:
        """Add the doses of some rows' reward edits.

        Args:
            place: the place of these edits in their rows' stacks.
            before, after: (n, d) float32, the rows' hidden states before and after the edit.
            rows: (n,) int64, the rows' indices among the step's logits rows.
        """
        with self.measuring():
            sums = self._reward.setdefault(place, torch.zeros(2, self._rows, device=before.device))
            sums[0, rows] += relative_change(before, after)
            sums[1, rows] += 1

    def sums(self, device: torch.device) -> Tensor:
        """Return all sums and numbers of doses on a device, flattened for `read`: (n,) float32."""
        affine = [each.to(device) for each in self._affine.values()]
        total = [torch.stack(affine).sum(0).transpose(0, 1).flatten()] if affine else []
        rewards = [each.to(device).flatten() for each in self._reward.values()]
        return torch.cat([*total, *rewards, torch.empty(0, device=device)])

    def read(self, sums: Tensor, spans: Sequence[Span]) -> list[tuple[float | None, ...]]:
        """Return each span's doses, one for each of its edits.

        A dose is the mean over the span's edited tokens (or rows) and the edit's sites. It is None
        for an edit that acted on no token or row.

        Args:
            sums: the tensor from the method `sums`, copied to the host.
            spans: the step's spans.
        """
        by_place = self._divided(sums)
        found = []
        first = 0
        for span in spans:
            found.append(_doses_of(span, range(first, first + span.count), by_place))
            first += span.count
        return found

    def _divided(self, sums: Tensor) -> dict[_Place, tuple[list[float], list[float]]]:
        """Split the tensor from `sums`: place -> sums and numbers of all tokens (or rows)."""
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
    """Return each row's ‖after - before‖ / ‖before‖: (n, d) float32 twice -> (n,) float32."""
    doses: Tensor = (after - before).norm(dim=-1) / before.norm(dim=-1)
    # A zero vector has no dose, and a dose may overflow. Both become LARGEST, so that means stay
    # finite.
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
