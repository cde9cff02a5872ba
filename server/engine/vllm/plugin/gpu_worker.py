"""The steered worker for an NVIDIA GPU, which vLLM loads by its name. It was never run."""

from typing import Any, Final

from vllm.v1.worker.gpu_worker import Worker

from server.engine.vllm.plugin.runner import SteeredRunner
from server.engine.vllm.plugin.worker import SteeredWorker
from steering.kernels.affine_triton import edit_in_place_triton
from steering.kernels.routed_edit import use_routed_kernel_on_gpus

QUALIFIED_NAME: Final = f"{__name__}.SteeredGPUWorker"


class SteeredGPUWorker(SteeredWorker, Worker):
    """vLLM's worker for a GPU, steered."""

    model_runner: SteeredRunner

    def _make_model_runner(self) -> SteeredRunner:
        """Make the V1 runner, and have the edits computed by the kernel."""
        use_routed_kernel_on_gpus(edit_in_place_triton)
        return SteeredRunner(self.vllm_config, self.device)

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Prepare the zeroing of blocks, which vLLM does for some models only."""
        super().initialize_from_config(kv_cache_config)
        self.model_runner._init_kv_zero_meta()
