"""Tests how outputs of vLLM become the protocol's, without vLLM."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from server.engine.errors import InvalidRequestError
from server.engine.output import TokenLogprobs
from server.engine.text.vocabulary import Vocabulary
from server.engine.vllm.answer import Answer
from tests.both_engines import request
from tests.steered import GREEDY, STACKS
from tests.tiny import EOS, tiny_tokenizer

VOCABULARY = Vocabulary(tiny_tokenizer().backend_tokenizer)
A, B, C, D = tiny_tokenizer().encode("abcd")


@dataclass
class Flat:
    """Stands in for vLLM's `FlatLogprobs`."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    start_indices: list[int] = field(default_factory=list)
    end_indices: list[int] = field(default_factory=list)

    def add(self, *position: tuple[int, float, int]) -> "Flat":
        self.start_indices.append(len(self.token_ids))
        for token, logprob, rank in position:
            self.token_ids.append(token)
            self.logprobs.append(logprob)
            self.ranks.append(rank)
        self.end_indices.append(len(self.token_ids))
        return self


def scores_of(tokens: list[int], logprobs: Flat) -> list[TokenLogprobs]:
    """Return what a greedy request that wants three alternatives is told."""
    answer = Answer(request(b"hello", STACKS["a"]), VOCABULARY, frozenset({EOS}))
    completion = SimpleNamespace(token_ids=tokens, finish_reason=None, logprobs=logprobs)
    output = SimpleNamespace(
        metrics=None,
        outputs=[completion],
        finished=False,
        prompt_logprobs=None,
        num_cached_tokens=0,
    )
    assert GREEDY.logprobs == 3
    return [each for step in answer.read(output) for each in step.logprobs]


def letters(scored: TokenLogprobs) -> tuple[str, str]:
    return scored.chosen.text, "".join(other.text for other in scored.top)


def test_the_likeliest_tokens_are_told_whatever_vllm_leaves_out() -> None:
    best = ((A, -0.5, 1), (B, -1.0, 2), (C, -2.0, 3))
    once = [best[1], best[0], best[2]]  # b was drawn, and is not repeated
    logprobs = (
        Flat()
        .add((B, -1.0, 2), *best)
        .add((D, -5.0, 4), *best)
        .add(*once)
        .add(*best)
        .add((D, -5.0, 9), *best)
    )
    found = scores_of([B, D, B, A, D], logprobs)
    assert [letters(each) for each in found] == [
        ("b", "abc"),
        ("d", "abc"),
        ("b", "abc"),
        ("a", "abc"),
        ("d", "abc"),
    ]
    assert [each.chosen.logprob for each in found] == [-1.0, -5.0, -1.0, -0.5, -5.0]


def test_a_score_that_is_no_number_fails_the_request() -> None:
    nothing = Flat().add((A, float("nan"), 1), (B, -1.0, 1), (C, -1.0, 2), (D, -1.0, 3))
    with pytest.raises(InvalidRequestError, match="weaker settings"):
        scores_of([A], nothing)
