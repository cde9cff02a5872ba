"""Pairs the texts that are about to say a harmful word with calm ones whose last state is near."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from benchmarks.bundled_data.cuts import Cut, CutText
from server.engine.torch.model.loader import LoadedModel
from steering.fit.activations import pad_right

_LIKELY: Final = 0.02  # a token of a higher probability is about to be said
_BATCH: Final = 32  # texts in a forward pass
_ROWS: Final = 512  # hidden states whose logits are in memory at a time


@dataclass(frozen=True, slots=True)
class Pair:
    """A cut before a token of a harmful word, and the calm cut whose last state is nearest."""

    about_to_swear: Cut
    calm: Cut


def pair_texts(
    loaded: LoadedModel, continued: Sequence[CutText], neutral: Sequence[CutText]
) -> list[Pair]:
    """Pair each cut before a harmful token that the model thinks likely with a calm cut.

    The next token of a calm cut is part of no harmful word, and the tokens that the model is about
    to say elsewhere have, all together, a probability below 2 % there. No text is in two pairs.

    Args:
        loaded: the model, in float32.
        continued: texts of the model's own.
        neutral: other texts that may be calm.
    """
    texts = [*continued, *neutral]
    states = _states(loaded, texts)
    cuts = {cut.text: cut for text in texts for cut in text.cuts}
    # A text may be the beginning of several; its state is the same in each.
    rows = {
        cut.text: state[cut.row]
        for text, state in zip(texts, states, strict=True)
        for cut in text.cuts
    }
    every = list(cuts.values())
    stacked = torch.stack([rows[cut.text] for cut in every])
    following = torch.tensor([cut.following for cut in every])
    harmful = torch.tensor([cut.harmful for cut in every])
    sources = harmful.nonzero()[:, 0]
    said = _following_probability(loaded.lm_head, stacked[sources], following[sources])
    sources = sources[said > _LIKELY]
    risk = _probability_of_any(loaded.lm_head, stacked, torch.unique(following[sources]))
    candidates = (~harmful & (risk < _LIKELY)).nonzero()[:, 0]
    nearest = match(stacked[sources], stacked[candidates])
    return [
        Pair(every[source], every[candidates[row]])
        for source, row in zip(sources.tolist(), nearest, strict=True)
        if row is not None
    ]


def match(sources: Tensor, candidates: Tensor) -> list[int | None]:
    """Return for each source the candidate of the highest cosine similarity, each used once.

    Args:
        sources: (n, d) floating.
        candidates: (m, d).

    Returns:
        Rows of `candidates`, in the order of the sources, the first of which choose first. None
        where none is left.
    """
    similarity = nn.functional.normalize(sources) @ nn.functional.normalize(candidates).T
    chosen: list[int | None] = []
    for row in similarity:
        best = int(row.argmax()) if len(row) else 0
        left = len(row) > 0 and row[best] > -math.inf
        chosen.append(best if left else None)
        if left:
            similarity[:, best] = -math.inf
    return chosen


@torch.no_grad()
def _states(loaded: LoadedModel, texts: Sequence[CutText]) -> list[Tensor]:
    """Return each text's hidden states after the final norm, (tokens, d) float32."""
    found: list[Tensor] = [torch.empty(0)] * len(texts)
    order = sorted(range(len(texts)), key=lambda row: len(texts[row].token_ids))
    for start in range(0, len(order), _BATCH):
        rows = order[start : start + _BATCH]
        batch = pad_right([texts[row].token_ids for row in rows], loaded.model.device)
        output = loaded.model.base_model(batch.input_ids, attention_mask=batch.attention_mask)
        for row, state in zip(rows, output.last_hidden_state, strict=True):
            found[row] = state[: len(texts[row].token_ids)].clone()
    return found


@torch.no_grad()
def _following_probability(lm_head: nn.Module, states: Tensor, following: Tensor) -> Tensor:
    """Return the probability of each state's own next token, (n,) float32."""
    probabilities = _probabilities(lm_head, states)
    tokens = torch.split(following, _ROWS)
    return torch.cat(
        [p.gather(1, ids[:, None])[:, 0] for p, ids in zip(probabilities, tokens, strict=True)]
    )


@torch.no_grad()
def _probability_of_any(lm_head: nn.Module, states: Tensor, tokens: Tensor) -> Tensor:
    """Return the probability that any of the tokens comes next, (n,) float32."""
    return torch.cat([each[:, tokens].sum(dim=-1) for each in _probabilities(lm_head, states)])


def _probabilities(lm_head: nn.Module, states: Tensor) -> Iterator[Tensor]:
    return (lm_head(rows).softmax(dim=-1) for rows in torch.split(states, _ROWS))
