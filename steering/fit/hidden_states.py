"""Reads the hidden states before the language-model head, and keeps those of many texts in a file.

The hidden states of a few thousand texts are larger than memory should be: 2,000 pairs of 128
tokens of width 4096 are 4 GB in bfloat16. `SpooledStates` writes them to a temporary file, in the
model's dtype, and reads a text's again whenever a fit asks for it.
"""

import errno
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from steering.fit import FitError
from steering.fit.activations import TokenIds, model_device, pad_right


class TextStates(Protocol):
    """Hidden states of several texts. A list of tensors is one, and so is `SpooledStates`."""

    def __len__(self) -> int:
        """Return the number of texts."""

    def __getitem__(self, index: int, /) -> Tensor:
        """Return a text's hidden states, (tokens, width) float32."""

    def __iter__(self) -> Iterator[Tensor]:
        """Return an iterator over all texts."""


@dataclass(frozen=True, slots=True)
class Continuation:
    """A text's token ids, of which the first `start` belong to its prompt."""

    token_ids: TokenIds
    start: int = 0  # smaller than the number of token ids


class _HeadReachedError(Exception):
    """Ends a forward pass at the head. Always caught in this module."""


@torch.no_grad()
def stream_hidden_states(
    model: nn.Module,
    head: nn.Module,
    sequences: Sequence[TokenIds],
    batch_size: int,
    on_batch: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yield the untouched model's hidden states before the language-model head, for every token.

    Sequences of about equal length share a forward pass, the longest first, because padding costs
    as much time as tokens.

    Args:
        model: a causal language model.
        head: its language-model head (`lm_head`), a submodule that takes the hidden states as its
            first argument. It is not run.
        sequences: token ids.
        batch_size: sequences in a forward pass.
        on_batch: called after every forward pass with (sequences done, sequences in all).

    Yields:
        A sequence's index, and its hidden states: (tokens, width) in the model's dtype, on the
        model's device; width is the head's `in_features`. The tensor is a view of the batch's
        hidden states: a reference to it keeps the whole batch in memory.

    Raises:
        FitError: a sequence has no token, or the model does not run the head.
    """
    captured: list[Tensor] = []

    def capture(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        captured.append(args[0])
        raise _HeadReachedError

    order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))
    for start in range(0, len(order), batch_size):
        chunk = order[start : start + batch_size]
        batch = pad_right([sequences[index] for index in chunk], model_device(model))
        with head.register_forward_pre_hook(capture):
            try:
                model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
            except _HeadReachedError:
                pass
            else:
                raise FitError("the model does not run its language-model head")
        padded = captured.pop()
        for row, index in enumerate(chunk):
            yield index, padded[row, : len(sequences[index])]
        if on_batch is not None:
            on_batch(start + len(chunk), len(sequences))


def collect_hidden_states(
    model: nn.Module,
    head: nn.Module,
    sequences: Sequence[TokenIds],
    batch_size: int,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[Tensor]:
    """Return all that `stream_hidden_states` yields, in the order of the sequences, as float32.

    Args and errors are those of `stream_hidden_states`.
    """
    states = {
        # A copy, not a view, which would keep the padding's memory alive.
        index: rows.to(torch.float32, copy=True)
        for index, rows in stream_hidden_states(model, head, sequences, batch_size, on_batch)
    }
    return [states[index] for index in range(len(sequences))]


class SpooledStates:
    """Hidden states of texts in a temporary file; in memory are only their places in it.

    The file has no name, so that nothing of it is left when the process ends, however it ends.
    """

    def __init__(self, file: FileIO, device: torch.device) -> None:
        """Make an empty spool.

        Args:
            file: an empty file that is open for reading and writing, without a buffer, which
                would be written again, and fail again, when a file on a full disk is closed.
            device: the device of the tensors that are read.
        """
        self._file = file
        self._device = device
        self._places: dict[int, tuple[int, torch.Size, torch.dtype]] = {}
        self._end = 0  # offset of the file's end, in bytes

    def write(self, index: int, states: Tensor) -> None:
        """Append a text's hidden states, (tokens, width) of any floating dtype.

        Raises:
            OSError: the file cannot be written, for example because the disk is full.
        """
        data = memoryview(states.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        self._places[index] = (self._end, states.shape, states.dtype)
        self._end += len(data)
        while data:
            data = data[self._file.write(data) :]

    def __len__(self) -> int:
        """Return the number of texts that were written."""
        return len(self._places)

    def __getitem__(self, index: int, /) -> Tensor:
        """Read a text's hidden states, (tokens, width) float32, on the spool's device.

        Raises:
            OSError: the file cannot be read.
        """
        offset, shape, dtype = self._places[index]
        data = bytearray(shape.numel() * dtype.itemsize)
        self._file.seek(offset)
        if self._file.readinto(data) != len(data):
            raise OSError(errno.EIO, os.strerror(errno.EIO), "the file of the hidden states")
        return torch.frombuffer(data, dtype=dtype).view(shape).to(self._device, torch.float32)

    def __iter__(self) -> Iterator[Tensor]:
        """Read one text after another, in the order of their indices."""
        return (self[index] for index in range(len(self)))


@contextmanager
def spooled_hidden_states(
    model: nn.Module,
    head: nn.Module,
    texts: Sequence[Continuation],
    batch_size: int,
    folder: Path,
    on_batch: Callable[[int, int], None] | None = None,
) -> Iterator[SpooledStates]:
    """Run the model on texts, and keep their hidden states in a temporary file within the context.

    Memory holds one forward pass's activations at a time: those of `batch_size` texts, without
    logits. The file holds tokens x width numbers in the model's dtype.

    Args:
        model: a causal language model.
        head: its language-model head; see `stream_hidden_states`.
        texts: the texts; what is kept of each begins at its `start`.
        batch_size: texts in a forward pass.
        folder: where the temporary file is made.
        on_batch: called after every forward pass with (texts done, texts in all).

    Raises:
        FitError: a text has no token, the model does not run the head, its hidden states are not
            finite, or the file cannot be written.
    """
    with ExitStack() as opened:
        with _disk_errors_explained(folder):
            file = opened.enter_context(tempfile.TemporaryFile(buffering=0, dir=folder))
        spool = SpooledStates(file, model_device(model))
        sequences = [text.token_ids for text in texts]
        for index, rows in stream_hidden_states(model, head, sequences, batch_size, on_batch):
            if not torch.isfinite(rows).all():
                raise FitError(
                    "the model's hidden states are not finite: load it in another dtype, "
                    "bfloat16 or float32"
                )
            with _disk_errors_explained(folder):
                spool.write(index, rows[texts[index].start :])
        yield spool


@contextmanager
def _disk_errors_explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FitError(
            f"cannot keep the hidden states in a file in {folder} ({error.strerror}): make room "
            "or choose another folder"
        ) from error
