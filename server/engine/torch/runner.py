"""Runs the model on one batch, edited as its route says."""

from contextlib import ExitStack

import torch
from torch import Tensor
from transformers import PreTrainedModel

from server.engine.torch.batch import Batch
from server.engine.torch.compiled import CompiledLayers
from steering.bank import Bank
from steering.dose import DoseMeter
from steering.hooks import SteeringHooks


class Runner:
    """The model, the hooks in it, and its compiled layers, if there are any."""

    def __init__(
        self,
        model: PreTrainedModel,
        hooks: SteeringHooks,
        compiled: CompiledLayers | None = None,
    ) -> None:
        self._model = model
        self._hooks = hooks
        self.compiled = compiled

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
