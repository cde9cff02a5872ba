"""Tests on both engines how tokens are drawn, scored and where an answer ends."""

import asyncio
import math
from dataclasses import replace

import pytest

from server.engine.request import SamplingSettings
from tests.both_engines import TIGHT, Subject, each_engine, each_setup, request
from tests.oracles import penalized
from tests.prefix_traffic import stack_of
from tests.steered import GREEDY, PROMPTS, STACKS, logprobs_of, tokens_of
from tests.tiny import EOS, VOCABULARY

pytestmark = pytest.mark.asyncio(loop_scope="session")
# Two prompts, one of several chunks, and stacks that take four slots together.
CASES = [
    (PROMPTS[number % 3], STACKS[name])
    for number, name in enumerate(("base", "a", "r", "a on the prompt", "a and r", "b") * 2)
]


@each_setup
async def test_a_seed_gives_the_same_whatever_else_runs(subject: Subject) -> None:
    """Also where a prompt is computed in chunks, and after a preemption."""

    def drawn(seed: int) -> SamplingSettings:
        return SamplingSettings(
            40,
            temperature=1.0,
            top_p=0.9,
            repetition_penalty=1.2,
            frequency_penalty=0.5,
            seed=seed,
            ignore_eos=True,
        )

    work = [request(*case, drawn(seed)) for seed, case in enumerate(CASES)]
    alone = [tokens_of(await subject.answer(each)) for each in work]
    before = subject.engine.stats().preemptions
    batch = await asyncio.gather(*(subject.answer(each) for each in work))
    assert [tokens_of(each) for each in batch] == alone
    if subject.setup in TIGHT:
        assert subject.engine.stats().preemptions > before
    others = await asyncio.gather(
        *(subject.answer(request(*case, drawn(seed + 100))) for seed, case in enumerate(CASES))
    )
    assert all(tokens_of(one) != two for one, two in zip(others, alone, strict=True))


@each_engine
async def test_requests_without_a_seed_differ(subject: Subject) -> None:
    sampling = SamplingSettings(20, temperature=1.5, ignore_eos=True)
    found = await subject.generate(*[request(PROMPTS[0], sampling=sampling)] * 4)
    assert len({tuple(tokens_of(each)) for each in found}) == 4


@each_engine
@pytest.mark.parametrize("stack", ["base", "four"])
async def test_log_probabilities_are_the_steered_models_and_without_bias(
    subject: Subject, stack: str
) -> None:
    """They are those before temperature, penalties and bias, of the likeliest tokens too."""
    sampling = SamplingSettings(
        6,
        temperature=0.7,
        seed=5,
        frequency_penalty=1.0,
        logit_bias=((65, 2.0),),
        ignore_eos=True,
        logprobs=20,
    )
    outputs = await subject.answer(request(PROMPTS[0], STACKS[stack], sampling))
    tokens = tokens_of(outputs)
    rows = subject.oracle.logits(
        [*PROMPTS[0], *tokens[:-1]], len(PROMPTS[0]), stack_of(STACKS[stack]), last=6
    ).double()
    exact = rows - rows.logsumexp(-1, keepdim=True)
    scored = [each for output in outputs for each in output.logprobs]
    for token, row, each in zip(tokens, exact, scored, strict=True):
        assert each.chosen.logprob == pytest.approx(float(row[token]), abs=1e-4)
        best = row.topk(20).values.tolist()
        assert [other.logprob for other in each.top] == pytest.approx(best, abs=1e-4)
        share = math.fsum(math.exp(other.logprob) for other in each.top)
        assert share == pytest.approx(math.fsum(map(math.exp, best)), abs=1e-5)


@each_engine
async def test_penalties_and_bias_are_the_references(subject: Subject) -> None:
    sampling = replace(
        GREEDY,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.7,
        logit_bias=((65, 3.0), (66, -5.0), (65, 1.0)),
    )
    for name in ("base", "a and r"):
        outputs = await subject.answer(request(PROMPTS[3], STACKS[name], sampling))
        tokens = tokens_of(outputs)
        rows = subject.oracle.logits(
            [*PROMPTS[3], *tokens[:-1]], len(PROMPTS[3]), stack_of(STACKS[name]), last=len(tokens)
        )
        for place, (token, row) in enumerate(zip(tokens, rows, strict=True)):
            changed = penalized(row, PROMPTS[3], tokens[:place], sampling)
            assert float(changed.max() - changed[token]) <= 1e-3, place


@each_engine
@pytest.mark.parametrize(
    "filters",
    [{"top_k": 1}, {"top_p": 0.0}, {"top_p": 1e-6}, {"min_p": 1.0}],
    ids=lambda filters: next(iter(filters)),
)
async def test_a_filter_that_leaves_one_token_is_greedy(
    subject: Subject, filters: dict[str, float]
) -> None:
    sampling = replace(GREEDY, temperature=1.9, **filters)  # type: ignore[arg-type]
    found = await subject.answer(request(PROMPTS[0], STACKS["a"], sampling))
    assert tokens_of(found) == tokens_of(await subject.answer(request(PROMPTS[0], STACKS["a"])))


@each_engine
async def test_an_answer_ends_at_max_tokens_the_end_of_text_and_stop_strings(
    subject: Subject,
) -> None:
    whole = await subject.answer(request(b"hello", STACKS["a"]))
    text = "".join(output.text for output in whole)
    reasons = [output.finish_reason for output in whole]
    assert (len(tokens_of(whole)), reasons[-1]) == (GREEDY.max_tokens, "length")
    assert not any(reasons[:-1])
    stop = next(text[place : place + 2] for place in range(2, len(text) - 2))
    sampling = replace(GREEDY, max_tokens=150, stop=("never there", stop))
    stopped = await subject.answer(request(b"hello", STACKS["a"], sampling))
    assert "".join(output.text for output in stopped) == text[: text.index(stop)]
    assert stopped[-1].finish_reason == "stop"
    assert tokens_of(stopped) == tokens_of(whole)[: len(tokens_of(stopped))]
    ending = SamplingSettings(20, temperature=0, logit_bias=((EOS, 1e4),), logprobs=0)
    ended = await subject.answer(request(b"hello", (), ending))
    assert (tokens_of(ended), ended[-1].text, ended[-1].finish_reason) == ([EOS], "", "stop")
    assert len(logprobs_of(ended)) == 1
    going_on = await subject.answer(request(b"hello", (), replace(ending, ignore_eos=True)))
    assert tokens_of(going_on) == [EOS] * 20


@each_engine
async def test_the_best_tokens_of_a_bias_are_drawn(subject: Subject) -> None:
    bias = tuple((token, -1e4) for token in range(VOCABULARY) if token not in (70, 71))
    sampling = SamplingSettings(30, temperature=2.0, logit_bias=bias, seed=1, ignore_eos=True)
    assert set(tokens_of(await subject.answer(request(b"hello", (), sampling)))) == {70, 71}
