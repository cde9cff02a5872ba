"""Tests the attention kernel, interpreted on the CPU and compiled for GPUs that are not present.

Its tests on a GPU are in `tests/cuda`.
"""

from dataclasses import replace

import pytest
import torch

from server.engine.torch.attention.backend import AttentionParams
from server.engine.torch.attention.page_pool import PAGE, SCRATCH
from server.engine.torch.attention.paged_check import check_pages
from server.engine.torch.attention.paged_index import PagedAttention, PagedIndex, Tiling
from server.engine.torch.attention.slab import KVShape
from tests.gpu_code import compiled_for_gpus
from tests.paged import paged_reference

triton = pytest.importorskip("triton", reason="Triton is there on x86-64 Linux only")
CPU = torch.device("cpu")
# Each sequence's length after each of three steps; in the last step all sequences decode.
LENGTHS = ((1, 2, 3), (PAGE - 1, PAGE, PAGE + 1))
KIBIBYTE = 1024


@pytest.fixture
def kernel() -> PagedAttention:
    if torch.cuda.is_available():
        pytest.skip("it is compiled here, and not interpreted")
    from server.engine.torch.cuda.paged_kernel import attend_pages  # noqa: PLC0415  Triton may lack

    return attend_pages


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "dtype", "softcap"),
    [
        (4, 2, 8, torch.float32, 2.0),
        (7, 1, 16, torch.float16, None),
        (2, 2, 24, torch.float16, None),
    ],
)
def test_prompts_and_decoding_equal_plain_arithmetic(
    kernel: PagedAttention,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    softcap: float | None,
) -> None:
    """Covers shared and own keys of heads, sizes that are no powers of two, windows, soft caps.

    bfloat16 is left out, because Triton's interpreter multiplies it as integers.
    """
    shape = KVShape(kv_heads, head_dim, dtype, (CPU,))
    tiling = Tiling(heads, kv_heads, dtype.itemsize, processors=1)
    check_pages(kernel, shape, tiling, softcap is not None, softcap, LENGTHS)


def decoding_index(lengths: list[int], splits: int) -> PagedIndex:
    """Return the index of a decode step with one page a sequence; length 1 marks a padding row."""
    rows = torch.arange(len(lengths), dtype=torch.int32)
    pages = torch.tensor(
        [number + 1 if length > 1 else SCRATCH for number, length in enumerate(lengths)]
    )
    return PagedIndex(
        slots=pages * PAGE,
        query_ends=torch.arange(len(lengths) + 1, dtype=torch.int32),
        lengths=torch.tensor(lengths, dtype=torch.int32),
        tables=pages.int()[:, None].expand(-1, 4).contiguous(),
        block_spans=rows,
        block_starts=torch.zeros_like(rows),
        block_rows=16,
        splits=splits,
        max_keys=PAGE,
    )


@pytest.mark.parametrize("splits", [1, 4])
def test_contents_of_the_index_may_change_where_its_shapes_and_addresses_do_not(
    kernel: PagedAttention, splits: int
) -> None:
    """A CUDA graph needs this: lengths, pages and padding must be read when the kernel runs."""
    random = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 5, PAGE, 1, 16, generator=random)
    query = torch.randn(4, 2, 16, generator=random)
    params = AttentionParams(None, None, None)
    index = decoding_index([200, 3, 1, 1], splits)
    for lengths in ([200, 3, 1, 1], [5, 256, 64, 65], [1, 1, 1, 1]):
        changed = decoding_index(lengths, splits)
        for name in ("slots", "lengths", "tables"):
            getattr(index, name).copy_(getattr(changed, name))
        found = kernel(query, keys, values, index, params)
        expected = paged_reference(query, keys, values, changed, params)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("splits", [1, 8])
def test_a_sequences_result_has_the_same_bits_whoever_is_beside_it(
    kernel: PagedAttention, splits: int
) -> None:
    random = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 5, PAGE, 1, 16, generator=random)
    query = torch.randn(4, 2, 16, generator=random)
    params = AttentionParams(None, 50, None)
    first = kernel(query, keys, values, decoding_index([200, 3, 1, 1], splits), params)
    other = kernel(
        torch.cat((query[:1], query[1:].flip(0))),
        keys,
        values,
        decoding_index([200, 90, 255, 17], splits),
        params,
    )
    assert torch.equal(first[0], other[0])
    assert not torch.equal(first[1], other[1])


def test_strided_queries_are_read_where_they_are(kernel: PagedAttention) -> None:
    """transformers passes queries as transposed views, in memory with heads before tokens."""
    random = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 3, PAGE, 2, 16, generator=random)
    index = replace(decoding_index([100, 40], 1), slots=torch.tensor([0, 1]))
    query = torch.randn(4, 2, 16, generator=random).transpose(0, 1)  # (tokens, heads, head_dim)
    params = AttentionParams(0.3, None, None)
    found = kernel(query, keys, values, index, params)
    torch.testing.assert_close(found, paged_reference(query, keys, values, index, params))


def test_it_compiles_for_an_a100_and_an_h100() -> None:
    """The limit of 99 KiB shared memory lets smaller GPUs of the A100's generation run it too."""
    for row in compiled_for_gpus("kernel_compiler"):
        assert row["shared"] <= 99 * KIBIBYTE, row
        assert row["tensor_cores"] is (row["dtype"] == "bf16"), row
        assert row["machine_code"], row
