"""Runs the model on a GPU, on batches that were built on the CPU."""

from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from server.engine.torch.attention.paged_attention import PagedStep
from server.engine.torch.attention.staging import index_tensors, with_index_tensors
from server.engine.torch.model.transfer import to_device
from server.engine.torch.step.batch import Batch
from server.engine.torch.step.runner import Runner
from steering.bank import Bank
from steering.dose import DoseMeter
from steering.hooks import SteeringHooks


class StagedRunner(Runner):
    """Runs the model over pages, on batches all of whose tensors are on the CPU."""

    def __init__(self, model: PreTrainedModel, hooks: SteeringHooks, device: torch.device) -> None:
        super().__init__(model, hooks)
        self._device = device

    def run(self, batch: Batch, bank: Bank, meter: DoseMeter | None = None) -> Tensor:
        """Copy the batch to the device, then run the model; see `Runner.run`."""
        return super().run(_on_device(batch, self._device), bank, meter)


def paged_step(batch: Batch) -> PagedStep:
    """Return the attention of a batch that was built for pages."""
    assert isinstance(batch.attention, PagedStep), "a batch for another memory"
    return batch.attention


def _on_device(batch: Batch, device: torch.device) -> Batch:
    """Copy all of a batch's tensors to a device at once."""
    step = paged_step(batch)
    of_index, of_route = index_tensors(step.index), batch.route.tensors()
    inputs = [batch.input_ids, batch.position_ids, batch.logits_rows]
    moved = to_device([*inputs, *of_index, *of_route], device)
    input_ids, position_ids, logits_rows, *rest = moved
    return replace(
        batch,
        input_ids=input_ids,
        position_ids=position_ids,
        logits_rows=logits_rows,
        attention=step.moved(with_index_tensors(step.index, rest[: len(of_index)])),
        route=batch.route.with_tensors(rest[len(of_index) :], device),
    )
