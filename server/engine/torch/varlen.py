"""FlashAttention over sequences of unequal lengths, as torch has it, on paged keys and values.

Two forms, as a torch offers: with a table of pages (torch 2.13), or over keys and values that are
first gathered side by side (before that). Both always with one split: choosing by itself, paged
FlashAttention 2 leaves rows unwritten (pytorch/pytorch#194167), and rows would depend on their
neighbours.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from server.engine.torch.attention import UnsupportedAttentionError
from server.engine.torch.attention_step import How

VarlenFunction: TypeAlias = Callable[..., Any]
"""`torch.nn.attention.varlen.varlen_attn`, or something with the same arguments."""

_PAGED: Final = {"block_table", "seqused_k", "num_splits"}


@dataclass(frozen=True, slots=True)
class PagedIndex:
    """Who owns which of a step's n pieces of packed tokens, and where their K and V are."""

    slots: Tensor  # (tokens,) int64: where each token's K and V go, page * 256 + place in it
    query_ends: Tensor  # (n + 1,) int32: 0, then how many tokens all pieces so far have
    key_ends: Tensor  # (n + 1,) int32: the same of the keys that they see, those of before too
    lengths: Tensor  # (n,) int32: keys of each
    tables: Tensor  # (n, pages) int32: each one's pages
    keys: Tensor | None  # (keys,) int64: the slots of all keys, one piece after the other
    most_queries: int  # of a piece
    most_keys: int


class VarlenForm(ABC):
    """One way to call the function."""

    gathers: bool  # whether it needs `PagedIndex.keys`

    @abstractmethod
    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, index: PagedIndex, how: How
    ) -> Tensor:
        """Each query sees its sequence's keys up to its own, or the last `window` of them.

        Args:
            query: (tokens, heads, head_dim).
            keys, values: (pages, 256, kv_heads, head_dim); the step's own are stored already.

        Returns:
            (tokens, heads, head_dim).

        Raises:
            UnsupportedAttentionError: a soft cap is asked for, or what this torch cannot do.
        """


class PagedForm(VarlenForm):
    """Reads the pages where they are."""

    gathers = False

    def __init__(self, function: VarlenFunction) -> None:
        self._function = function

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, index: PagedIndex, how: How
    ) -> Tensor:
        """As every form's; see `VarlenForm.attend`."""
        _refuse_softcap(how)
        output: Tensor = self._function(
            query,
            keys,
            values,
            index.query_ends,
            index.key_ends,  # wanted by FlashAttention 2, though `seqused_k` says the same
            index.most_queries,
            index.most_keys,
            scale=how.scaling,
            window_size=_window(how, index),
            enable_gqa=True,
            seqused_k=index.lengths,
            block_table=index.tables,
            num_splits=1,
        )
        return output


class GatheredForm(VarlenForm):
    """Gathers all keys and values of the step first, in every layer."""

    gathers = True

    def __init__(self, function: VarlenFunction, arguments: frozenset[str]) -> None:
        self._function = function
        self._arguments = arguments

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, index: PagedIndex, how: How
    ) -> Tensor:
        """As every form's; see `VarlenForm.attend`."""
        _refuse_softcap(how)
        assert index.keys is not None, "the step was built for another form"
        output: Tensor = self._function(
            query,
            keys.flatten(0, 1).index_select(0, index.keys),
            values.flatten(0, 1).index_select(0, index.keys),
            index.query_ends,
            index.key_ends,
            index.most_queries,
            index.most_keys,
            **self._options(how, index),
        )
        return output

    def _options(self, how: How, index: PagedIndex) -> dict[str, object]:
        """What this torch takes beside the tensors."""
        options: dict[str, object] = {"scale": how.scaling}
        if "window_size" in self._arguments:
            one_split = "num_splits" in self._arguments
            # Where splits cannot be forbidden, kernels split keys by what else is in the batch,
            # but not where they have to look who comes after whom.
            options["window_size"] = _window(how, index) if one_split else (_before(how), 0)
        elif how.window is None:
            options["is_causal"] = True
        else:
            raise UnsupportedAttentionError(
                f"torch {torch.__version__} has no sliding windows in varlen_attn"
            )
        if "enable_gqa" in self._arguments:
            options["enable_gqa"] = True
        if "num_splits" in self._arguments:
            options["num_splits"] = 1
        return options


def available_forms(function: VarlenFunction) -> list[VarlenForm]:
    """The forms that a function has arguments for, the better first."""
    arguments = frozenset(inspect.signature(function).parameters)
    forms: list[VarlenForm] = [GatheredForm(function, arguments)]
    if arguments >= _PAGED:
        forms.insert(0, PagedForm(function))
    return forms


def _window(how: How, index: PagedIndex) -> tuple[int, int]:
    """How many keys before a query's own it sees, and how many after; -1 for all."""
    # None come after the last. Told so, kernels read K and V once for the heads that share them;
    # where they have to look who comes after whom, once for each query head.
    sees_all = how.window is None and index.most_queries == 1
    return (_before(how), -1 if sees_all else 0)


def _before(how: How) -> int:
    return -1 if how.window is None else how.window - 1


def _refuse_softcap(how: How) -> None:
    if how.softcap is not None:
        raise UnsupportedAttentionError("FlashAttention in torch has no soft cap")
