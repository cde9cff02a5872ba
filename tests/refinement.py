"""Makes reward settings for rows: a hypothesis strategy, and tensors as in a step's route."""

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from steering.settings import RewardSettings

SETTINGS = st.builds(
    RewardSettings,
    eta=st.floats(0, 1),
    iterations=st.integers(0, 6),
    direction_scale=st.floats(0, 2),
)


def columns(settings: Sequence[RewardSettings]) -> tuple[Tensor, Tensor]:
    """Return direction scales, (n, 1), and step sizes, (n, most iterations): views of one table."""
    most = max(row.iterations for row in settings)
    etas = [[row.eta if step < row.iterations else 0.0 for step in range(most)] for row in settings]
    scales = [row.direction_scale for row in settings]
    table = torch.tensor([[scale, *own] for scale, own in zip(scales, etas, strict=True)])
    return table[:, :1], table[:, 1:]
