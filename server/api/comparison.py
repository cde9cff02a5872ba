"""How much likelier an answer is to the steered model than to the base model, in any engine.

The engine tells of each token that it draws how likely the steered model found it. Afterwards the
base model reads the prompt and the answer, as token ids, and tells the same of the answer's.
"""

import math
from dataclasses import replace

from server.api.logprobs import finite
from server.api.progress import Progress
from server.engine.base import Generation, Request, SamplingSettings


def to_be_scored(request: Request) -> Request:
    """The same request, told how likely its tokens are, and with a place for the base model's."""
    sampling = replace(request.sampling, logprobs=request.sampling.logprobs or 0)
    return replace(request, sampling=sampling, followed=True)


async def begin_scoring(generation: Generation, progress: Progress) -> Generation:
    """Have the base model read what a finished generation has given, in the place held for it."""
    request = progress.request
    sampling = SamplingSettings(
        max_tokens=0, prompt_logprobs=0, prompt_logprobs_from=len(request.prompt)
    )
    text = (*request.prompt, *progress.token_ids)
    return await generation.follow(Request(f"{request.request_id}-scored", text, sampling))


def mean_log_ratio(progress: Progress) -> float | None:
    """The mean of log p_steered - log p_base over an answer's tokens, in nats; None without any.

    Both are before penalties and filters.
    """
    if not progress.tokens:
        return None
    if not progress.request.effective_edits:
        return 0.0  # the base model itself has drawn them
    pairs = zip(progress.logprobs, progress.base_logprobs, strict=True)
    return math.fsum(finite(mine) - finite(base) for mine, base in pairs) / progress.tokens
