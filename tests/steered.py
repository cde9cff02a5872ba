"""Requests with all kinds of steering for the tiny models, and the oracle's results for them.

The oracle runs Hugging Face's model on one request at a time, with slow reference edits.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache

import pytest

from server.engine.output import StepOutput
from server.engine.request import Edit, Request, SamplingSettings
from server.engine.torch.engine import TorchEngine
from server.engine.torch.loaded_interventions import Parameters
from server.engine.torch.scheduling.sequence import Sequence as EngineSequence
from steering.settings import AffineSettings, RewardSettings
from tests.oracles import Oracle, Stack
from tests.tiny import (
    family_sites,
    head_outputs_width,
    head_width,
    random_head,
    random_maps,
    tiny_model,
)

NEW_TOKENS = 16
GREEDY = SamplingSettings(NEW_TOKENS, temperature=0, ignore_eos=True, logprobs=3)
ATTENTION = {
    "gpt2": "transformer.h.1.attn",
    "opt": "model.decoder.layers.1.self_attn",
    "opt-350m": "model.decoder.layers.1.self_attn",
}
PROJECTION = {"gpt2": "c_proj", "opt": "out_proj", "opt-350m": "out_proj"}


@cache
def interventions_of(family: str = "llama") -> Mapping[str, Parameters]:
    """Return interventions by digest: maps at the family's sites, and heads before its lm_head."""
    sites, width = family_sites(family), head_width(family)
    attention = ATTENTION.get(family, "model.layers.1.self_attn")
    projection = PROJECTION.get(family, "o_proj")
    return {
        "a": random_maps(1, sites=sites),
        "b": random_maps(2, sites=sites[1:]),
        "supported": random_maps(3, sites=sites, support=True),
        "attention": random_maps(4, sites=(attention,)),
        "gated": random_maps(7, sites=sites, gate=True),
        "gated and supported": random_maps(8, sites=sites[:1], support=True, gate=True),
        "inputs": {
            **random_maps(9, head_outputs_width(family), (f"{attention}.{projection}.input",)),
            **random_maps(10, sites=(f"{sites[0]}.input",), gate=True),
        },
        "r": random_head(5, width),
        "wide": random_head(6, width, units=40),
    }


PROMPTS = (
    b"hello world, how are you?",
    b"x",
    b"The quick brown fox jumps over the lazy dog, then it sleeps. " * 2,
    b"What is this, and why",
)
STACKS: Mapping[str, tuple[Edit, ...]] = {
    "base": (),
    "a": (Edit("a", AffineSettings(1.0)),),
    "a at another strength": (Edit("a", AffineSettings(0.4)),),
    "a at a negative strength": (Edit("a", AffineSettings(-0.5)),),
    "b": (Edit("b", AffineSettings(0.8)),),
    "a on the prompt": (Edit("a", AffineSettings(0.9, "prompt")),),
    "a on what is generated": (Edit("a", AffineSettings(0.9, "generated")),),
    "a support": (Edit("supported", AffineSettings(1.0)),),
    # An attention module returns a tuple, whose first element is edited.
    "a tuple's first place": (Edit("attention", AffineSettings(1.0)),),
    "gated": (Edit("gated", AffineSettings(1.0)),),
    "gated and supported": (Edit("gated and supported", AffineSettings(0.9)),),
    "inputs": (Edit("inputs", AffineSettings(0.8)),),
    "r": (Edit("r", RewardSettings(0.5, 5)),),
    "r with other settings": (Edit("r", RewardSettings(0.2, 2, 0.5)),),
    "r, its direction only": (Edit("r", RewardSettings(0.5, 0)),),
    "wide": (Edit("wide", RewardSettings(0.4, 3)),),
    "a then b": (Edit("a", AffineSettings(0.5)), Edit("b", AffineSettings(0.5))),
    "b then a": (Edit("b", AffineSettings(0.5)), Edit("a", AffineSettings(0.5))),
    "a then gated": (Edit("a", AffineSettings(0.5)), Edit("gated", AffineSettings(0.7))),
    "a and r": (Edit("a", AffineSettings(0.6)), Edit("r", RewardSettings(0.5, 5))),
    "four": (
        Edit("r", RewardSettings(0.3, 1)),
        Edit("b", AffineSettings(0.3, "generated")),
        Edit("wide", RewardSettings(0.3, 2)),
        Edit("supported", AffineSettings(0.7)),
    ),
}


async def generate(
    engine: TorchEngine,
    prompt: list[int] | bytes,
    edits: tuple[Edit, ...] = (),
    delay: float = 0,
    sampling: SamplingSettings = GREEDY,
) -> list[StepOutput]:
    await asyncio.sleep(delay)
    (generation,) = await engine.submit([Request("test", tuple(prompt), sampling, edits)])
    return [output async for output in generation]


def tokens_of(outputs: list[StepOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def logprobs_of(outputs: list[StepOutput]) -> list[float]:
    return [token.chosen.logprob for output in outputs for token in output.logprobs]


def stack_of(family: str, edits: Sequence[Edit]) -> Stack:
    """Return the edits in the form that the oracle takes."""
    return [(interventions_of(family)[edit.digest], edit.settings) for edit in edits]


@cache
def oracle_of(family: str) -> Oracle:
    """The oracle of a family's tiny model.

    The model is made of torch's global random numbers: nothing else may draw from them meanwhile.
    """
    return Oracle(tiny_model(family))


def assert_equal_to_oracle(
    outputs: list[StepOutput],
    family: str,
    prompt: list[int] | bytes,
    edits: tuple[Edit, ...],
    new_tokens: int = NEW_TOKENS,
) -> None:
    """Each token is the oracle's greedy one, or nearly ties with it, and as probable."""
    assert_equal_to_stack(outputs, family, prompt, stack_of(family, edits), new_tokens)


def assert_equal_to_stack(
    outputs: list[StepOutput],
    family: str,
    prompt: list[int] | bytes,
    stack: Stack,
    new_tokens: int = NEW_TOKENS,
) -> None:
    """The same with a stack as the oracle takes it."""
    assert_greedy(outputs, oracle_of(family), prompt, stack, new_tokens)


def assert_greedy(
    outputs: list[StepOutput],
    oracle: Oracle,
    prompt: Sequence[int],
    stack: Stack,
    new_tokens: int = NEW_TOKENS,
) -> None:
    """The same with an oracle.

    It reads the whole text once: the logits after a token do not depend on later tokens.
    """
    tokens = tokens_of(outputs)
    assert len(tokens) == new_tokens
    text = [*prompt, *tokens[:-1]]
    logits = oracle.logits(text, len(prompt), stack, last=new_tokens)
    for place, (token, logprob, row) in enumerate(
        zip(tokens, logprobs_of(outputs), logits, strict=True)
    ):
        assert float(row.max() - row[token]) <= 1e-4, f"token {place}"
        assert logprob == pytest.approx(float(row.log_softmax(-1)[token]), abs=1e-3)


def preemptions(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> list[EngineSequence]:
    """Return a list to which each sequence preempted from now on is added, as a copy."""
    scheduler = engine._core.scheduler
    yielded: list[EngineSequence] = []
    preempt = scheduler._preempt_youngest.__func__  # type: ignore[attr-defined]

    def recording(self: object) -> EngineSequence:
        sequence: EngineSequence = preempt(self)
        yielded.append(replace(sequence, tokens=list(sequence.tokens)))
        return sequence

    monkeypatch.setattr(type(scheduler), "_preempt_youngest", recording)
    return yielded
