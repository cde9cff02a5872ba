"""The steered worker for a CPU with vLLM's V2 runner.

vLLM's V2 runner needs Triton's backend for CPUs, which the CPU wheel of vLLM 0.32 lacks: vLLM says
so when it is started. The tests run this worker in Triton's interpreter.
"""

from vllm.v1.worker.cpu_worker import CPUWorker  # replaces functions that the others import

# isort: split
from vllm.v1.worker.cpu.model_runner import CPUModelRunner

from server.engine.vllm.plugin.v2.runner import SteeredV2Runner
from server.engine.vllm.plugin.v2.worker import SteeredV2Worker


class SteeredV2CPURunner(SteeredV2Runner, CPUModelRunner):
    """vLLM's V2 runner for a CPU, steered."""


class SteeredV2CPUWorker(SteeredV2Worker, CPUWorker):
    """vLLM's worker for a CPU with its V2 runner, steered."""

    def init_device(self) -> None:
        """Make the runner.

        vLLM's worker makes its own by name. Nothing has happened in the runner yet but its
        construction, which ours does not change, so that its class can be.
        """
        super().init_device()
        self.model_runner.__class__ = SteeredV2CPURunner
