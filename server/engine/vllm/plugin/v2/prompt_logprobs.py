"""vLLM's scoring of prompts in its V2 runner, with each token's row steered as its request asks."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker

from server.engine.vllm.plugin.known_requests import KnownRequests


class SteeredPromptLogprobs(PromptLogprobsWorker):
    """Says whose rows vLLM computes: if one request wants scores, those of the whole step."""

    def __init__(self, own: PromptLogprobsWorker, known: KnownRequests) -> None:
        """`own` is what vLLM has made, and has not used yet."""
        super().__init__(own.max_num_reqs, own.device, own.logprobs_mode)
        self._known = known

    def compute_prompt_logprobs(
        self,
        logits_fn: Callable[[Tensor], Tensor],
        hidden_states: Tensor,
        input_batch: InputBatch,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Score prompts. Logits are computed of the step's tokens, some 1,024 at a time."""
        with self._known.scoring_tokens():
            return super().compute_prompt_logprobs(
                logits_fn, hidden_states, input_batch, *args, **kwargs
            )
