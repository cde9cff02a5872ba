"""How many texts are scored at once."""

import math
from typing import Final

MAX_TEXTS: Final = 64
# Whoever asks for a score waits for the batch before as well.
TARGET_SECONDS: Final = 1.0
_GROWTH: Final = 8  # one measurement may be wrong by far
_DOUBT: Final = 0.9


class BatchSize:
    """The size of batches that take TARGET_SECONDS, learned from how long batches have taken.

    A batch takes some time for itself, such as a request's way to another machine, and some for
    each text. Only the texts' part is held to the target: smaller batches would not spare the
    other.
    """

    def __init__(self) -> None:
        self.size = 1
        """Texts of the next batch, at most."""
        self._one = math.inf  # seconds that a batch of one text takes
        self._more: float | None = None  # seconds that each further text adds; None: not known

    def took(self, texts: int, seconds: float) -> None:
        """A batch of `texts` texts took so long, by the wall's clock."""
        if texts > 1:
            self._one = min(self._one, seconds)  # no longer than this one
            self._more = (seconds - self._one) / (texts - 1)
        elif self._more is None:
            self._one = seconds
            self.size = 2  # a second text tells what a text adds
            return
        else:
            self._one = seconds
            # A large batch, and so a slow one, is tried again in the end.
            doubt = _DOUBT if self.size == 1 else 1.0
            self._more = min(doubt * self._more, seconds)
        fitting = TARGET_SECONDS / self._more if self._more > 0 else math.inf
        self.size = max(1, int(min(fitting, _GROWTH * texts, MAX_TEXTS)))

    def failed(self, texts: int) -> None:
        """A batch was not scored: it may have been too large for a limit of the scorer's."""
        if texts > 1:
            self.size = texts // 2
