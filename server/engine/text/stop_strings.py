"""Finds the strings that end a completion."""

from collections.abc import Iterator, Sequence
from itertools import compress


class StopStrings:
    """Finds the first stop string in a model's text, and holds back text that may become one.

    The text includes the names of special tokens, which are not shown. A stop string may contain
    them, or match the text without them.
    """

    def __init__(self, stop: Sequence[str], *, include: bool = False) -> None:
        """With `include`, the stop string that is found is shown too."""
        self._stop = tuple(stop)
        self._include = include
        self._longest = max(map(len, self._stop), default=0)
        self._held_back = ""
        self._shown: list[bool] = []  # for each character of `_held_back`, whether it may be shown
        self.found = False  # once true, no more text will come

    def push(self, text: str, *, shown: bool) -> str:
        """Add text, and return the text to be shown that no stop string can include any more."""
        if not self._stop:
            return text if shown else ""
        self._held_back += text
        self._shown += [shown] * len(text)
        places = [*range(len(self._held_back))]
        readings = [(self._held_back, places)]
        if not all(self._shown):
            visible = list(compress(places, self._shown))
            readings.append(("".join(self._held_back[place] for place in visible), visible))
        found = [
            (places[start], places[end - 1] + 1)
            for read, places in readings
            for start, end in self._find(read)
        ]
        if found:
            self.found = True
            start, end = min(found)
            return self._release(end if self._include else start)
        kept = [places[-keep] for read, places in readings if (keep := self._overlap(read))]
        return self._release(min(kept, default=len(self._held_back)))

    def finish(self) -> str:
        """Return the text to be shown that was held back. Call it when no more text comes."""
        return "" if self.found else self._release(len(self._held_back))

    def _find(self, text: str) -> Iterator[tuple[int, int]]:
        """Yield where each stop string first begins and ends, if it is there."""
        for stop in self._stop:
            if (start := text.find(stop)) >= 0:
                yield start, start + len(stop)

    def _overlap(self, text: str) -> int:
        """Return the length of the longest end of the text that begins a stop string."""
        # Each length is tried for all stop strings at once, longest first. The caller releases the
        # text before the end that matches, so that each character is examined about once, however
        # long text is held back.
        for length in range(min(len(text), self._longest - 1), 0, -1):
            end = text[-length:]
            if any(len(stop) > length and stop.startswith(end) for stop in self._stop):
                return length
        return 0

    def _release(self, end: int) -> str:
        text = "".join(compress(self._held_back[:end], self._shown))
        self._held_back = self._held_back[end:]
        del self._shown[:end]
        return text
