"""Steers vLLM's worker, and adds the methods to it that the service calls by name."""

from typing import Protocol

import torch
from safetensors.torch import load
from vllm.distributed.parallel_state import get_tp_group
from vllm.v1.worker.gpu_worker import Worker

from server.engine.vllm.plugin.limits import refuse_unsupported
from server.engine.vllm.plugin.orphans import end_with_server
from server.engine.vllm.plugin.steered_model import SteeredModel
from server.engine.vllm.plugin.wire import Json, Measured
from steering.stored import parameters_of


class HasSteeredModel(Protocol):
    """A steered runner, of either kind."""

    steered: SteeredModel


class SteeredWorker(Worker):
    """A mixin before a worker."""

    model_runner: HasSteeredModel

    def init_device(self) -> None:
        """Refuse what steering was not shown with, also where vLLM was started by somebody else."""
        refuse_unsupported(self.vllm_config)
        end_with_server()
        super().init_device()

    def steering_sites(self) -> list[str]:
        """Return the sites that this rank edits."""
        return list(self._steered.sites)

    def steering_load(self, slot: int, digest: str, artifact: bytes) -> None:
        """Fill a slot with an artifact's parameters. The service has checked the artifact.

        Raises:
            SteeringError: a map is at a site that was not prepared, or has another width.
        """
        tensors = {name: each.to(torch.float32) for name, each in load(artifact).items()}
        self._steered.load(slot, digest, parameters_of(tensors))

    def steering_measure(self, interval: int) -> None:
        """Measure the edits in one of `interval` steered steps from now on; 0: in none."""
        self._steered.measuring.restart(interval)

    def steering_measurements(self) -> list[Json]:
        """Return what was measured since the last call, as `Measured.from_message` reads it.

        Ranks of a tensor-parallel group measure the same: only the first of them tells it.
        """
        measured = self._steered.measuring.read()
        return (measured if get_tp_group().rank_in_group == 0 else Measured()).to_message()

    @property
    def _steered(self) -> SteeredModel:
        return self.model_runner.steered
