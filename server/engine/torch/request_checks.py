"""Refuses requests that the engine could never serve, before they are queued."""

from collections.abc import Sequence
from dataclasses import dataclass

from server.engine.base import InvalidRequestError, Request


@dataclass(frozen=True, slots=True)
class RequestChecks:
    """Checks requests against the limits of an engine."""

    max_model_len: int  # tokens of a prompt and its completion
    vocab_size: int
    slots: int  # interventions that can be loaded at once

    def check(self, requests: Sequence[Request]) -> None:
        """Raise InvalidRequestError unless all requests can be served, and at the same time."""
        for request in requests:
            self._check_length(request)
            self._check_tokens(request)
        named = {edit.digest for request in requests for edit in request.effective_edits}
        if len(named) > self.slots:
            raise InvalidRequestError(
                f"{len(named)} interventions at once are more than the {self.slots} that this "
                "server can hold.",
                "steering",
            )

    def _check_length(self, request: Request) -> None:
        length, limit = len(request.prompt), self.max_model_len
        max_tokens = request.sampling.max_tokens
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

    def _check_tokens(self, request: Request) -> None:
        biased = [token for token, _ in request.sampling.logit_bias]
        for tokens, param in ((request.prompt, "prompt"), (biased, "logit_bias")):
            unknown = next((each for each in tokens if not 0 <= each < self.vocab_size), None)
            if unknown is not None:
                raise InvalidRequestError(
                    f"Token ids must be in 0..{self.vocab_size - 1}; {unknown} is not.", param
                )
