"""Calls a model's decoder by itself, for graphs, which hold no other part of the model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from server.engine.torch.cuda.decode_inputs import DecodeInputs


class DecoderCallError(Exception):
    """A model calls its decoder in a way that no graph can replay."""


class DecoderOutput(Protocol):
    """The output of the decoders of transformers' models."""

    last_hidden_state: Tensor


@dataclass(frozen=True, slots=True)
class DecoderCall:
    """A call that a model made of its decoder, and its result."""

    call: Callable[[], DecoderOutput]  # repeats the call, with the same tensors
    output: type  # the class of the decoder's output
    hidden: Tensor  # (1, rows, width), the last hidden states


class Decoder:
    """The part of a model that computes hidden states, or returns given ones instead."""

    def __init__(self, model: PreTrainedModel) -> None:
        module: object = model.get_decoder()  # type: ignore[no-untyped-call]
        assert isinstance(module, nn.Module)
        named: nn.Module = model
        self._path = next(path for path, each in named.named_modules() if each is module)
        self._original: Callable[..., DecoderOutput] = module.forward
        self._replacement: Callable[..., object] | None = None
        module.forward = self._forward

    def contains(self, site: str) -> bool:
        """Return whether a site is inside the decoder; its own output, which hooks edit, is not."""
        return site.startswith(f"{self._path}.")

    def _forward(self, *args: object, **kwargs: object) -> object:
        return (self._replacement or self._original)(*args, **kwargs)

    @contextmanager
    def returning(self, output: type, hidden: Tensor) -> Iterator[None]:
        """Make the decoder return these hidden states within the context, and compute nothing."""
        self._replacement = lambda *_args, **_kwargs: output(last_hidden_state=hidden)
        try:
            yield
        finally:
            self._replacement = None

    def capture_call(self, model: PreTrainedModel, inputs: DecodeInputs) -> DecoderCall:
        """Run a model on some inputs, and return the call that it makes of its decoder.

        Raises:
            DecoderCallError: the model calls it more than once, or with tensors other than the
                inputs themselves.
        """
        calls: list[tuple[tuple[object, ...], dict[str, object], DecoderOutput]] = []

        def spy(*args: object, **kwargs: object) -> object:
            output = self._original(*args, **kwargs)
            calls.append((args, kwargs, output))
            return output

        self._replacement = spy
        try:
            model(
                input_ids=inputs.input_ids,
                position_ids=inputs.position_ids,
                logits_to_keep=1,
                use_cache=False,
            )
        finally:
            self._replacement = None
        if len(calls) != 1:
            raise DecoderCallError(f"{type(model).__name__} calls its decoder {len(calls)} times")
        [(args, kwargs, output)] = calls
        given = [*args, *kwargs.values()]
        tensors = [each for each in given if isinstance(each, Tensor)]
        if {*map(id, tensors)} != {id(inputs.input_ids), id(inputs.position_ids)}:
            raise DecoderCallError(f"{type(model).__name__} gives its decoder other inputs")
        return DecoderCall(
            lambda: self._original(*args, **kwargs), type(output), output.last_hidden_state
        )
