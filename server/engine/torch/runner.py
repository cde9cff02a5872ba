"""Runs the model on one batch, edited as its route says."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from server.engine.torch.batch import Batch
from steering.bank import Bank
from steering.dose import DoseMeter
from steering.hooks import SteeringHooks


class Runner:
    """The model and the hooks in it."""

    def __init__(self, model: PreTrainedModel, hooks: SteeringHooks) -> None:
        self._model = model
        self._hooks = hooks

    @torch.inference_mode()
    def run(self, batch: Batch, bank: Bank, meter: DoseMeter | None = None) -> Tensor:
        """The logits of the batch's rows: (rows, vocabulary) float32.

        A meter, if one is given, learns how large the edits were.
        """
        with self._hooks.routed(bank, batch.route, meter):
            output = self._model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                logits_to_keep=batch.logits_rows,
                use_cache=False,
                attention=batch.attention,
            )
        logits: Tensor = output.logits
        return logits[0].float()
