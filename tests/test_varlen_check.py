"""A form of attention that is wrong on the device is not used, or nothing is served."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch
from torch import Tensor

from server.engine.torch.loader import ModelLoadError
from server.engine.torch.slab import SlabShape
from server.engine.torch.varlen import GatheredForm, PagedForm, available_forms
from server.engine.torch.varlen_check import choose_form
from tests.varlen import causal_varlen, paged_varlen, plain_varlen

SHAPE = SlabShape(2, 8, torch.float32, (torch.device("cpu"),) * 3)
HEADS = 4

Change = Callable[[Tensor], None]


def broken(change: Change, paged_only: bool = False) -> Callable[..., Tensor]:
    """The reference, whose output is changed."""

    @wraps(paged_varlen)
    def function(*tensors: Any, **options: Any) -> Tensor:
        output = paged_varlen(*tensors, **options)
        if not paged_only or options.get("block_table") is not None:
            change(output)
        return output

    return function


def unwritten_rows(output: Tensor) -> None:
    output[1:] = torch.nan


def one_wrong_head(output: Tensor) -> None:
    output[-1, -1] = 0


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("function", [paged_varlen, plain_varlen])
def test_the_best_form_that_is_right_is_used(
    function: Callable[..., Tensor], windowed: bool
) -> None:
    forms = available_forms(function)
    assert choose_form(forms, SHAPE, HEADS, windowed) is forms[0]


@pytest.mark.parametrize("change", [unwritten_rows, one_wrong_head])
def test_the_fallback_serves_where_pages_are_read_wrongly(change: Change) -> None:
    forms = available_forms(broken(change, paged_only=True))
    assert isinstance(forms[0], PagedForm)
    assert isinstance(choose_form(forms, SHAPE, HEADS, False), GatheredForm)


@pytest.mark.parametrize("change", [unwritten_rows, one_wrong_head])
def test_where_nothing_is_right_nothing_is_served(change: Change) -> None:
    forms = available_forms(broken(change))
    with pytest.raises(ModelLoadError, match=r"PagedForm: .*off by.*GatheredForm"):
        choose_form(forms, SHAPE, HEADS, False)


def test_a_window_that_is_not_held_is_noticed() -> None:
    def blind(*tensors: Any, window_size: tuple[int, int], scale: float | None) -> Tensor:
        return plain_varlen(*tensors, window_size=(-1, window_size[1]), scale=scale)

    form = GatheredForm(blind, frozenset({"window_size"}))
    assert choose_form([form], SHAPE, HEADS, windowed=False) is form
    with pytest.raises(ModelLoadError, match="off by"):
        choose_form([form], SHAPE, HEADS, windowed=True)


def test_a_torch_without_windows_serves_models_without() -> None:
    [form] = available_forms(causal_varlen)
    assert choose_form([form], SHAPE, HEADS, windowed=False) is form
    with pytest.raises(ModelLoadError, match="sliding windows"):
        choose_form([form], SHAPE, HEADS, windowed=True)
