"""How large a step's edits are beside what they edit: the dose, ‖edit‖ / ‖activation‖.

And how long they take, where that can be told.
"""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Final, TypeAlias

import torch
from torch import Tensor

from steering.route import Span
from steering.settings import AffineSettings, RewardSettings

LARGEST: Final = 1e6

# The kind of an edit, and its place among those of its kind in a stack.
_Place: TypeAlias = tuple[type[AffineSettings] | type[RewardSettings], int]


@dataclass(slots=True, eq=False)
class _Sums:
    """Of each token, or of each row of logits: its doses added up, and how many they were."""

    doses: Tensor  # (n,) float32
    edits: Tensor  # (n,) float32


class DoseMeter:
    """Learns in one forward pass how large the edits were, without waiting for the device."""

    def __init__(self, tokens: int, rows: int) -> None:
        """`tokens` and `rows` of logits are those of the whole step."""
        self._tokens = tokens
        self._rows = rows
        self._sums: dict[_Place, _Sums] = {}
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

    def affine(self, depth: int, before: Tensor, after: Tensor, acts: Tensor) -> None:
        """Take in one site's edits at one place of the stacks.

        Args:
            before, after: (tokens, d) float32.
            acts: (tokens,) bool, which of the tokens have a map there.
        """
        with self._measuring():
            self.add_affine(
                depth, torch.where(acts, relative_change(before, after), 0), acts.float()
            )

    def add_affine(self, depth: int, doses: Tensor, edits: Tensor) -> None:
        """Take in sums over some sites, at one place of the stacks.

        Args:
            doses, edits: (tokens,) float32, of each token: its doses added up, and how many.
        """
        sums = self._at((AffineSettings, depth), self._tokens, doses.device)
        sums.doses += doses
        sums.edits += edits

    def affine_sums(self) -> dict[int, tuple[Tensor, Tensor]]:
        """What `add_affine` takes, of each place of the stacks that was edited."""
        return {
            depth: (sums.doses, sums.edits)
            for (kind, depth), sums in self._sums.items()
            if kind is AffineSettings
        }

    def reward(self, depth: int, before: Tensor, after: Tensor, rows: Tensor) -> None:
        """Take in the rows' reward edits at one place of their stacks.

        Args:
            before, after: (n, d) float32.
            rows: (n,) int64, which of the step's rows they are.
        """
        with self._measuring():
            sums = self._at((RewardSettings, depth), self._rows, before.device)
            sums.doses[rows] += relative_change(before, after)
            sums.edits[rows] += 1

    def sums(self, device: torch.device) -> Tensor:
        """All that was learnt, on a device, to be copied to the host and read: (n,) float32."""
        tensors = [tensor for each in self._sums.values() for tensor in (each.doses, each.edits)]
        return torch.cat([tensor.to(device) for tensor in tensors] or [torch.empty(0)])

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
        return {
            place: (list(islice(rest, len(each.doses))), list(islice(rest, len(each.edits))))
            for place, each in self._sums.items()
        }

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.own_seconds += time.perf_counter() - began

    def _at(self, place: _Place, size: int, device: torch.device) -> _Sums:
        sums = self._sums.get(place)
        if sums is None:
            sums = _Sums(torch.zeros(size, device=device), torch.zeros(size, device=device))
        elif sums.doses.device != device:  # a model may be spread over several
            sums = _Sums(sums.doses.to(device), sums.edits.to(device))
        self._sums[place] = sums
        return sums


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
