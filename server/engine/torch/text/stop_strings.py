"""Strings that end a completion."""

from collections.abc import Sequence
from itertools import compress


class StopStrings:
    """Finds the first stop string in what a model emits, and holds back what may become one.

    Some of what is emitted is hidden: the names of special tokens. A stop string may have them in
    it, or stand in the text that is left when they are taken out.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._held = ""
        self._shown: list[bool] = []  # for each character of it
        self.found = False  # nothing more will come

    def push(self, text: str, *, shown: bool) -> str:
        """Take what was emitted next, and return the text to be shown that is certain now."""
        if not self._stop:
            return text if shown else ""
        self._held += text
        self._shown += [shown] * len(text)
        places = [*range(len(self._held))]
        readings = [(self._held, places)]
        if not all(self._shown):
            visible = list(compress(places, self._shown))
            readings.append(("".join(self._held[place] for place in visible), visible))
        found = [places[at] for read, places in readings if (at := self._find(read)) is not None]
        if found:
            self.found = True
            return self._release(min(found))
        kept = [places[-keep] for read, places in readings if (keep := self._overlap(read))]
        return self._release(min(kept, default=len(self._held)))

    def finish(self) -> str:
        """Return the text to be shown that was held back, when nothing more comes."""
        return "" if self.found else self._release(len(self._held))

    def _find(self, text: str) -> int | None:
        """Find where the first stop string begins, if there is one."""
        return min((at for stop in self._stop if (at := text.find(stop)) >= 0), default=None)

    def _overlap(self, text: str) -> int:
        """Measure the longest end of the text that is the beginning of a stop string."""
        # Of all stop strings at once: it ends at the longest, and all that is longer is released,
        # so that each character is looked at about once, however long the text is held back.
        for length in range(min(len(text), self._longest - 1), 0, -1):
            end = text[-length:]
            if any(len(stop) > length and stop.startswith(end) for stop in self._stop):
                return length
        return 0

    def _release(self, end: int) -> str:
        text = "".join(compress(self._held[:end], self._shown))
        self._held = self._held[end:]
        del self._shown[:end]
        return text
