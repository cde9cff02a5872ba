"""Tests paged attention, penalties and sampling on a GPU, without an engine."""

import importlib
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from server.engine.request import Request, SamplingSettings
from server.engine.torch.attention.page_pool import PAGE
from server.engine.torch.attention.paged_check import check_pages
from server.engine.torch.attention.paged_index import PagedAttention, Tiling
from server.engine.torch.attention.slab import KVShape
from server.engine.torch.sampling.penalties import Penalties
from server.engine.torch.sampling.penalty_table import PenaltyTable
from server.engine.torch.sampling.sampler import Draw, sample
from tests.cuda.devices import DEVICE, GPU, MARKS
from tests.oracles import penalized
from tests.paged import paged_reference

pytestmark = MARKS

# A dry run on a CPU uses smaller sizes.
LENGTHS = ((1, 2, 3), (7, 130, 131), (PAGE - 1, PAGE, PAGE + 1))
ROWS, VOCABULARY = (128, 128_256) if GPU else (16, 20_000)
PENALTIES = (
    SamplingSettings(1, repetition_penalty=1.3),
    SamplingSettings(1, repetition_penalty=0.01, logit_bias=((0, 100.0), (1, -100.0))),
    SamplingSettings(1, presence_penalty=1.5),
    SamplingSettings(1, frequency_penalty=-0.7, presence_penalty=0.3),
    SamplingSettings(
        *(1, 0.9, 0.95, 6, 0.05, 1.1, 0.2, 0.4),
        logit_bias=tuple((token, token / 7 - 20) for token in range(0, 300, 2)),
    ),
)
SETTINGS = (
    SamplingSettings(1),
    SamplingSettings(1, temperature=0),
    SamplingSettings(1, temperature=0.7, top_p=0.9),
    SamplingSettings(1, top_k=40),
    SamplingSettings(1, min_p=0.05, temperature=1.5),
    SamplingSettings(1, top_p=0.999),  # needs more tokens than are sorted at first
)


@pytest.fixture
def attend() -> PagedAttention:
    """Return the Triton kernel or, in a dry run, the slow reference."""
    if not GPU:
        return paged_reference
    kernel: PagedAttention = importlib.import_module(
        "server.engine.torch.cuda.paged_kernel"
    ).attend_pages
    return kernel


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "softcap", "dtype"),
    [
        (32, 8, 128, None, torch.float16),  # Llama 3 8B, Mistral 7B
        (32, 8, 128, None, torch.bfloat16),
        (14, 2, 64, None, torch.bfloat16),  # Qwen2.5 0.5B
        (14, 2, 64, 30.0, torch.float32),
        (8, 4, 256, 50.0, torch.bfloat16),  # Gemma-2 2B
    ],
)
def test_attention_is_right_at_sizes_that_models_have(
    attend: PagedAttention,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    softcap: float | None,
) -> None:
    """Attention is checked with a sliding window and without."""
    shape = KVShape(kv_heads, head_dim, dtype, (DEVICE,))
    processors = torch.cuda.get_device_properties(DEVICE).multi_processor_count if GPU else 1
    tiling = Tiling(heads, kv_heads, dtype.itemsize, processors)
    if GPU:
        check_pages(attend, shape, tiling, windowed=True, softcap=softcap)
    else:
        check_pages(attend, shape, tiling, windowed=True, softcap=softcap, lengths=LENGTHS)


@pytest.mark.parametrize("seed", range(3))
def test_penalties_on_the_device_have_the_bits_of_the_oracle(seed: int) -> None:
    """Penalties stay right while some sequences skip steps and others end."""
    chosen, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    table = PenaltyTable(DEVICE)
    requests = [
        Request("test", tuple(chosen.randrange(300) for _ in range(length)), settings)
        for settings in PENALTIES
        for length in (0, 5, 200)
    ]
    living = {number: Penalties(request) for number, request in enumerate(requests)}
    completions: dict[int, list[int]] = {number: [] for number in living}
    for _ in range(40):
        rows = chosen.sample(sorted(living), chosen.randint(1, len(living)))
        logits = 5 * torch.randn(len(rows) + 1, 300, generator=generator)
        # NaN is left out, because its bits differ between devices.
        logits[:, 7] = chosen.choice((torch.inf, -torch.inf, 3e38, -0.0, 0.0))
        found = table.penalize(logits.to(DEVICE), [*(living[row] for row in rows), None])
        expected = [
            penalized(values, requests[row].prompt, completions[row], requests[row].sampling)
            for values, row in zip(logits, rows, strict=False)
        ]
        assert torch.equal(
            found.cpu().view(torch.int32), torch.stack([*expected, logits[-1]]).view(torch.int32)
        )
        for row in rows:
            token = chosen.randrange(chosen.choice((3, 300)))  # often a repeated token
            completions[row].append(token)
            living[row].push(token)
        if len(living) > 3 and chosen.random() < 0.2:
            table.free(living.pop(chosen.choice(sorted(living))))
        table.check(living.values())


def drawn_tokens(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """Draw a token for each row as a step does: uncertain rows are sorted and drawn again."""
    sampled = sample(logits, draws)
    unsure = [row for row, sure in enumerate(sampled.exact.tolist()) if not sure]
    if unsure:
        sampled = sample(logits, draws, sorted_rows=unsure)
    tokens: list[int] = sampled.tokens.tolist()
    return tokens


def wide_rows() -> tuple[Tensor, list[Draw]]:
    """Return random logits on the device, and for each row a draw with its own seed."""
    logits = 3 * torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(0))
    draws = [
        Draw(SETTINGS[row % len(SETTINGS)], random.Random(row).random()) for row in range(ROWS)
    ]
    return logits.to(DEVICE), draws


def test_the_same_seeds_give_the_same_tokens_in_every_run() -> None:
    logits, draws = wide_rows()
    first = drawn_tokens(logits, draws)
    assert len(set(first)) > ROWS // 2
    for _ in range(3):
        assert drawn_tokens(logits, draws) == first


def test_the_same_seeds_give_the_same_tokens_in_every_batch() -> None:
    """A row's token does not depend on the rows' order or number."""
    logits, draws = wide_rows()
    first = drawn_tokens(logits, draws)
    assert drawn_tokens(logits.flip(0), draws[::-1]) == first[::-1]
    for rows in (slice(0, 1), slice(1, ROWS // 2), slice(ROWS // 2, ROWS)):
        assert drawn_tokens(logits[rows], draws[rows]) == first[rows]
