"""Tests prompt log-probabilities: they are the steered model's, for any division into chunks."""

import asyncio
from dataclasses import replace

import pytest
import torch

from server.engine.output import StepOutput
from server.engine.request import Edit
from server.engine.text.vocabulary import Vocabulary
from server.engine.torch.options import EngineOptions
from tests.conftest import StartEngine
from tests.oracles import Oracle
from tests.steered import (
    GREEDY,
    PROMPTS,
    STACKS,
    generate,
    interventions_of,
    stack_of,
    tokens_of,
)
from tests.tiny import tiny_model, tiny_tokenizer

TEXTS = Vocabulary(tiny_tokenizer().backend_tokenizer)
SCORED = replace(GREEDY, max_tokens=3, prompt_logprobs=2)


def assert_scores(outputs: list[StepOutput], prompt: bytes, edits: tuple[Edit, ...]) -> None:
    """Assert that each prompt token but the first has the oracle's log-probability and top 2."""
    oracle = Oracle(tiny_model("llama"))
    logits = oracle.logits(prompt, len(prompt), stack_of("llama", edits))
    expected = logits.log_softmax(-1)
    found = outputs[0].prompt_logprobs
    assert len(found) == len(prompt) - 1
    for place, token in enumerate(found):
        row = expected[place]
        assert token.chosen.text == TEXTS.with_logprob(prompt[place + 1], 0).text
        assert token.chosen.logprob == pytest.approx(float(row[prompt[place + 1]]), abs=1e-3)
        best = row.topk(3).values
        if torch.diff(best).abs().min() > 1e-3:
            assert [other.logprob for other in token.top] == pytest.approx(
                best[:2].tolist(), abs=1e-3
            )


@pytest.mark.parametrize("budget", [4, 7, 64])
async def test_each_stack_scores_prompts_as_the_oracle_does(
    start_engine: StartEngine, budget: int
) -> None:
    """The requests run in one batch; their prompts differ in length and are cut into chunks."""
    options = EngineOptions(
        kv_cache_gb=0.02, max_batch_size=4, max_batch_tokens=budget, check_invariants=True
    )
    engine = await start_engine(interventions_of(), options=options)
    cases = [
        (PROMPTS[number % len(PROMPTS)], edits) for number, edits in enumerate(STACKS.values())
    ]
    answers = await asyncio.gather(
        *(generate(engine, prompt, edits, sampling=SCORED) for prompt, edits in cases)
    )
    for outputs, (prompt, edits) in zip(answers, cases, strict=True):
        assert_scores(outputs, prompt, edits)
        assert sum(len(output.token_ids) for output in outputs) == 3
        assert not any(output.prompt_logprobs for output in outputs[1:])


@pytest.mark.parametrize("budget", [4, 64])
@pytest.mark.parametrize("first", [1, 2, 17, 30, 121, 122, 200])
async def test_scores_may_begin_later_in_the_prompt(
    start_engine: StartEngine, budget: int, first: int
) -> None:
    """The scores equal those of the whole prompt, though its beginning is read from the cache."""
    options = EngineOptions(
        kv_cache_gb=0.02, max_batch_size=4, max_batch_tokens=budget, check_invariants=True
    )
    engine = await start_engine(interventions_of(), options=options)
    whole = await generate(engine, PROMPTS[2], STACKS["a"], sampling=SCORED)
    assert len(whole[0].prompt_logprobs) == 121
    prefixes = engine._core.store.prefixes
    found = prefixes.hits
    later = replace(SCORED, prompt_logprobs_from=first)
    outputs = await generate(engine, PROMPTS[2], STACKS["a"], sampling=later)
    expected = whole[0].prompt_logprobs[first - 1 :]
    for one, other in zip(outputs[0].prompt_logprobs, expected, strict=True):
        assert one.chosen.text == other.chosen.text
        assert one.chosen.logprob == pytest.approx(other.chosen.logprob, abs=1e-4)
    assert tokens_of(outputs) == tokens_of(whole)
    read = min(first - 1, 121) // 16 * 16
    assert prefixes.hits - found == read
