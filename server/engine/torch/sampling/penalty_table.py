"""The penalties of all sequences on the device, where a step changes its logits by them."""

from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Final, NamedTuple

import torch
from torch import Tensor

from server.engine.torch.model.transfer import stage
from server.engine.torch.sampling.penalties import Entry, Penalties

_LEAST: Final = 64  # places


class _Segment(NamedTuple):
    """Where in the table a sequence's places are."""

    start: int
    size: int

    @property
    def end(self) -> int:
        return self.start + self.size


class PenaltyTable:
    """Keeps each sequence's entries on the device from its first draw to its end.

    A sequence has a segment of one long table, so that a long prompt takes memory for itself and
    not for its neighbours too. A segment that has become too small is copied to the end; when the
    table is full, those in use are packed into a new one.

    Nothing waits for the device, and the host's work in a step is in proportion to the sequences
    and to what has changed of them, not to the tokens that they have seen.

    Used from one thread, on one stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # A row a place: the token, and float32s by their bits, in the order of `Entry`.
        self._entries = torch.zeros(_LEAST, 4, dtype=torch.int32, device=device)
        self._end = 0  # of what was given out
        self._segments: dict[Penalties, _Segment] = {}

    def penalize(self, logits: Tensor, rows: Sequence[Penalties | None]) -> Tensor:
        """The logits to draw from, each row with its own changes, in float32's range.

        What is unsent of the rows' penalties is sent. A call that fails has lost none of it.

        Args:
            logits: (rows, vocabulary) float32, on the table's device.
            rows: None where a row's logits stay as they are; otherwise no two are the same.

        Returns:
            (rows, vocabulary) float32: a copy, or `logits` where no row changes anything.
        """
        changed = {
            row: penalties
            for row, penalties in enumerate(rows)
            if penalties is not None and penalties.places
        }
        if not changed:
            return logits
        for penalties in changed.values():
            self._make_room(penalties)
        spans, counts = self._send(changed)
        total = sum(penalties.places for penalties in changed.values())
        # Given the size, torch does not wait for the device to tell it.
        row, shift = spans.repeat_interleave(counts, dim=0, output_size=total).unbind(dim=1)
        entries = self._entries[torch.arange(total, device=self._device) + shift]
        place = (row, entries[:, 0].long())
        return logits.index_put(place, _changed(logits[place], entries[:, 1:].view(torch.float32)))

    def free(self, penalties: Penalties) -> None:
        """Give up a sequence's segment. Harmless where it has none."""
        self._segments.pop(penalties, None)

    def check(self, living: Collection[Penalties]) -> None:
        """Assert that segments are of living sequences, and that nothing of these is lost."""
        assert self._segments.keys() <= set(living), "penalties of a sequence that has ended"
        bounds = [*sorted(self._segments.values()), _Segment(self._end, 0)]
        apart = all(one.end <= other.start for one, other in pairwise(bounds))
        assert apart, "penalties of two sequences in one place"
        assert self._end <= len(self._entries), "more places were given out than there are"
        for penalties in living:
            sent = penalties.places - len(penalties.unsent)
            room = self._segments.get(penalties, _Segment(0, 0)).size
            assert sent <= room, "penalties that are neither sent nor to be sent"

    def _send(self, changed: Mapping[int, Penalties]) -> tuple[Tensor, Tensor]:
        """Bring the table up to date, and where the rows' entries are to the device: one copy.

        Returns:
            (n, 2) int64, of each row that changes: its number, and the start of its segment less
            the places of the rows before it. (n,) int64: its places.
        """
        owners = list(changed.values())
        starts = [self._segments[penalties].start for penalties in owners]
        counts = [penalties.places for penalties in owners]
        before = accumulate(counts, initial=0)
        shifts = [start - first for start, first in zip(starts, before, strict=False)]
        unsent = {
            start + place: entry
            for start, penalties in zip(starts, owners, strict=True)
            for place, entry in penalties.unsent.items()
        }
        spans, lengths, places, entries = stage(
            [
                torch.tensor(list(zip(changed, shifts, strict=True))),
                torch.tensor(counts),
                torch.tensor(list(unsent), dtype=torch.int64),
                _packed(unsent.values()),
            ],
            self._device,
        )
        if unsent:
            self._entries.index_put_((places,), entries)
        for penalties in owners:
            penalties.unsent.clear()
        return spans, lengths

    def _make_room(self, penalties: Penalties) -> None:
        """See to it that a sequence's segment has all of its places."""
        if penalties in self._segments and penalties.places <= self._segments[penalties].size:
            return
        size = max(_LEAST, _with_spare(penalties.places))
        if self._end + size > len(self._entries):
            self._pack(size)
        new = _Segment(self._end, size)
        self._end = new.end
        if (old := self._segments.get(penalties)) is not None:
            self._entries[new.start : new.start + old.size] = self._entries[old.start : old.end]
        self._segments[penalties] = new

    def _pack(self, more: int) -> None:
        """Copy the segments in use, one after the other, into a table with room for more."""
        sizes = [segment.size for segment in self._segments.values()]
        used = sum(sizes)
        kept = [self._entries[segment.start : segment.end] for segment in self._segments.values()]
        self._entries = torch.cat(
            [*kept, self._entries.new_zeros(_with_spare(used + more) - used, 4)]
        )
        self._end = used
        starts = accumulate(sizes, initial=0)
        self._segments = dict(zip(self._segments, map(_Segment, starts, sizes), strict=True))


def _with_spare(places: int) -> int:
    """Half as much again, so that what grows place by place is copied seldom."""
    return places + places // 2


def _packed(entries: Collection[Entry]) -> Tensor:
    """The table's form of entries: (n, 4) int32, on the CPU."""
    tokens = torch.tensor([entry.token for entry in entries], dtype=torch.int32)
    numbers = torch.tensor([entry[1:] for entry in entries], dtype=torch.float32).view(-1, 3)
    return torch.cat((tokens[:, None], numbers.view(torch.int32)), dim=1)


def _changed(values: Tensor, numbers: Tensor) -> Tensor:
    """Logits with their bias and penalties.

    Args:
        values: (n,) float32.
        numbers: (n, 3) float32, of each: bias, repetition and what is subtracted, as in `Entry`.
    """
    bias, repetition, subtracted = numbers.unbind(dim=1)
    values = values + bias
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= subtracted
    largest = torch.finfo(values.dtype).max
    return values.clamp(-largest, largest)
