"""Refuses requests that the engine could never serve, before they are queued."""

from collections.abc import Sequence

from server.engine.errors import InvalidRequestError
from server.engine.request import Request


def check_requests(
    requests: Sequence[Request], max_model_len: int, vocab_size: int, slots: int
) -> None:
    """Raise InvalidRequestError unless all requests can be served, and at the same time.

    Args:
        max_model_len: the most tokens of a prompt and its completion.
        slots: interventions that can be loaded at once.
    """
    for request in requests:
        _check_length(request, max_model_len)
        _check_tokens(request, vocab_size)
    named = {edit.digest for request in requests for edit in request.effective_edits}
    if len(named) > slots:
        raise InvalidRequestError(
            f"{len(named)} interventions at once are more than the {slots} that this "
            "server can hold.",
            "steering",
        )


def _check_length(request: Request, limit: int) -> None:
    length = len(request.prompt)
    max_tokens = request.sampling.max_tokens
    if request.sampling.min_tokens > max_tokens:
        raise InvalidRequestError(
            f"'min_tokens' is {request.sampling.min_tokens}, more than the {max_tokens} tokens "
            "that the answer may have.",
            "min_tokens",
        )
    if length == 0:
        raise InvalidRequestError("The prompt is empty.", "prompt")
    if length + max_tokens > limit:
        raise InvalidRequestError(
            f"This model's maximum context length is {limit} tokens. However, you requested "
            f"{length + max_tokens} tokens ({length} in the prompt; {max_tokens} for the "
            "completion). Please reduce your prompt; or completion length.",
            # If the prompt alone fills the context, a smaller max_tokens would not help.
            "prompt" if length >= limit else "max_tokens",
            "context_length_exceeded",
        )


def _check_tokens(request: Request, vocab_size: int) -> None:
    sampling = request.sampling
    biased = [token for token, _ in sampling.logit_bias]
    for tokens, param in (
        (request.prompt, "prompt"),
        (biased, "logit_bias"),
        (sampling.stop_token_ids, "stop_token_ids"),
    ):
        unknown = next((each for each in tokens if not 0 <= each < vocab_size), None)
        if unknown is not None:
            raise InvalidRequestError(
                f"Token ids must be in 0..{vocab_size - 1}; {unknown} is not.", param
            )
