"""Steers vLLM's V1 model runner.

It overrides methods of vLLM 0.32's `vllm/v1/worker/gpu_model_runner.py`, which the runner for CPUs
inherits. Each says which promise of that method it relies on.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from vllm.config import CompilationMode
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from server.engine.vllm.plugin.known_requests import KnownRequests, StepPart
from server.engine.vllm.plugin.kv_blocks import unfilled_blocks
from server.engine.vllm.plugin.sampler import ExactSampler
from server.engine.vllm.plugin.steered_model import SteeredModel
from server.engine.vllm.plugin.wire import Layout


class SteeredRunner(GPUModelRunner):
    """A mixin before a V1 runner."""

    steered: SteeredModel
    known: KnownRequests
    sampler: Any  # vLLM's own attributes, as far as they are replaced here
    num_prompt_logprobs: dict[str, int]

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
        self.sampler = ExactSampler(self.sampler.logprobs_mode, self.sampler.use_fp64_gumbel)

    def _update_states(self, scheduler_output: SchedulerOutput) -> Any:
        """Take the requests that vLLM schedules for the first time; forget those that ended.

        A preempted request is neither, and comes back among `scheduled_cached_reqs`. A request may
        end in the same step in which another one begins under its id.

        Blocks of the KV cache that a request begins to fill are zeroed; see `unfilled_blocks`.
        """
        for request_id in scheduler_output.finished_req_ids:
            self.known.forget(request_id)
        for new in scheduler_output.scheduled_new_reqs:
            self.known.admit(new.req_id, new.sampling_params.extra_args)
        groups = self.kv_cache_config.kv_cache_groups
        self._zero_block_ids(list(unfilled_blocks(scheduler_output, groups)))
        return super()._update_states(scheduler_output)

    def _model_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Write the step's route, then run the model. Real steps come here, dummy ones do not."""
        self.known.begin_step(tuple(self._parts()))
        output = super()._model_forward(*args, **kwargs)
        self.steered.measuring.lap()
        return output

    def _parts(self) -> Iterator[StepPart]:
        batch, starts = self.input_batch, self.query_start_loc.np
        for row, request_id in enumerate(batch.req_ids):
            yield StepPart(
                request_id,
                start=int(batch.num_computed_tokens_cpu[row]),
                count=int(starts[row + 1] - starts[row]),
                prompt_length=int(batch.num_prompt_tokens[row]),
            )

    def _sample(self, logits: Tensor | None, spec_decode_metadata: Any) -> SamplerOutput:
        """Give seeded rows their random numbers for this step only.

        vLLM's own per-request generators are not used: after a chunk of a prompt it sets them back
        by an offset, which a CPU's generator does not have, and the engine dies.
        """
        generators = self.input_batch.sampling_metadata.generators
        generators.update(self.known.generators(self.device))
        try:
            return super()._sample(logits, spec_decode_metadata)
        finally:
            generators.clear()
            self.steered.measuring.lap()

    def _get_prompt_logprobs_dict(
        self, hidden_states: Tensor, num_scheduled_tokens: dict[str, int]
    ) -> dict[str, LogprobsTensors | None]:
        """Score the prompts one by one, since vLLM does not say whose rows it computes."""
        wanted = self.num_prompt_logprobs
        found: dict[str, LogprobsTensors | None] = {}
        try:
            for request_id, count in tuple(wanted.items()):
                self.num_prompt_logprobs = {request_id: count}
                with self.steered.scoring(self.known.edits(request_id)):
                    found |= super()._get_prompt_logprobs_dict(hidden_states, num_scheduled_tokens)
                if request_id not in self.num_prompt_logprobs:  # its last chunk was scored
                    del wanted[request_id]
        finally:
            self.num_prompt_logprobs = wanted
        return found

    def _dummy_run(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Run the model without requests: to measure memory, to compile, to capture graphs."""
        with self.steered.at_rest():
            return super()._dummy_run(*args, **kwargs)

    def _dummy_sampler_run(self, hidden_states: Tensor) -> Tensor:
        with self.steered.at_rest():
            return super()._dummy_sampler_run(hidden_states)
