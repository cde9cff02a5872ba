"""Tests prompt log-probabilities: they are the steered model's, for any division into chunks."""

import asyncio
from dataclasses import replace

import pytest
import torch

from server.engine.base import Edit, SamplingSettings, StepOutput
from server.engine.text.vocabulary import Vocabulary
from server.engine.torch.options import EngineOptions
from steering.settings import AffineSettings
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


@pytest.mark.parametrize("name", ["base", "a and r"])
async def test_a_prompt_can_be_scored_without_a_completion(
    start_engine: StartEngine, name: str
) -> None:
    engine = await start_engine(interventions_of())
    only_read = replace(SCORED, max_tokens=0)
    [output] = await generate(engine, PROMPTS[2], STACKS[name], sampling=only_read)
    assert_scores([output], PROMPTS[2], STACKS[name])
    assert (output.token_ids, output.text, output.finish_reason) == ((), "", "length")
    assert output.queue_seconds is not None


async def test_a_prompt_of_one_token_has_none(start_engine: StartEngine) -> None:
    engine = await start_engine({})
    for max_tokens in (0, 2):
        sampling = replace(SCORED, max_tokens=max_tokens)
        outputs = await generate(engine, b"x", sampling=sampling)
        assert outputs[0].prompt_logprobs == ()
        assert outputs[-1].finish_reason == "length"


async def test_whoever_does_not_ask_gets_none(start_engine: StartEngine) -> None:
    engine = await start_engine({})
    plain = SamplingSettings(2, temperature=0)
    scored, unscored = await asyncio.gather(
        generate(engine, PROMPTS[0], sampling=SCORED), generate(engine, PROMPTS[0], sampling=plain)
    )
    assert scored[0].prompt_logprobs
    assert not any(output.prompt_logprobs or output.logprobs for output in unscored)


async def test_an_edit_that_leaves_no_finite_logits_in_the_prompt_fails_its_own_request_only(
    start_engine: StartEngine,
) -> None:
    engine = await start_engine(interventions_of())
    overflow = (Edit("a", AffineSettings(3e38)),)
    lost, kept = await asyncio.gather(
        generate(engine, PROMPTS[0], overflow, sampling=replace(SCORED, max_tokens=0)),
        generate(engine, PROMPTS[0], sampling=SCORED),
        return_exceptions=True,
    )
    assert isinstance(lost, Exception)
    assert "weaker settings" in str(lost)
    assert isinstance(kept, list)
    assert_scores(kept, PROMPTS[0], ())


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
