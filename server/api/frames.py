"""The objects around an answer's choices, which all endpoints that generate have in common."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pydantic import JsonValue

from server.api.fields import StreamOptions
from server.api.generations import Usage
from server.engine.output import StepOutput
from server.records import Operation


class Choice(Protocol):
    """One choice of an answer, in an endpoint's own format."""

    def empty_copy(self) -> "Choice":
        """Return an empty choice of the same index and format."""

    def shared(self) -> Mapping[str, JsonValue]:
        """Return fields beside the choices that tell of this choice's prompt; each of them once."""

    def add(self, output: StepOutput) -> None:
        """Append the output of one step."""

    def body(self) -> dict[str, JsonValue]:
        """Return the choice of a whole answer, from all outputs that were added."""

    def deltas(self, output: StepOutput) -> Sequence[dict[str, JsonValue]]:
        """Return the choice's parts for a stream's next chunks; none if the step adds nothing.

        Only the last part of a choice has a `finish_reason` that is not null.
        """


@dataclass(frozen=True, slots=True)
class Wording:
    """The names that an endpoint gives its objects."""

    operation: Operation  # OpenTelemetry's name of the operation
    id_prefix: str
    answer: str
    chunk: str


@dataclass(frozen=True, slots=True)
class Frame:
    """The fields that the answer and every chunk of one request have in common."""

    id: str
    created: int  # Unix seconds
    model: str
    fingerprint: str  # the loaded model's, shortened
    steering: Sequence[JsonValue]
    wording: Wording

    def answer(
        self, choices: Iterable[JsonValue], usage: Usage, further: Mapping[str, JsonValue]
    ) -> dict[str, JsonValue]:
        """Return the whole answer; `further` holds fields beside its choices."""
        body = self._body(self.wording.answer, choices)
        return body | {"usage": usage.body} | self._ending(further)

    def chunk(
        self, choice: dict[str, JsonValue], usage: Usage, options: StreamOptions
    ) -> dict[str, JsonValue]:
        """Return a stream's chunk with one choice's part; `usage` counts the tokens so far.

        The chunk that ends a choice says what steered it.
        """
        chunk = self._body(self.wording.chunk, [choice])
        if options.continuous_usage_stats:
            chunk["usage"] = usage.body
        elif options.include_usage:
            chunk["usage"] = None
        if choice["finish_reason"] is not None:
            chunk["steering"] = list(self.steering)
        return chunk

    def closing_chunk(
        self, usage: Usage | None, further: Mapping[str, JsonValue]
    ) -> dict[str, JsonValue]:
        """Return the chunk after the last choice, with `usage` if it is not None."""
        body = self._body(self.wording.chunk, [])
        if usage is not None:
            body["usage"] = usage.body
        return body | self._ending(further)

    def _body(self, name: str, choices: Iterable[JsonValue]) -> dict[str, JsonValue]:
        return {
            "id": self.id,
            "object": name,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"fp_{self.fingerprint}",
            "choices": list(choices),
        }

    def _ending(self, further: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
        return {"steering": list(self.steering), **further}
