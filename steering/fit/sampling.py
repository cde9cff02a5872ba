"""Draws the sentences that a fit uses."""

from collections.abc import Sequence

import torch

from steering.fit import FitError
from steering.fit.activations import TokenIds


def draw(
    sentences: Sequence[TokenIds],
    samples: int,
    random: torch.Generator,
    side: str,
    setting: str,
) -> list[TokenIds]:
    """Return `samples` different sentences in random order.

    Args:
        sentences: token ids of at least `samples` sentences.
        samples: how many.
        random: what they are drawn with.
        side: "source" or "target", for the message.
        setting: the name of the setting that `samples` comes from, for the message.

    Raises:
        FitError: there are too few.
    """
    if len(sentences) < samples:
        raise FitError(
            f"{samples} samples were asked for, the {side} has {len(sentences)}: add sentences, or "
            f"set {setting} to {len(sentences)}"
        )
    rows = torch.randperm(len(sentences), generator=random)[:samples]
    return [sentences[row] for row in rows.tolist()]
