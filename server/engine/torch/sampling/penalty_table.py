"""Keeps the penalties of all sequences on the device, and applies them to a step's logits."""

from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Final, NamedTuple

import torch
from torch import Tensor

from server.engine.torch.model.transfer import to_device
from server.engine.torch.sampling.penalties import Penalties, PenaltyEntry

_LEAST: Final = 64  # places of the first table, and of the smallest segment


class _Segment(NamedTuple):
    """A sequence's consecutive rows in the table."""

    start: int
    size: int

    @property
    def end(self) -> int:
        return self.start + self.size


class PenaltyTable:
    """Keeps each sequence's entries on the device from its first draw to its end.

    A sequence has a segment of one long table, so that a long prompt takes memory for itself and
    not for its neighbours too. A segment that has become too small is copied to the end; when the
    table is full, the segments in use are packed into a new one.

    Nothing waits for the device. The host's work in a step is in proportion to the number of
    sequences and of their changed entries, not to the number of tokens that they have seen.

    Used from one thread, on one stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # One row for each place: the token, then the bits of `PenaltyEntry`'s three float32s.
        self._entries = torch.zeros(_LEAST, 4, dtype=torch.int32, device=device)
        self._end = 0  # the first row that was not given to a segment yet
        self._segments: dict[Penalties, _Segment] = {}

    def penalize(self, logits: Tensor, rows: Sequence[Penalties | None]) -> Tensor:
        """Return the logits to draw from: each row with its own changes, within float32's range.

        The rows' unsent entries are sent to the device. If the call fails, none of them is lost.

        Args:
            logits: (rows, vocabulary) float32, on the table's device.
            rows: each row's penalties, all different; None for a row that stays as it is.

        Returns:
            (rows, vocabulary) float32: a copy, or `logits` itself if no row changes.
        """
        changed = {
            row: penalties
            for row, penalties in enumerate(rows)
            if penalties is not None and penalties.entry_count
        }
        if not changed:
            return logits
        for penalties in changed.values():
            self._make_room(penalties)
        spans, counts = self._send(changed)
        total = sum(penalties.entry_count for penalties in changed.values())
        # Without `output_size`, torch would wait for the device to compute it.
        row, shift = spans.repeat_interleave(counts, dim=0, output_size=total).unbind(dim=1)
        entries = self._entries[torch.arange(total, device=self._device) + shift]
        place = (row, entries[:, 0].long())
        return logits.index_put(place, _changed(logits[place], entries[:, 1:].view(torch.float32)))

    def free(self, penalties: Penalties) -> None:
        """Free a sequence's segment. Harmless if it has none."""
        self._segments.pop(penalties, None)

    def check(self, living: Collection[Penalties]) -> None:
        """Assert that all segments belong to living sequences, and that no entry is lost."""
        assert self._segments.keys() <= set(living), "penalties of a sequence that has ended"
        bounds = [*sorted(self._segments.values()), _Segment(self._end, 0)]
        apart = all(one.end <= other.start for one, other in pairwise(bounds))
        assert apart, "penalties of two sequences in one place"
        assert self._end <= len(self._entries), "more places were given out than there are"
        for penalties in living:
            sent = penalties.entry_count - len(penalties.unsent)
            room = self._segments.get(penalties, _Segment(0, 0)).size
            assert sent <= room, "penalties that are neither sent nor to be sent"

    def _send(self, changed: Mapping[int, Penalties]) -> tuple[Tensor, Tensor]:
        """Send the unsent entries, and the rows' segments, to the device in one copy.

        Returns:
            (n, 2) int64, for each row that changes: its index, and the start of its segment minus
            the number of places of the rows before it. (n,) int64: the number of its places.
        """
        owners = list(changed.values())
        starts = [self._segments[penalties].start for penalties in owners]
        counts = [penalties.entry_count for penalties in owners]
        before = accumulate(counts, initial=0)
        shifts = [start - first for start, first in zip(starts, before, strict=False)]
        unsent = {
            start + place: entry
            for start, penalties in zip(starts, owners, strict=True)
            for place, entry in penalties.unsent.items()
        }
        spans, lengths, places, entries = to_device(
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
        """Make sure that a sequence's segment holds all its places."""
        if penalties in self._segments and penalties.entry_count <= self._segments[penalties].size:
            return
        size = max(_LEAST, _with_spare(penalties.entry_count))
        if self._end + size > len(self._entries):
            self._pack(size)
        new = _Segment(self._end, size)
        self._end = new.end
        if (old := self._segments.get(penalties)) is not None:
            self._entries[new.start : new.start + old.size] = self._entries[old.start : old.end]
        self._segments[penalties] = new

    def _pack(self, more: int) -> None:
        """Copy the segments in use into a new table, with room for `more` places after them."""
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
    """Return half as many places again, so that segments that grow are rarely copied."""
    return places + places // 2


def _packed(entries: Collection[PenaltyEntry]) -> Tensor:
    """Return entries as rows of the table: (n, 4) int32, on the CPU."""
    tokens = torch.tensor([entry.token for entry in entries], dtype=torch.int32)
    numbers = torch.tensor([entry[1:] for entry in entries], dtype=torch.float32).view(-1, 3)
    return torch.cat((tokens[:, None], numbers.view(torch.int32)), dim=1)


def _changed(values: Tensor, numbers: Tensor) -> Tensor:
    """Return logits with their bias and penalties.

    Args:
        values: (n,) float32.
        numbers: (n, 3) float32, for each logit: bias, repetition and subtracted of `PenaltyEntry`.
    """
    bias, repetition, subtracted = numbers.unbind(dim=1)
    values = values + bias
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= subtracted
    largest = torch.finfo(values.dtype).max
    return values.clamp(-largest, largest)
