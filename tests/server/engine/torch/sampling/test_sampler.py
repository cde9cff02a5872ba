"""Tests draws of tokens from logits rows, and the log-probabilities of tokens."""

import math
from fractions import Fraction
from itertools import accumulate

import pytest
import torch

from server.engine.request import Request, SamplingSettings
from server.engine.torch.sampling.penalties import Penalties, changes_logits
from server.engine.torch.sampling.penalty_table import PenaltyTable
from server.engine.torch.sampling.sampler import Draw, sample, score
from tests.oracles import sampling_probabilities

LOGITS = torch.tensor([1.0, 3.0, 2.0, 0.0])


def draw(uniform: float, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Draw:
    settings = SamplingSettings(1, temperature=temperature, top_k=top_k, top_p=top_p)
    return Draw(settings, uniform)


def drawn_tokens(logits: torch.Tensor, draws: list[Draw]) -> list[int]:
    """Draw a token for each row as a step does: uncertain rows are sorted and drawn again."""
    table = PenaltyTable(logits.device)
    logits = table.penalize(logits, [draw.penalties for draw in draws])
    sampled = sample(logits, draws)
    unsure = [row for row, sure in enumerate(sampled.exact.tolist()) if not sure]
    tokens = sample(logits, draws, sorted_rows=unsure).tokens if unsure else sampled.tokens
    drawn: list[int] = tokens.tolist()
    return drawn


def shares(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> list[float]:
    """Return each token's share of the draws for uniform numbers that cover [0, 1) evenly."""
    rows = 1000
    draws = [draw((row + 0.5) / rows, temperature, top_k, top_p) for row in range(rows)]
    drawn = torch.tensor(drawn_tokens(LOGITS.repeat(rows, 1), draws))
    return (drawn.bincount(minlength=4) / rows).tolist()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_their_probability_says(temperature: float) -> None:
    expected = (LOGITS / temperature).softmax(-1).tolist()
    assert shares(temperature) == pytest.approx(expected, abs=2e-3)


def test_temperature_zero_takes_the_best() -> None:
    assert drawn_tokens(LOGITS[None], [draw(0.99, temperature=0)]) == [1]


def test_top_k_keeps_the_k_best() -> None:
    kept = torch.tensor([-torch.inf, 3.0, 2.0, -torch.inf]).softmax(-1).tolist()
    assert shares(top_k=2) == pytest.approx(kept, abs=2e-3)
    assert shares(top_k=1) == [0, 1, 0, 0]
    assert shares(top_k=99) == shares(top_k=4)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    # The probabilities are 0.644, 0.237, 0.087, 0.032 in order.
    assert shares(top_p=0.6) == [0, 1, 0, 0]
    for tiny in (1e-9, 1e-46, 5e-324):  # the last two are 0 in float32
        assert shares(top_p=tiny) == [0, 1, 0, 0]
    kept = torch.tensor([-torch.inf, 3.0, 2.0, -torch.inf]).softmax(-1).tolist()
    assert shares(top_p=0.65) == pytest.approx(kept, abs=2e-3)


CASES = (
    SamplingSettings(1),
    SamplingSettings(1, temperature=0),
    SamplingSettings(1, temperature=0.7, top_p=0.8),
    SamplingSettings(1, top_k=3, top_p=0.9),
    SamplingSettings(1, min_p=0.2),
    SamplingSettings(1, min_p=1.0),
    SamplingSettings(1, temperature=1.5, min_p=0.1, top_k=4, top_p=0.7),
    SamplingSettings(1, temperature=0, repetition_penalty=3.0),
    SamplingSettings(1, repetition_penalty=1.3),
    SamplingSettings(1, repetition_penalty=0.5, presence_penalty=-1.0),
    SamplingSettings(1, presence_penalty=1.5),
    SamplingSettings(1, frequency_penalty=0.7, presence_penalty=0.3),
    SamplingSettings(1, temperature=0, frequency_penalty=2.0),
    SamplingSettings(1, logit_bias=((2, 4.0), (0, -100.0))),
    SamplingSettings(1, temperature=0, logit_bias=((5, 100.0),)),
    SamplingSettings(
        *(1, 0.9, 0.95, 6, 0.05, 1.1, 0.2, 0.4),
        logit_bias=((1, 1.0), (3, -1.0)),
    ),
)


@pytest.mark.parametrize("together", [False, True], ids=["each alone", "all in one batch"])
def test_every_combination_draws_as_the_oracle_says(together: bool) -> None:
    """With uniform numbers that cover [0, 1) evenly, a token's share is its probability."""
    random = torch.Generator().manual_seed(0)
    prompt, completion = (0, 1, 1, 6), (2, 3, 3, 3, 6)
    grid = 400
    groups = [CASES] if together else [(case,) for case in CASES]
    for cases in groups:
        logits = 2 * torch.randn(len(cases), 8, generator=random)
        draws = [
            Draw(case, (place + 0.5) / grid, penalties_of(case, prompt, completion))
            for case in cases
            for place in range(grid)
        ]
        drawn = torch.tensor(drawn_tokens(logits.repeat_interleave(grid, dim=0), draws))
        for row, case in enumerate(cases):
            found = drawn[row * grid : (row + 1) * grid].bincount(minlength=8) / grid
            expected = sampling_probabilities(logits[row].tolist(), prompt, completion, case)
            assert found.tolist() == pytest.approx(expected, abs=1.5 / grid), case


WIDE_CASES = (
    SamplingSettings(1, top_p=0.9),
    SamplingSettings(1, top_p=0.999),
    SamplingSettings(1, min_p=0.05),
    SamplingSettings(1, min_p=1e-4, top_p=0.9),
    SamplingSettings(1, min_p=1e-9, top_p=0.7),
    SamplingSettings(1, top_k=1500, top_p=0.9),
    SamplingSettings(1, top_k=1023),
    SamplingSettings(1, top_k=1024),
    SamplingSettings(1, top_k=1025),
    SamplingSettings(1, top_k=40, top_p=0.95, temperature=0.6),
)


@pytest.mark.parametrize("spread", [0.01, 1.0, 3.0, 8.0])
def test_a_wide_vocabulary_is_drawn_from_as_the_oracle_says(spread: float) -> None:
    """The filters keep fewer or more tokens than the number that is sorted at first."""
    vocabulary = 3000
    random = torch.Generator().manual_seed(3)
    logits = spread * torch.randn(len(WIDE_CASES), vocabulary, generator=random)
    uniforms = [0.0, 0.1, 0.37, 0.5, 0.83, 0.97, 0.999999]
    draws = [Draw(case, uniform) for case in WIDE_CASES for uniform in uniforms]
    drawn = iter(drawn_tokens(logits.repeat_interleave(len(uniforms), dim=0), draws))
    for row, case in enumerate(WIDE_CASES):
        expected = sampling_probabilities(logits[row].tolist(), (), (), case)
        best_first = sorted(range(vocabulary), key=lambda token: -logits[row][token])
        cumulative = list(accumulate(expected[token] for token in best_first))
        for uniform in uniforms:
            token = next(drawn)
            end = cumulative[best_first.index(token)]
            assert end - expected[token] - 1e-4 <= uniform <= end + 1e-4, case
            assert expected[token] > 0 or spread == 0.01, case


def test_the_best_logits_may_be_as_large_as_floats_are() -> None:
    logits = torch.tensor([[3e38, -3e38, 1.0, 0.0]])
    for settings in (
        SamplingSettings(1, temperature=0.5),
        SamplingSettings(1, temperature=0.5, top_p=0.9),
        SamplingSettings(1, repetition_penalty=0.01, logit_bias=((0, 100.0),)),
    ):
        draws = [Draw(settings, 0.5, penalties_of(settings, (0, 1), ()))]
        assert drawn_tokens(logits, draws) == [0]


def penalties_of(
    case: SamplingSettings, prompt: tuple[int, ...], completion: tuple[int, ...]
) -> Penalties | None:
    if not changes_logits(case):
        return None
    penalties = Penalties(Request("test", prompt, case))
    for token in completion:
        penalties.push(token)
    return penalties


def test_a_long_prompt_costs_nothing_where_only_the_completion_is_penalized() -> None:
    settings = SamplingSettings(1, temperature=0, presence_penalty=2.0)
    penalties = penalties_of(settings, tuple(range(1000)), ())
    assert penalties is not None
    assert drawn_tokens(LOGITS[None], [Draw(settings, 0.5, penalties)]) == [1]
    penalties.push(1)
    assert penalties.entry_count == 1
    assert drawn_tokens(LOGITS[None], [Draw(settings, 0.5, penalties)]) == [2]


def test_a_row_draws_the_same_whatever_else_is_in_the_batch() -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 500, generator=random)
    draws = [
        draw(0.3),
        draw(0.3, top_k=5),
        draw(0.9, temperature=0),
        draw(0.7, top_p=0.5, temperature=2),
        draw(0.0),
        draw(0.999999, top_k=2, top_p=0.9),
    ]
    alone = [drawn_tokens(logits[row][None], [draws[row]])[0] for row in range(6)]
    assert drawn_tokens(logits, draws) == alone
    assert drawn_tokens(logits.flip(0), draws[::-1]) == alone[::-1]


WEIGHED = (
    SamplingSettings(1),
    SamplingSettings(1, temperature=0.3),
    SamplingSettings(1, top_p=0.9),
    SamplingSettings(1, top_p=0.999),
    SamplingSettings(1, top_k=40),
    SamplingSettings(1, min_p=0.01, top_p=0.8),
)


def in_chunks(values: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Return a cumulative sum that adds in another order than torch, as another device may."""
    assert dim == -1
    parts = [torch.cumsum(part, -1) for part in torch.split(values, 7, dim=-1)]
    ends = accumulate((part[..., -1:] for part in parts), initial=torch.zeros_like(values[..., :1]))
    return torch.cat([part + end for part, end in zip(parts, ends, strict=False)], -1)


@pytest.mark.parametrize("spread", [0.01, 3.0])
def test_draws_do_not_depend_on_the_order_in_which_weights_are_added_up(
    monkeypatch: pytest.MonkeyPatch, spread: float
) -> None:
    random = torch.Generator().manual_seed(5)
    settings = [case for case in WEIGHED for _ in range(50)]
    logits = spread * torch.randn(len(settings), 1500, generator=random)
    uniforms = torch.rand(len(settings), generator=random, dtype=torch.float64).tolist()
    draws = [Draw(case, uniform) for case, uniform in zip(settings, uniforms, strict=True)]
    expected = drawn_tokens(logits, draws)
    floats = logits.softmax(-1)
    assert not torch.equal(in_chunks(floats), floats.cumsum(-1)), "no other order than torch's"
    monkeypatch.setattr(torch.Tensor, "cumsum", in_chunks)
    assert drawn_tokens(logits, draws) == expected


@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0, 40.0])
def test_the_drawn_token_is_exactly_the_one_at_the_uniform_number(spread: float) -> None:
    """The expected token is computed with Python's integers from the same probabilities."""
    random = torch.Generator().manual_seed(6)
    logits = spread * torch.randn(64, 2000, generator=random)
    uniforms = torch.rand(64, generator=random, dtype=torch.float64).tolist()
    uniforms[:4] = 0.0, 5e-324, 0.5, math.nextafter(1, 0)
    found = drawn_tokens(logits, [draw(uniform) for uniform in uniforms])
    scaled = logits - logits.amax(-1, keepdim=True)
    for token, weights, uniform in zip(found, scaled.softmax(-1).tolist(), uniforms, strict=True):
        integers = [math.floor(Fraction(weight) * 2**52) for weight in weights]
        target = min(math.floor(uniform * sum(integers)), sum(integers) - 1)
        assert sum(integers[:token]) <= target < sum(integers[: token + 1])
        assert abs(target - Fraction(uniform) * sum(integers)) < 2


@pytest.mark.parametrize("top_p", [0.25, 0.5, 0.75, 0.9, 0.999, math.nextafter(1, 0), 1.0])
def test_the_nucleus_is_exactly_what_is_needed_to_reach_top_p(top_p: float) -> None:
    """The largest uniform number draws the last token of the nucleus."""
    logits = -math.log(2) * torch.arange(30.0)
    settings = SamplingSettings(1, top_p=top_p, top_k=30)
    [last] = drawn_tokens(logits[None], [Draw(settings, math.nextafter(1, 0))])
    weights = (logits - logits.logsumexp(-1)).exp().tolist()
    before = accumulate((math.floor(Fraction(weight) * 2**52) for weight in weights), initial=0)
    kept = [token for token, sum_ in zip(range(30), before, strict=False) if sum_ < top_p * 2**52]
    assert last == (29 if top_p == 1 else kept[-1])


def test_a_sum_that_rounding_made_larger_than_one_drops_nothing() -> None:
    """Without top-p, every token that top-k keeps can be drawn."""
    logits = 6 * torch.randn(400, 60, generator=torch.Generator().manual_seed(8))
    kept = logits.topk(40, sorted=True)
    weights = (kept.values - kept.values.logsumexp(-1, keepdim=True)).exp().double()
    assert (weights[:, :-1].sum(-1) >= 1).any(), "no sum is larger"
    last = Draw(SamplingSettings(1, top_k=40), math.nextafter(1, 0))
    assert drawn_tokens(logits, [last] * 400) == kept.indices[:, -1].tolist()


@pytest.mark.parametrize("case", [*WEIGHED, SamplingSettings(1, top_p=1e-300)])
def test_tokens_without_weight_are_never_drawn_and_the_best_always_can_be(
    case: SamplingSettings,
) -> None:
    """The best token is tried at both ends of a row, with other weights that round to zero."""
    for best in (0, 700, 1499):
        for rest in (-40.0, -1e4, -torch.inf):
            logits = torch.full((3, 1500), rest)
            logits[:, best] = 0.0
            draws = [Draw(case, uniform) for uniform in (0.0, 0.5, math.nextafter(1, 0))]
            assert drawn_tokens(logits, draws) == [best] * 3


@pytest.mark.parametrize("case", WEIGHED)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_no_numbers_draw_some_token(case: SamplingSettings, value: float) -> None:
    logits = torch.randn(4, 1500, generator=torch.Generator().manual_seed(7))
    logits[0], logits[1, 3], logits[2, 1499] = value, value, value
    draws = [Draw(case, uniform) for uniform in (0.0, 0.5, 0.9, 0.3)]
    assert all(0 <= token < 1500 for token in drawn_tokens(logits, draws))
    assert drawn_tokens(logits[3:], draws[3:]) == drawn_tokens(logits, draws)[3:]


@pytest.mark.parametrize("temperature", [1e-300, 1e-7])
def test_a_tiny_temperature_does_not_overflow(temperature: float) -> None:
    assert drawn_tokens(LOGITS[None], [draw(0.5, temperature=temperature)]) == [1]


def test_logprobs_are_of_the_model_and_not_of_the_filters() -> None:
    expected = LOGITS.log_softmax(-1)
    (row,) = score(LOGITS[None], torch.tensor([2]), 3).read([3])
    assert row.sampled == pytest.approx(float(expected[2]))
    assert [token for token, _ in row.top] == [1, 2, 0]
    assert [value for _, value in row.top] == pytest.approx(expected[[1, 2, 0]].tolist())
    (none,) = score(LOGITS[None], torch.tensor([2]), 0).read([0])
    assert none.top == ()
    assert math.isclose(none.sampled, row.sampled)


def test_the_log_probability_of_a_long_text_is_that_of_double_precision() -> None:
    """Over a long text, errors of one sign add up; `log_softmax` in float32 has such errors."""
    random = torch.Generator().manual_seed(9)
    logits = 3 * torch.randn(128, 49_152, generator=random)
    tokens = torch.randint(logits.shape[1], (len(logits),), generator=random)
    found = score(logits, tokens, 2).read([2] * len(logits))
    for sums, chosen in (
        (sum(row.sampled for row in found), tokens),
        (sum(row.top[0][1] for row in found), logits.argmax(-1)),
        (sum(row.top[1][1] for row in found), logits.topk(2).indices[:, 1]),
    ):
        exact = logits.gather(-1, chosen[:, None])[:, 0].double() - logits.double().logsumexp(-1)
        assert sums == pytest.approx(float(exact.sum()), abs=1e-4)
