"""What the answers of every endpoint that generates have in common: the object around choices."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pydantic import JsonValue

from server.api.fields import StreamOptions
from server.api.generations import Usage
from server.engine.base import StepOutput
from server.records import Operation


class Choice(Protocol):
    """One choice of an answer, in an endpoint's own shape."""

    def anew(self) -> "Choice":
        """An empty one, told in the same way."""
        ...

    def add(self, output: StepOutput) -> None:
        """Append what one step gave."""
        ...

    def body(self) -> dict[str, JsonValue]:
        """The choice of a whole answer, from all that was added."""
        ...

    def deltas(self, output: StepOutput) -> Sequence[dict[str, JsonValue]]:
        """The choice in a stream's next chunks; none where the step has nothing for the client.

        The last of them, and no other, has a `finish_reason` that is not null.
        """
        ...


@dataclass(frozen=True, slots=True)
class Wording:
    """What an endpoint calls its objects."""

    operation: Operation  # as OpenTelemetry calls it
    id_prefix: str
    answer: str
    chunk: str


@dataclass(frozen=True, slots=True)
class Frame:
    """What the answer and every chunk of one request have in common."""

    id: str
    created: int  # Unix seconds
    model: str
    fingerprint: str  # of the loaded model, in short
    steering: Sequence[JsonValue]
    wording: Wording

    def answer(
        self, choices: Iterable[JsonValue], usage: Usage, further: Mapping[str, JsonValue]
    ) -> dict[str, JsonValue]:
        """The whole answer; `further` fields are what is told beside its choices."""
        body = self._body(self.wording.answer, choices)
        return body | {"usage": usage.body} | self._ending(further)

    def chunk(
        self, choice: dict[str, JsonValue], usage: Usage, options: StreamOptions
    ) -> dict[str, JsonValue]:
        """A stream's chunk, `usage` being what there is so far.

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
        """The chunk after the last choice, with the tokens' count if it is asked for."""
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
