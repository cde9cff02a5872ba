"""One generation of a request: what it has given so far."""

from dataclasses import dataclass, field

from server.engine.base import FinishReason, Request, StepOutput


@dataclass(slots=True)
class Progress:
    """A generation's tokens, text and times, up to now."""

    request: Request
    tokens: int = 0
    finish_reason: FinishReason | None = None
    queue_seconds: float | None = None  # from submission to the first step
    first_token_seconds: float | None = None  # from the HTTP request's arrival
    last_token: float | None = None  # by time.perf_counter()
    _texts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The completion, without an echo of its prompt."""
        return "".join(self._texts)

    def add(self, output: StepOutput) -> None:
        """Append what one step gave."""
        self.tokens += len(output.token_ids)
        self.finish_reason = output.finish_reason
        self._texts.append(output.text)
        if output.queue_seconds is not None:
            self.queue_seconds = output.queue_seconds
