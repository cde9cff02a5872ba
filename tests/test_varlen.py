"""Which form of torch's function is used, and what is asked of it."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from server.engine.torch.attention import UnsupportedAttentionError
from server.engine.torch.attention_step import How
from server.engine.torch.varlen import (
    GatheredForm,
    PagedForm,
    PagedIndex,
    VarlenFunction,
    available_forms,
)
from tests.varlen import causal_varlen, paged_varlen, plain_varlen

ENDS = torch.tensor([0, 1], dtype=torch.int32)
INDEX = PagedIndex(
    slots=torch.tensor([0]),
    query_ends=ENDS,
    key_ends=ENDS,
    lengths=ENDS[1:],
    tables=ENDS[None, 1:],
    keys=torch.tensor([256]),
    most_queries=1,
    most_keys=1,
)
QUERY = torch.ones(1, 2, 8)
PAGES = torch.ones(2, 256, 1, 8)


@pytest.mark.parametrize(
    ("function", "forms"),
    [
        (paged_varlen, [PagedForm, GatheredForm]),
        (plain_varlen, [GatheredForm]),
        (causal_varlen, [GatheredForm]),
    ],
)
def test_a_form_is_offered_where_the_function_has_its_arguments(
    function: VarlenFunction, forms: list[type]
) -> None:
    assert [type(form) for form in available_forms(function)] == forms


def test_the_torch_that_is_installed_has_a_form() -> None:
    assert isinstance(available_forms(varlen_attn)[-1], GatheredForm)


def asked(
    window: int | None, arguments: frozenset[str] | None, index: PagedIndex = INDEX
) -> dict[str, Any]:
    """What a form asks of its function; `arguments` None for the paged one."""
    seen: dict[str, Any] = {}

    def function(query: Tensor, *_tensors: object, **options: object) -> Tensor:
        seen.update(options)
        return query

    form = PagedForm(function) if arguments is None else GatheredForm(function, arguments)
    form.attend(QUERY, PAGES, PAGES, index, How(0.25, window, None))
    return seen


def test_a_window_counts_the_querys_own_key() -> None:
    assert asked(7, None)["window_size"] == (6, 0)
    several = replace(INDEX, most_queries=2)
    assert asked(None, None, several)["window_size"] == (-1, 0)
    assert asked(None, None)["window_size"] == (-1, -1)  # nothing comes after a single query
    assert asked(1, frozenset({"window_size"}))["window_size"] == (0, 0)


def test_keys_are_never_split_where_that_can_be_said() -> None:
    assert asked(None, None)["num_splits"] == 1
    assert asked(None, frozenset({"window_size", "num_splits"}))["num_splits"] == 1
    # Where it cannot, keys are split by what else is in the batch, unless there is a last one.
    older = asked(None, frozenset({"window_size"}))
    assert older == {"scale": 0.25, "window_size": (-1, 0)}


def test_an_older_function_is_asked_for_what_it_has() -> None:
    assert asked(None, frozenset()) == {"scale": 0.25, "is_causal": True}
    with pytest.raises(UnsupportedAttentionError, match="sliding windows"):
        asked(7, frozenset())


@pytest.mark.parametrize(
    "form", available_forms(paged_varlen), ids=lambda form: type(form).__name__
)
def test_a_soft_cap_is_refused(form: PagedForm | GatheredForm) -> None:
    with pytest.raises(UnsupportedAttentionError, match="soft cap"):
        form.attend(QUERY, PAGES, PAGES, INDEX, How(None, None, 30.0))
