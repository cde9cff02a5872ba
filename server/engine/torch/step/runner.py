"""Runs the model on one batch; hooks edit its activations as the batch's route says."""

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
        """The number of compilations that run or wait."""
        ...

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing is pending; False if that takes longer than `timeout` seconds."""
        ...

    def step(
        self, bank: Bank, route: Route, tokens: int, meter: DoseMeter | None = None
    ) -> AbstractContextManager[None]:
        """Return a context in which the layers that are compiled already run compiled.

        Args:
            bank: the parameters of the step's edits.
            route: the step's route.
            tokens: the number of the step's tokens.
            meter: adds up the edits' doses, if given.
        """
        ...


class Runner:
    """Runs the model, with its hooks, and its compiled layers if there are any."""

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
        """The number of graphs that would make steps faster and are not made yet."""
        return 0 if self.compiled is None else self.compiled.pending

    def make_pending(self) -> bool:
        """Make one pending graph that the calling thread has to make; False if there is none.

        This runner's graphs are made by another thread.
        """
        return False

    @torch.inference_mode()
    def run(self, batch: Batch, bank: Bank, meter: DoseMeter | None = None) -> Tensor:
        """Compute the logits at the batch's `logits_rows`: (rows, vocabulary) float32.

        A meter, if one is given, measures how large the edits are.
        """
        tokens = batch.input_ids.numel()
        with ExitStack() as step:
            step.enter_context(batch.attention.activate())
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
