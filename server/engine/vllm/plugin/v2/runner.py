"""Steers vLLM's V2 model runner.

It overrides methods of vLLM 0.32's `vllm/v1/worker/gpu/model_runner.py`. Each says which promise of
that method it relies on.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from vllm.config import CompilationMode
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from server.engine.vllm.plugin.known_requests import KnownRequests, StepPart
from server.engine.vllm.plugin.kv_blocks import unfilled_blocks
from server.engine.vllm.plugin.steered_model import SteeredModel
from server.engine.vllm.plugin.v2.prompt_logprobs import SteeredPromptLogprobs
from server.engine.vllm.plugin.wire import Layout, Steering


class SteeredV2Runner(GPUModelRunner):
    """A mixin before a V2 runner.

    Seeds and log-probabilities are vLLM's own. Its random numbers depend on the request's seed, the
    token's position and the token (`sample/gumbel.py`); its log-probabilities are a logit minus the
    largest minus the logarithm of a sum in blocks (`sample/logprob.py`), which has no bias.
    """

    steered: SteeredModel
    known: KnownRequests
    prompt_logprobs_worker: Any  # vLLM's own attribute, replaced here
    _warms_up = False

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the weights, then install the edits: nothing has been traced by then."""
        super().load_model(*args, **kwargs)
        self.steered = SteeredModel(
            self.get_model(),
            Layout.from_config(self.vllm_config.additional_config),
            width=self.model_config.get_hidden_size(),
            tokens=self.max_num_tokens,
            is_compiled=self.compilation_config.mode != CompilationMode.NONE,
        )
        self.known = KnownRequests(self.steered)
        if self.prompt_logprobs_worker is not None:  # the last pipeline rank has it
            self.prompt_logprobs_worker = SteeredPromptLogprobs(
                self.prompt_logprobs_worker, self.known
            )

    def finish_requests(self, scheduler_output: SchedulerOutput) -> None:
        """Forget the requests that ended or were preempted. A preempted one comes back as new."""
        super().finish_requests(scheduler_output)
        for request_ids in (scheduler_output.finished_req_ids, scheduler_output.preempted_req_ids):
            for request_id in request_ids or ():
                self.known.forget(request_id)

    def add_requests(self, scheduler_output: SchedulerOutput) -> None:
        """Take the requests that begin, or come back. Called after `finish_requests`."""
        for new in scheduler_output.scheduled_new_reqs:
            args = new.sampling_params.extra_args
            self.known.admit(new.req_id, Steering().to_extra_args() if self._warms_up else args)
        super().add_requests(scheduler_output)

    @contextmanager
    def warming_up(self) -> Iterator[None]:
        """Within the context, take vLLM's own requests, which do not say how they are steered.

        It sends them through the scheduler's interface to compile kernels (`gpu/warmup.py`).
        """
        self._warms_up = True
        try:
            yield
        finally:
            self._warms_up = False

    def update_requests(self, scheduler_output: SchedulerOutput) -> None:
        """Zero the blocks that requests begin to fill, before vLLM copies others into some."""
        groups = self.kv_cache_config.kv_cache_groups
        self.kv_block_zeroer.zero_block_ids(list(unfilled_blocks(scheduler_output, groups)))
        super().update_requests(scheduler_output)

    def prepare_inputs(self, *args: Any, **kwargs: Any) -> InputBatch:
        """Write the step's route after its inputs. Real steps come here, dummy ones do not.

        The model runs next, or a graph of it is replayed, and reads the route from tensors that
        never move. Afterwards `sample` computes the logits of a row for each request.
        """
        batch = super().prepare_inputs(*args, **kwargs)
        self.known.begin_step(tuple(self._parts(batch)))
        return batch

    def _parts(self, batch: InputBatch) -> Iterator[StepPart]:
        """Yield the parts of a step, from numbers on the host: reading a GPU's would wait for it.

        `num_computed_tokens_np` may be more than a GPU's own number where drafted tokens are
        rejected; there are none, because speculative decoding is refused.
        """
        prompt_lengths = self.req_states.prompt_len.np
        for row, request_id in enumerate(batch.req_ids):
            yield StepPart(
                request_id,
                start=int(batch.num_computed_tokens_np[row]),
                count=int(batch.num_scheduled_tokens[row]),
                prompt_length=int(prompt_lengths[batch.idx_mapping_np[row]]),
            )

    def sample(self, *args: Any, **kwargs: Any) -> tuple[Any, Tensor, Tensor]:
        """Draw tokens, which ends what is measured of the step."""
        found = super().sample(*args, **kwargs)
        self.steered.measuring.lap()
        return found

    def _dummy_run(self, *args: Any, **kwargs: Any) -> tuple[Tensor | None, Tensor | None]:
        """Run the model without requests: to measure memory, and to compile."""
        with self.steered.at_rest():
            return super()._dummy_run(*args, **kwargs)

    def _dummy_sampler_run(self, hidden_states: Tensor) -> None:
        with self.steered.at_rest():
            super()._dummy_sampler_run(hidden_states)

    def capture_model(self, *args: Any, **kwargs: Any) -> int:
        """Capture CUDA graphs of the model, without requests."""
        with self.steered.at_rest():
            captured: int = super().capture_model(*args, **kwargs)
        return captured
