"""A model's decoder, called by itself: what a graph holds of the model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from server.engine.torch.cuda.decode_inputs import DecodeInputs


class DecoderCallError(Exception):
    """A model does not call its decoder as a graph could."""


class DecoderOutput(Protocol):
    """What the models' own decoders give."""

    last_hidden_state: Tensor


@dataclass(frozen=True, slots=True)
class DecoderCall:
    """What a model makes of its decoder."""

    call: Callable[[], DecoderOutput]  # the same again
    output: type
    hidden: Tensor  # (1, rows, width)


class Decoder:
    """The part of a model that gives the hidden states, which may be given instead."""

    def __init__(self, model: PreTrainedModel) -> None:
        module: object = model.get_decoder()  # type: ignore[no-untyped-call]
        assert isinstance(module, nn.Module)
        named: nn.Module = model
        self._path = next(path for path, each in named.named_modules() if each is module)
        self._own: Callable[..., DecoderOutput] = module.forward
        self._instead: Callable[..., object] | None = None
        module.forward = self._forward

    def holds(self, site: str) -> bool:
        """Whether a module is computed by the decoder's own code; its hooks are not."""
        return site.startswith(f"{self._path}.")

    def _forward(self, *args: object, **kwargs: object) -> object:
        return (self._instead or self._own)(*args, **kwargs)

    @contextmanager
    def gives(self, output: type, hidden: Tensor) -> Iterator[None]:
        """Within the context, it computes nothing and gives these hidden states."""
        self._instead = lambda *_args, **_kwargs: output(last_hidden_state=hidden)
        try:
            yield
        finally:
            self._instead = None

    def call_of(self, model: PreTrainedModel, inputs: DecodeInputs) -> DecoderCall:
        """The call that a model makes of it, on some inputs, and what it gives.

        Raises:
            DecoderCallError: the model does not give it the inputs themselves.
        """
        calls: list[tuple[tuple[object, ...], dict[str, object], DecoderOutput]] = []

        def spy(*args: object, **kwargs: object) -> object:
            output = self._own(*args, **kwargs)
            calls.append((args, kwargs, output))
            return output

        self._instead = spy
        try:
            model(
                input_ids=inputs.input_ids,
                position_ids=inputs.position_ids,
                logits_to_keep=1,
                use_cache=False,
            )
        finally:
            self._instead = None
        if len(calls) != 1:
            raise DecoderCallError(f"{type(model).__name__} calls its decoder {len(calls)} times")
        [(args, kwargs, output)] = calls
        given = [*args, *kwargs.values()]
        tensors = [each for each in given if isinstance(each, Tensor)]
        if {*map(id, tensors)} != {id(inputs.input_ids), id(inputs.position_ids)}:
            raise DecoderCallError(f"{type(model).__name__} gives its decoder other inputs")
        return DecoderCall(
            lambda: self._own(*args, **kwargs), type(output), output.last_hidden_state
        )
