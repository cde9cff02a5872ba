"""Tests prompt log-probabilities on both engines: they are the steered model's, however chunked."""

import asyncio
from dataclasses import replace

import pytest
import torch

from server.engine.errors import InvalidRequestError
from server.engine.output import StepOutput
from server.engine.request import Edit, SamplingSettings
from server.engine.text.vocabulary import Vocabulary
from steering.settings import AffineSettings
from tests.both_engines import (
    BOTH_STACKS,
    CONTEXT,
    Subject,
    each_engine,
    each_setup,
    each_tight,
    request,
)
from tests.prefix_traffic import stack_of
from tests.steered import GREEDY, PROMPTS, STACKS, tokens_of
from tests.tiny import tiny_tokenizer

pytestmark = pytest.mark.asyncio(loop_scope="session")
TEXTS = Vocabulary(tiny_tokenizer().backend_tokenizer)
SCORED = replace(GREEDY, max_tokens=3, prompt_logprobs=2)
FULL = (PROMPTS[2] * 3)[:CONTEXT]


def assert_scores(
    subject: Subject, outputs: list[StepOutput], prompt: bytes, edits: tuple[Edit, ...]
) -> None:
    """Assert that each prompt token but the first has the oracle's log-probability and top 2."""
    expected = subject.oracle.logits(prompt, len(prompt), stack_of(edits)).log_softmax(-1)
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


@each_setup
async def test_each_stack_scores_prompts_as_the_oracle_does(subject: Subject) -> None:
    """The requests run in one batch; their prompts differ in length and are cut into chunks."""
    cases = [
        (PROMPTS[number % len(PROMPTS)], edits) for number, edits in enumerate(BOTH_STACKS.values())
    ]
    answers = await asyncio.gather(
        *(subject.answer(request(prompt, edits, SCORED)) for prompt, edits in cases)
    )
    for outputs, (prompt, edits) in zip(answers, cases, strict=True):
        assert_scores(subject, outputs, prompt, edits)
        assert len(tokens_of(outputs)) == 3
        assert not any(output.prompt_logprobs for output in outputs[1:])


@each_tight
@pytest.mark.parametrize("name", ["base", "a and r", "a on the prompt"])
async def test_scores_are_told_once_though_requests_are_preempted(
    subject: Subject, name: str
) -> None:
    before = subject.engine.stats().preemptions
    sampling = replace(GREEDY, max_tokens=64, prompt_logprobs=2)
    answers = await asyncio.gather(
        *(subject.answer(request(PROMPTS[0], STACKS[name], sampling)) for _ in range(8))
    )
    assert subject.engine.stats().preemptions > before
    for outputs in answers:
        assert_scores(subject, outputs, PROMPTS[0], STACKS[name])
        assert not any(output.prompt_logprobs for output in outputs[1:])


@each_engine
@pytest.mark.parametrize("name", ["base", "four", "a on what is generated"])
async def test_a_prompt_that_fills_the_context_is_scored_without_a_completion(
    subject: Subject, name: str
) -> None:
    only_read = SamplingSettings(0, prompt_logprobs=2)
    [output] = await subject.answer(request(FULL, STACKS[name], only_read))
    assert_scores(subject, [output], FULL, STACKS[name])
    assert (output.token_ids, output.text, output.finish_reason) == ((), "", "length")
    assert output.queue_seconds is not None


@each_engine
async def test_a_prompt_of_one_token_has_no_scores(subject: Subject) -> None:
    for max_tokens in (0, 2):
        outputs = await subject.answer(request(b"x", (), replace(SCORED, max_tokens=max_tokens)))
        assert outputs[0].prompt_logprobs == ()
        assert outputs[-1].finish_reason == "length"


@each_engine
async def test_whoever_does_not_ask_gets_no_scores(subject: Subject) -> None:
    plain = SamplingSettings(2, temperature=0)
    scored, unscored = await subject.generate(
        request(PROMPTS[0], sampling=SCORED), request(PROMPTS[0], sampling=plain)
    )
    assert scored[0].prompt_logprobs
    assert not any(output.prompt_logprobs or output.logprobs for output in unscored)


@each_engine
async def test_an_overflow_in_a_scored_prompt_fails_its_own_request_only(subject: Subject) -> None:
    overflow = (Edit("a", AffineSettings(3e38)),)
    lost, kept = await asyncio.gather(
        subject.answer(request(PROMPTS[0], overflow, replace(SCORED, max_tokens=0))),
        subject.answer(request(PROMPTS[0], sampling=SCORED)),
        return_exceptions=True,
    )
    assert isinstance(lost, InvalidRequestError)
    assert "weaker settings" in str(lost)
    assert isinstance(kept, list)
    assert_scores(subject, kept, PROMPTS[0], ())


@each_engine
@pytest.mark.parametrize("first", [1, 2, 17, 33, 64, 121, 122, 200])
async def test_scores_may_begin_later_in_the_prompt(subject: Subject, first: int) -> None:
    """The scores equal those of the whole prompt, also where its beginning is cached."""
    whole = await subject.answer(request(PROMPTS[2], STACKS["a"], SCORED))
    assert len(whole[0].prompt_logprobs) == len(PROMPTS[2]) - 1
    later = replace(SCORED, prompt_logprobs_from=first)
    outputs = await subject.answer(request(PROMPTS[2], STACKS["a"], later))
    expected = whole[0].prompt_logprobs[first - 1 :]
    for one, other in zip(outputs[0].prompt_logprobs, expected, strict=True):
        assert one.chosen.text == other.chosen.text
        assert one.chosen.logprob == pytest.approx(other.chosen.logprob, abs=1e-4)
    assert tokens_of(outputs) == tokens_of(whole)
