"""Chooses how many texts are scored at once."""

import math
from typing import Final

MAX_TEXTS: Final = 64
# The batch time to aim at, because an asked text waits for the running batch.
TARGET_SECONDS: Final = 1.0
_GROWTH: Final = 8  # largest growth of the size at once, because one measurement may be far off
_ESTIMATE_DECAY: Final = 0.9  # factor on the time that a text adds, after a batch of one


class BatchSize:
    """Learns the size of batches that take TARGET_SECONDS from the times of past batches.

    A batch takes a fixed time, such as the round trip to another machine, and a time for each text.
    Only the time for the texts is held to the target, because smaller batches would not save the
    fixed time.
    """

    def __init__(self) -> None:
        self.size = 1
        """The most texts of the next batch."""
        self._first_text_seconds = math.inf  # seconds that a batch of one text takes
        self._further_text_seconds: float | None = (
            None  # seconds that each further text adds; None: not known
        )

    def took(self, texts: int, seconds: float) -> None:
        """Learn from a batch of `texts` texts that took `seconds` of wall time."""
        if texts > 1:
            self._first_text_seconds = min(
                self._first_text_seconds, seconds
            )  # one text takes no longer
            self._further_text_seconds = (seconds - self._first_text_seconds) / (texts - 1)
        elif self._further_text_seconds is None:
            self._first_text_seconds = seconds
            self.size = 2  # to learn how long a second text takes
            return
        else:
            self._first_text_seconds = seconds
            # The estimate shrinks after each batch of one, so that larger ones are tried again.
            decay = _ESTIMATE_DECAY if self.size == 1 else 1.0
            self._further_text_seconds = min(decay * self._further_text_seconds, seconds)
        fitting = (
            TARGET_SECONDS / self._further_text_seconds
            if self._further_text_seconds > 0
            else math.inf
        )
        self.size = max(1, int(min(fitting, _GROWTH * texts, MAX_TEXTS)))

    def failed(self, texts: int) -> None:
        """Halve the size after a failed batch, which may have been too large for the scorer."""
        if texts > 1:
            self.size = texts // 2
