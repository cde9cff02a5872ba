"""Attention with bounded scores: FlexAttention beside plain arithmetic, and what is chosen."""

import logging
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from server.engine.torch import soft_cap
from server.engine.torch.soft_cap import (
    FlexSoftCapped,
    choose_soft_capped,
    soft_capped_attention,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """torch warns that FlexAttention is slow where it is not compiled, as it is here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        yield


def inputs(rows: int, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, rows, 2, keys, 16, generator=random)
    return torch.randn(rows, 2, queries, 16, generator=random), key, value


@pytest.mark.parametrize("scaling", [None, 0.5])
@pytest.mark.parametrize("kind", ["none", "of each row", "of each query"])
def test_flex_attention_bounds_scores_as_plain_arithmetic_does(
    kind: str, scaling: float | None
) -> None:
    rows = 1 if kind == "of each query" else 3
    query, key, value = inputs(rows, queries=6, keys=20)
    mask = None
    if kind != "none":
        shape = (3, 1, 1, 20) if kind == "of each row" else (6, 20)
        seen = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6
        seen[..., 0] = True
        mask = torch.zeros(shape).masked_fill(~seen, -torch.inf)
    found = FlexSoftCapped(flex_attention)(query, key, value, mask, scaling, 1.5)
    expected = soft_capped_attention(query, key, value, mask, scaling, 1.5)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    unbounded = soft_capped_attention(query, key, value, mask, scaling, 1e6)
    assert not torch.allclose(found, unbounded, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_computes_rightly_is_chosen(dtype: torch.dtype) -> None:
    flex = FlexSoftCapped(flex_attention)
    assert choose_soft_capped(flex, CPU, dtype, head_dim=16, fold=2) is flex


def test_what_leaves_out_the_cap_or_fails_is_not(caplog: pytest.LogCaptureFixture) -> None:
    def uncapped(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float | None,
        _softcap: float,
    ) -> Tensor:
        return soft_capped_attention(query, key, value, mask, scaling, 1e6)

    def failing(*_: object) -> Tensor:
        raise RuntimeError("no kernel\nand more that nobody wants to read")

    for wrong, said in ((uncapped, "off by"), (failing, "RuntimeError: no kernel")):
        with caplog.at_level(logging.WARNING, logger=soft_cap.__name__):
            chosen = choose_soft_capped(wrong, CPU, torch.float32, head_dim=16, fold=2)
        assert chosen is soft_capped_attention
        assert said in caplog.text
        assert "nobody" not in caplog.text
        caplog.clear()
