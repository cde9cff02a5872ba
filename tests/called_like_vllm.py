"""A model that is called as vLLM calls its own, for tests without vLLM."""

import torch
from torch import Tensor, nn

from tests.tiny import WIDTH

VOCABULARY = 50


class Pair(nn.Module):
    """A norm of vLLM's that is called with a residual returns both."""

    def forward(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return hidden + residual, residual


class LogitsProcessor(nn.Module):
    def forward(self, head: nn.Linear, hidden: Tensor) -> Tensor:
        logits: Tensor = head(hidden)
        return logits


class Model(nn.Module):
    """With a second rank, it would have the layer "away"."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(WIDTH)
        self.pair = Pair()
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.logits_processor = LogitsProcessor()

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.norm(hidden)
        hidden, _ = self.pair(hidden, hidden)
        return hidden

    def compute_logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.logits_processor(self.lm_head, hidden)
        return logits
