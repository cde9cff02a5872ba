"""Tests that the check of paged attention, which an engine runs at start, notices errors."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from server.engine.torch.attention.backend import AttentionParams
from server.engine.torch.attention.paged_check import WrongAttentionError, check_pages
from server.engine.torch.attention.paged_index import SPLITS, PagedAttention, PagedIndex, Tiling
from server.engine.torch.attention.slab import KVShape
from tests.paged import paged_reference

SHAPE = KVShape(2, 8, torch.float32, (torch.device("cpu"),) * 3)
TILING = Tiling(4, 2, 4, processors=8)


def changed(
    change: Callable[[Tensor, PagedIndex], None] = lambda _output, _index: None,
    params: Callable[[AttentionParams], AttentionParams] = lambda params: params,
) -> PagedAttention:
    """Return the slow reference with changed parameters or a changed output."""

    def attend(
        query: Tensor, keys: Tensor, values: Tensor, index: PagedIndex, asked: AttentionParams
    ) -> Tensor:
        output = paged_reference(query, keys, values, index, params(asked))
        change(output, index)
        return output

    return attend


def unwritten_rows(output: Tensor, _index: PagedIndex) -> None:
    output[1:] = torch.nan


def one_wrong_head(output: Tensor, _index: PagedIndex) -> None:
    output[-1, -1] = 0


def wrong_where_keys_are_split_most(output: Tensor, index: PagedIndex) -> None:
    if index.splits == SPLITS[-1]:
        output[0] = 0


def test_what_is_right_passes() -> None:
    check_pages(paged_reference, SHAPE, TILING, windowed=True, softcap=2.0)


@pytest.mark.parametrize(
    "change", [unwritten_rows, one_wrong_head, wrong_where_keys_are_split_most]
)
def test_wrong_outputs_are_noticed(change: Callable[[Tensor, PagedIndex], None]) -> None:
    with pytest.raises(WrongAttentionError, match="off by"):
        check_pages(changed(change), SHAPE, TILING, windowed=False, softcap=None)


def test_a_window_that_is_not_held_is_noticed() -> None:
    blind = changed(params=lambda params: replace(params, window=None))
    check_pages(blind, SHAPE, TILING, windowed=False, softcap=None)
    with pytest.raises(WrongAttentionError, match="off by"):
        check_pages(blind, SHAPE, TILING, windowed=True, softcap=None)


def test_a_soft_cap_that_is_left_out_is_noticed() -> None:
    uncapped = changed(params=lambda params: replace(params, softcap=None))
    check_pages(uncapped, SHAPE, TILING, windowed=False, softcap=None)
    with pytest.raises(WrongAttentionError, match="off by"):
        check_pages(uncapped, SHAPE, TILING, windowed=False, softcap=2.0)


def test_reading_what_nobody_has_written_is_noticed() -> None:
    def greedy(
        query: Tensor, keys: Tensor, values: Tensor, index: PagedIndex, params: AttentionParams
    ) -> Tensor:
        unseen = values[index.tables.flatten().long()].sum() * 0  # 0, or NaN if any value is NaN
        return paged_reference(query, keys, values, index, params) + unseen

    with pytest.raises(WrongAttentionError, match="off by nan"):
        check_pages(greedy, SHAPE, TILING, windowed=False, softcap=None)
