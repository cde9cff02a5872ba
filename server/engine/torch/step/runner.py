"""Runs the model on one batch, edited as its route says."""

from contextlib import AbstractContextManager, ExitStack
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from server.engine.torch.step.batch import Batch
from steering.bank import Bank
from steering.dose import DoseMeter
from steering.hooks import SteeringHooks
from steering.route import Route


class LayerCompiler(Protocol):
    """Compiles a model's layers in the background."""

    @property
    def pending(self) -> int:
        """What is being compiled, or waits for that."""
        ...

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until all that was asked for is made; False if it is not in `timeout` seconds."""
        ...

    def step(
        self, bank: Bank, route: Route, tokens: int, meter: DoseMeter | None = None
    ) -> AbstractContextManager[None]:
        """Within the context, a step's layers run compiled, where they are."""
        ...


class Runner:
    """The model, the hooks in it, and its compiled layers, if there are any."""

    def __init__(
        self,
        model: PreTrainedModel,
        hooks: SteeringHooks,
        compiled: LayerCompiler | None = None,
    ) -> None:
        self._model = model
        self._hooks = hooks
        self.compiled = compiled

    @property
    def pending(self) -> int:
        """What would make steps faster, and is not made yet."""
        return 0 if self.compiled is None else self.compiled.pending

    def make_pending(self) -> bool:
        """Make one thing that is pending and that this thread has to make; False if none is."""
        return False

    @torch.inference_mode()
    def run(self, batch: Batch, bank: Bank, meter: DoseMeter | None = None) -> Tensor:
        """The logits of the batch's rows: (rows, vocabulary) float32.

        A meter, if one is given, learns how large the edits were.
        """
        tokens = batch.input_ids.numel()
        with ExitStack() as step:
            step.enter_context(batch.attention.current())
            step.enter_context(self._hooks.routed(bank, batch.route, meter))
            if self.compiled is not None:
                step.enter_context(self.compiled.step(bank, batch.route, tokens, meter))
            output = self._model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                logits_to_keep=batch.logits_rows,
                use_cache=False,
            )
        logits: Tensor = output.logits
        return logits[0].float()
