"""Steers vLLM's worker with the V2 model runner."""

from typing import Any

from server.engine.vllm.plugin.v2.runner import SteeredV2Runner
from server.engine.vllm.plugin.worker import SteeredWorker


class SteeredV2Worker(SteeredWorker):
    """A mixin before a worker."""

    model_runner: SteeredV2Runner

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Prepare the zeroing of blocks, which vLLM does for some models only."""
        super().initialize_from_config(kv_cache_config)
        self.model_runner._init_kv_zero_meta()

    def compile_or_warm_up_model(self) -> Any:
        """Let vLLM send its own requests, before any of a client."""
        with self.model_runner.warming_up():
            return super().compile_or_warm_up_model()
