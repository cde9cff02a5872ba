"""The steered worker for a CPU, which vLLM loads by its name."""

from typing import Final

from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from server.engine.vllm.plugin.runner import SteeredRunner
from server.engine.vllm.plugin.worker import SteeredWorker

QUALIFIED_NAME: Final = f"{__name__}.SteeredCPUWorker"


class SteeredCPURunner(SteeredRunner, CPUModelRunner):
    """vLLM's V1 runner for a CPU, steered."""


class SteeredCPUWorker(SteeredWorker, CPUWorker):
    """vLLM's worker for a CPU, steered."""

    def init_device(self) -> None:
        """Make the runner.

        vLLM's worker makes its own by name. Nothing has happened in the runner yet but its
        construction, which ours does not change, so that its class can be.
        """
        super().init_device()
        self.model_runner.__class__ = SteeredCPURunner
