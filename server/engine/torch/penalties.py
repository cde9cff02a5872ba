"""What a request changes in its logits before it draws: logit bias and penalties."""

from collections.abc import Sequence

import torch
from torch import Tensor

from server.engine.base import Request, SamplingSettings


def changes_logits(settings: SamplingSettings) -> bool:
    """Whether a request has a bias or a penalty that is not neutral."""
    return bool(
        settings.logit_bias
        or settings.repetition_penalty != 1
        or settings.presence_penalty
        or settings.frequency_penalty
    )


class Penalties:
    """One request's bias and penalties, and the tokens that they depend on."""

    def __init__(self, request: Request, vocabulary: int, device: torch.device) -> None:
        settings = request.sampling
        self.settings = settings
        self.bias = torch.zeros(vocabulary, device=device)
        for token, bias in settings.logit_bias:
            self.bias[token] = bias
        # Of the completion's tokens, how often; of the prompt's and the completion's, whether.
        self.counts = torch.zeros(vocabulary, device=device)
        self.seen = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        self.seen[torch.tensor(request.prompt, device=device)] = True

    def push(self, token: int) -> None:
        """The completion has one more token."""
        self.counts[token] += 1
        self.seen[token] = True


def penalize(logits: Tensor, rows: Sequence[Penalties]) -> Tensor:
    """The logits to draw from, each row with its own settings.

    Presence and frequency penalties are OpenAI's, over the completion; the repetition penalty is
    that of CTRL (Keskar et al. 2019, section 4.1), over prompt and completion.

    Args:
        logits: (rows, vocabulary) float32.

    Returns:
        The same shape, newly made.
    """

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device)[:, None]

    settings = [row.settings for row in rows]
    logits = logits + torch.stack([row.bias for row in rows])
    repetition = column([each.repetition_penalty for each in settings])
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(torch.stack([row.seen for row in rows]), repeated, logits)
    counts = torch.stack([row.counts for row in rows])
    logits -= column([each.frequency_penalty for each in settings]) * counts
    logits -= column([each.presence_penalty for each in settings]) * (counts > 0)
    return logits
