"""Tracks how a request changes its logits: logit bias and penalties. Imports no torch."""

from collections import Counter
from typing import NamedTuple

from server.engine.request import Request, SamplingSettings


def changes_logits(settings: SamplingSettings) -> bool:
    """Return whether a request has a logit bias or a penalty that is not neutral."""
    return bool(
        settings.logit_bias
        or settings.repetition_penalty != 1
        or settings.presence_penalty
        or settings.frequency_penalty
    )


class PenaltyEntry(NamedTuple):
    """Says how one token's logit changes."""

    token: int
    bias: float  # added
    repetition: float  # divides positive logits, multiplies negative ones
    subtracted: float  # presence and frequency penalties together


class Penalties:
    """Counts the tokens that one request has drawn, and numbers those whose logits it changes.

    Presence and frequency penalties are OpenAI's, over the completion; the repetition penalty is
    that of CTRL (Keskar et al. 2019, section 4.1), over prompt and completion.
    """

    def __init__(self, request: Request) -> None:
        self._settings = settings = request.sampling
        self._bias: dict[int, float] = {}
        self._counts: Counter[int] = Counter()  # in the completion
        self._places: dict[int, int] = {}
        # The entries, by place, that changed since they were last sent to the device. An entry is
        # complete by itself, so sending one twice does no harm.
        self.unsent: dict[int, PenaltyEntry] = {}
        for token, bias in settings.logit_bias:
            self._bias[token] = self._bias.get(token, 0.0) + bias
        for token in self._bias:
            self._change(token, repetition=1.0, subtracted=0.0)
        if settings.repetition_penalty != 1:  # without it, a long prompt needs no entries
            for token in dict.fromkeys(request.prompt):
                self._change(token, settings.repetition_penalty, subtracted=0.0)

    @property
    def entry_count(self) -> int:
        """The number of tokens that have a place. Places count from 0 and are never given up."""
        return len(self._places)

    def push(self, token: int) -> None:
        """Count one more token of the completion."""
        settings = self._settings
        self._counts[token] += 1
        subtracted = settings.presence_penalty + settings.frequency_penalty * self._counts[token]
        self._change(token, settings.repetition_penalty, subtracted)

    def _change(self, token: int, repetition: float, subtracted: float) -> None:
        place = self._places.setdefault(token, len(self._places))
        self.unsent[place] = PenaltyEntry(token, self._bias.get(token, 0.0), repetition, subtracted)
