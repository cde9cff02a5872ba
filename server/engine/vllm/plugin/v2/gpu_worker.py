"""The steered worker for an NVIDIA GPU with vLLM's V2 runner. It was never run."""

from vllm.v1.worker.gpu_worker import Worker

from server.engine.vllm.plugin.v2.runner import SteeredV2Runner
from server.engine.vllm.plugin.v2.worker import SteeredV2Worker
from steering.kernels.affine_triton import edit_in_place_triton
from steering.kernels.routed_edit import use_routed_kernel_on_gpus


class SteeredV2GPUWorker(SteeredV2Worker, Worker):
    """vLLM's worker for a GPU with its V2 runner, steered."""

    def _make_model_runner(self) -> SteeredV2Runner:
        """Make the runner, and have the edits computed by the kernel."""
        use_routed_kernel_on_gpus(edit_in_place_triton)
        return SteeredV2Runner(self.vllm_config, self.device)
