"""What a request changes in its logits before it draws: logit bias and penalties."""

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from server.engine.base import Request, SamplingSettings
from server.engine.torch.transfer import send


def changes_logits(settings: SamplingSettings) -> bool:
    """Whether a request has a bias or a penalty that is not neutral."""
    return bool(
        settings.logit_bias
        or settings.repetition_penalty != 1
        or settings.presence_penalty
        or settings.frequency_penalty
    )


class Penalties:
    """The tokens whose logits one request changes, and how: parallel lists, a place a token."""

    def __init__(self, request: Request) -> None:
        self._settings = request.sampling
        self._places: dict[int, int] = {}
        self._counts: list[int] = []  # in the completion
        self.tokens: list[int] = []
        self.bias: list[float] = []
        self.repetition: list[float] = []  # divides positive logits, multiplies negative ones
        self.subtracted: list[float] = []
        for token, bias in request.sampling.logit_bias:
            self.bias[self._place(token)] += bias
        if self._settings.repetition_penalty != 1:  # prompts can be long, and this is every step
            for token in request.prompt:
                self.repetition[self._place(token)] = self._settings.repetition_penalty

    def push(self, token: int) -> None:
        """The completion has one more token."""
        settings, place = self._settings, self._place(token)
        self._counts[place] += 1
        self.repetition[place] = settings.repetition_penalty
        self.subtracted[place] = (
            settings.presence_penalty + settings.frequency_penalty * self._counts[place]
        )

    def _place(self, token: int) -> int:
        if token not in self._places:
            self._places[token] = len(self.tokens)
            self.tokens.append(token)
            self._counts.append(0)
            self.bias.append(0.0)
            self.repetition.append(1.0)
            self.subtracted.append(0.0)
        return self._places[token]


def penalize(logits: Tensor, rows: Sequence[Penalties | None]) -> Tensor:
    """The logits to draw from, each row with its own changes, in float32's range.

    Presence and frequency penalties are OpenAI's, over the completion; the repetition penalty is
    that of CTRL (Keskar et al. 2019, section 4.1), over prompt and completion.

    Args:
        logits: (rows, vocabulary) float32.
        rows: None where a row's logits stay as they are.
    """
    changed = {
        row: penalties
        for row, penalties in enumerate(rows)
        if penalties is not None and penalties.tokens
    }
    if not changed:
        return logits

    def joined(parts: Sequence[Sequence[float]]) -> Tensor:
        return send(list(chain.from_iterable(parts)), logits.device)

    every = list(changed.values())
    place = (
        joined([[row] * len(penalties.tokens) for row, penalties in changed.items()]),
        joined([penalties.tokens for penalties in every]),
    )
    repetition = joined([penalties.repetition for penalties in every])
    values = logits[place] + joined([penalties.bias for penalties in every])
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= joined([penalties.subtracted for penalties in every])
    largest = torch.finfo(logits.dtype).max
    return logits.index_put(place, values.clamp(-largest, largest))
