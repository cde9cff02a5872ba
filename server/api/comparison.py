"""Measures how much likelier an answer is to the steered model than to the base model.

The steered model's log-probabilities come with the tokens that the engine draws. Afterwards the
base model reads the prompt and the answer as token ids, and gives its log-probabilities of the
answer's tokens. Any engine can do both.
"""

import math
from dataclasses import replace

from server.api.logprobs import finite
from server.api.progress import Progress
from server.engine.base import Generation
from server.engine.request import Request, SamplingSettings


def prepare_for_scoring(request: Request) -> Request:
    """Return the request with log-probabilities, and with a queue place for its scoring."""
    sampling = replace(request.sampling, logprobs=request.sampling.logprobs or 0)
    return replace(request, sampling=sampling, has_follower=True)


async def begin_scoring(generation: Generation, progress: Progress) -> Generation:
    """Have the base model score a finished generation, in the queue place that is held for that."""
    request = progress.request
    sampling = SamplingSettings(
        max_tokens=0, prompt_logprobs=0, prompt_logprobs_from=len(request.prompt)
    )
    text = (*request.prompt, *progress.token_ids)
    return await generation.follow(Request(f"{request.request_id}-scored", text, sampling))


def mean_log_ratio(progress: Progress) -> float | None:
    """Return the mean of log p_steered - log p_base over an answer's tokens, in nats.

    Both log-probabilities are before penalties and filters. The result is None without tokens.
    """
    if not progress.tokens:
        return None
    if not progress.request.effective_edits:
        return 0.0  # the base model itself has drawn them
    pairs = zip(progress.logprobs, progress.base_logprobs, strict=True)
    return math.fsum(finite(mine) - finite(base) for mine, base in pairs) / progress.tokens
