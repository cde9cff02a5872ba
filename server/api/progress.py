"""The progress of one generation of a request."""

from dataclasses import dataclass, field

from server.engine.output import FinishReason, StepOutput
from server.engine.request import Request


@dataclass(slots=True)
class Progress:
    """A generation's tokens, text and times, up to now.

    `add` keeps what the engine says; the caller sets the times of tokens and what scoring adds.
    """

    request: Request  # as the client asked for it, without additions for a comparison
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # of each token, if the engine was asked
    base_logprobs: list[float] = field(default_factory=list)  # by the base model
    to_score: bool = False  # True while the base model has still to score the answer
    cached_tokens: int = 0  # prompt tokens that were in the cache
    finish_reason: FinishReason | None = None
    queue_seconds: float | None = None  # from submission to the first step
    first_token_seconds: float | None = None  # from the HTTP request's arrival
    last_token: float | None = None  # when it came, by time.perf_counter()
    _texts: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """The number of the completion's tokens so far."""
        return len(self.token_ids)

    @property
    def complete(self) -> bool:
        """True once the answer, and its scoring if any, has ended."""
        return self.finish_reason is not None and not self.to_score

    @property
    def text(self) -> str:
        """The completion, without an echo of its prompt."""
        return "".join(self._texts)

    def add(self, output: StepOutput) -> None:
        """Append the output of one step."""
        self.token_ids += output.token_ids
        self.logprobs += [token.chosen.logprob for token in output.logprobs]
        self.cached_tokens += output.cached_tokens
        self.finish_reason = output.finish_reason
        self._texts.append(output.text)
        if output.queue_seconds is not None:
            self.queue_seconds = output.queue_seconds
