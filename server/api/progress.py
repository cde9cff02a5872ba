"""One generation of a request: what it has given so far."""

from dataclasses import dataclass, field

from server.engine.base import FinishReason, Request, StepOutput


@dataclass(slots=True)
class Progress:
    """A generation's tokens, text and times, up to now."""

    request: Request  # as its client means it
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # of each token, if the engine tells them
    base_logprobs: list[float] = field(default_factory=list)  # the same by the base model
    to_score: bool = False  # the base model has still to do so
    cached_tokens: int = 0  # of the prompt
    finish_reason: FinishReason | None = None
    queue_seconds: float | None = None  # from submission to the first step
    first_token_seconds: float | None = None  # from the HTTP request's arrival
    last_token: float | None = None  # by time.perf_counter()
    _texts: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """How many tokens there are."""
        return len(self.token_ids)

    @property
    def complete(self) -> bool:
        """Whether nothing more is to come."""
        return self.finish_reason is not None and not self.to_score

    @property
    def text(self) -> str:
        """The completion, without an echo of its prompt."""
        return "".join(self._texts)

    def add(self, output: StepOutput) -> None:
        """Append what one step gave."""
        self.token_ids += output.token_ids
        self.logprobs += [token.chosen.logprob for token in output.logprobs]
        self.cached_tokens += output.cached_tokens
        self.finish_reason = output.finish_reason
        self._texts.append(output.text)
        if output.queue_seconds is not None:
            self.queue_seconds = output.queue_seconds
