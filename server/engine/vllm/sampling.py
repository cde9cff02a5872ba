"""Says to vLLM how a request is sampled, which K/V it may share, and how it is steered."""

import json
from collections.abc import Sequence
from typing import Any

from vllm import SamplingParams
from vllm.inputs.engine import tokens_input
from vllm.sampling_params import RequestOutputKind

from server.engine.request import Request
from server.engine.text.answer_text import end_tokens
from server.engine.vllm.plugin.wire import LoadedEdit, Runner, Steering
from steering.settings import AffineSettings

_SMALLEST_TOP_P = 1e-9  # keeps the best token alone, as 0 does, which vLLM refuses


def sampling_params(
    request: Request,
    edits: Sequence[LoadedEdit],
    eos_tokens: frozenset[int],
    name: str,
    runner: Runner,
) -> SamplingParams:
    """Return vLLM's sampling parameters. Stop strings and ends of texts are found outside vLLM.

    Args:
        request: the request.
        edits: its edits, in loaded slots.
        eos_tokens: the tokens that end a text.
        name: by which the workers tell what they measured of its edits.
        runner: vLLM's model runner.
    """
    sampling = request.sampling
    # Draws of the V2 runner depend on a seed and a position, as the plugin makes those of V1.
    vllm_seed, plugin_seed = (None, sampling.seed) if runner == "v1" else (sampling.seed, None)
    bias: dict[int, float] = {}
    for token, added in sampling.logit_bias:
        bias[token] = bias.get(token, 0.0) + added
    return SamplingParams(
        max_tokens=max(1, sampling.max_tokens),
        temperature=sampling.temperature,
        top_p=max(sampling.top_p, _SMALLEST_TOP_P),
        top_k=sampling.top_k,
        seed=vllm_seed,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=bias or None,
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
        flat_logprobs=True,
        detokenize=False,
        # Generation ends at the tokens that the embedded engine ends at, and at no others.
        ignore_eos=True,
        stop_token_ids=sorted(end_tokens(sampling, eos_tokens)),
        min_tokens=sampling.min_tokens,
        output_kind=RequestOutputKind.DELTA,
        extra_args=Steering(tuple(edits), plugin_seed, name).to_extra_args(),
        skip_clone=True,
    )


def engine_input(request: Request) -> Any:
    """Return vLLM's prompt, with what its K/V depends on beside its tokens."""
    return tokens_input(list(request.prompt), cache_salt=cache_salt(request))


def cache_salt(request: Request) -> str | None:
    """Return a text that is equal for requests that may share K/V; None for unsteered K/V.

    vLLM puts it into the key of the first block, on which those of all others depend. Rewards edit
    no K/V. Where an edit depends on the position, K/V depends on the prompt's length.
    """
    stack = [
        (edit.digest, edit.settings.strength, edit.settings.positions)
        for edit in request.effective_edits
        if isinstance(edit.settings, AffineSettings)
    ]
    if not stack:
        return None
    depends_on_length = any(positions != "all" for _, _, positions in stack)
    return json.dumps([stack, len(request.prompt) if depends_on_length else None])
