"""Measures how large a step's edits are (the dose, ‖edit‖ / ‖activation‖) and how long they take.

Times are right only on devices that compute synchronously.
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Final, NamedTuple, TypeAlias

import torch
from torch import Tensor

from steering.route import Span
from steering.settings import AffineSettings, RewardSettings

MAX_DOSE: Final = 1e6  # the dose of a zero vector, and the cap of every other

# An edit's kind, and its index among the edits of this kind in its request's stack.
_EditIndex: TypeAlias = tuple[type[AffineSettings] | type[RewardSettings], int]


class DoseTotal(NamedTuple):
    """The doses of one edit of a request, at all tokens (or rows) and sites."""

    sum: float
    number: float  # of the doses

    @property
    def mean(self) -> float | None:
        """The mean dose, or None if the edit acted on nothing."""
        return self.sum / self.number if self.number else None

    def plus(self, other: "DoseTotal") -> "DoseTotal":
        """Return the total of both."""
        return DoseTotal(self.sum + other.sum, self.number + other.number)


class DoseMeter:
    """Adds up the doses of one forward pass's edits, without waiting for the device."""

    def __init__(self, tokens: int, rows: int) -> None:
        """Take the whole step's numbers of tokens and of logits rows."""
        self._tokens = tokens
        self._rows = rows
        self._indices: tuple[int, ...] = ()  # of affine edits in the stacks
        # The sum of the doses, and their number: (2, indices, tokens) float32.
        self._affine: dict[torch.device, Tensor] = {}
        self._reward: dict[int, Tensor] = {}  # index in the stacks -> (2, rows) float32, likewise
        # The time of the edits alone, and the time of measuring them. Both are right only on a
        # device that computes synchronously, as a CPU does.
        self.edit_seconds = 0.0
        self.measuring_seconds = 0.0

    @contextmanager
    def timing_edits(self) -> Iterator[None]:
        """Add the block's duration, less its `timing_measurements` blocks', to `edit_seconds`."""
        measured, began = self.measuring_seconds, time.perf_counter()
        yield
        self.edit_seconds += time.perf_counter() - began - (self.measuring_seconds - measured)

    @contextmanager
    def timing_measurements(self) -> Iterator[None]:
        """Add the block's duration to `measuring_seconds`."""
        began = time.perf_counter()
        yield
        self.measuring_seconds += time.perf_counter() - began

    def affine_doses(self, indices: tuple[int, ...], device: torch.device) -> Tensor:
        """Return the tensor to which `edit_stacks` adds the doses at all sites on a device.

        Args:
            indices: the route's `indices`, the same for all sites of a step.
            device: the device of the sites' activations.

        Returns:
            (2, indices, tokens) float32: the sum of the doses, and their number.
        """
        self._indices = indices
        if device not in self._affine:  # a model may be spread over several devices
            self._affine[device] = torch.zeros(2, len(indices), self._tokens, device=device)
        return self._affine[device]

    def add_reward_doses(self, index: int, before: Tensor, after: Tensor, rows: Tensor) -> None:
        """Add the doses of some rows' reward edits.

        Args:
            index: the index of these edits in their rows' stacks.
            before, after: (n, d) float32, the rows' hidden states before and after the edit.
            rows: (n,) int64, the rows' indices among the step's logits rows.
        """
        with self.timing_measurements():
            sums = self._reward.setdefault(index, torch.zeros(2, self._rows, device=before.device))
            sums[0, rows] += relative_change(before, after)
            sums[1, rows] += 1

    def sums(self, device: torch.device) -> Tensor:
        """Return all sums and numbers of doses on a device, flattened: (n,) float32."""
        affine = [each.to(device) for each in self._affine.values()]
        total = [torch.stack(affine).sum(0).transpose(0, 1).flatten()] if affine else []
        rewards = [each.to(device).flatten() for each in self._reward.values()]
        return torch.cat([*total, *rewards, torch.empty(0, device=device)])

    def doses_of(self, sums: Tensor, spans: Sequence[Span]) -> list[tuple[float | None, ...]]:
        """Return each span's doses, one for each of its edits.

        A dose is the mean over the span's edited tokens (or rows) and the edit's sites. It is None
        for an edit that acted on no token or row.

        Args:
            sums: the tensor from the method `sums`, copied to the host.
            spans: the step's spans.
        """
        return [tuple(total.mean for total in totals) for totals in self.totals_of(sums, spans)]

    def totals_of(self, sums: Tensor, spans: Sequence[Span]) -> list[tuple["DoseTotal", ...]]:
        """Return what the means of `doses_of`, which has the same arguments, are made of."""
        by_index = self._split(sums)
        found = []
        first = 0
        for span in spans:
            found.append(_totals_of(span, range(first, first + span.count), by_index))
            first += span.count
        return found

    def _split(self, sums: Tensor) -> dict[_EditIndex, tuple[list[float], list[float]]]:
        """Split the tensor from `sums`: edit index -> sums and numbers of all tokens (or rows)."""
        values: list[float] = sums.tolist()
        rest = iter(values)
        sizes: list[tuple[_EditIndex, int]] = [
            *(((AffineSettings, index), self._tokens) for index in self._indices),
            *(((RewardSettings, index), self._rows) for index in self._reward),
        ]
        return {
            index: (list(islice(rest, size)), list(islice(rest, size))) for index, size in sizes
        }


def relative_change(before: Tensor, after: Tensor) -> Tensor:
    """Return each row's ‖after - before‖ / ‖before‖: (n, d) float32 twice -> (n,) float32."""
    doses: Tensor = (after - before).norm(dim=-1) / before.norm(dim=-1)
    # A zero vector has no dose, and a dose may overflow. Both become LARGEST, so that means stay
    # finite.
    return doses.nan_to_num(nan=MAX_DOSE, posinf=MAX_DOSE).clamp(max=MAX_DOSE)


def _totals_of(
    span: Span, tokens: range, sums: Mapping[_EditIndex, tuple[Sequence[float], Sequence[float]]]
) -> tuple[DoseTotal, ...]:
    found: list[DoseTotal] = []
    seen: Counter[type[AffineSettings] | type[RewardSettings]] = Counter()
    for edit in span.edits:
        kind = type(edit.settings)
        totals, counts = sums.get((kind, seen[kind]), ((), ()))
        seen[kind] += 1
        places = tokens if kind is AffineSettings else span.rows
        own = slice(places.start, places.stop)
        found.append(DoseTotal(sum(totals[own]), sum(counts[own])))
    return tuple(found)
