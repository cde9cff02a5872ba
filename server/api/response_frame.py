"""The object around the output of `/v1/responses`, and the events of its streams."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import JsonValue

from server.api.errors import ApiError
from server.api.frames import FrameHead, event
from server.api.generations import Usage


class ResponseFrame:
    """Implements server.api.frames.Frame; each event of a stream has a number."""

    def __init__(self, echo: Mapping[str, JsonValue], head: FrameHead) -> None:
        """`echo` has the fields of the request that the answer repeats."""
        self._echo = echo
        self._head = head
        self._events = 0
        self._finished: Mapping[str, Any] = {}  # the body of the choice, once it is complete
        self._shared: dict[str, JsonValue] = {}  # fields beside it, which tell of the prompt

    def answer(
        self,
        choices: Sequence[dict[str, JsonValue]],
        usage: Usage,
        further: Mapping[str, JsonValue],
    ) -> dict[str, JsonValue]:
        """Return the whole answer, which has one choice."""
        body = dict(choices[0])
        details = body.pop("output_tokens_details")
        body["completed_at"] = int(time.time()) if body["status"] == "completed" else None
        body["usage"] = {**_usage(usage), "output_tokens_details": details}
        return {**self._body(), **body, **further}

    def part(
        self, part: dict[str, JsonValue], usage: Usage, shared: Mapping[str, JsonValue]
    ) -> bytes:
        """Return the event of a part of the output, and before the first one those of the start."""
        opening = self._opening()
        self._shared.update(shared)
        if part["type"] == "finished":
            response: Any = part["response"]
            self._finished = response
            return opening
        fields = {name: value for name, value in part.items() if name != "type"}
        return opening + self._event(str(part["type"]), **fields)

    def closing(self, usage: Usage, further: Mapping[str, JsonValue]) -> bytes:
        """Return the last event, which has the whole answer."""
        response = self.answer([dict(self._finished)], usage, {**self._shared, **further})
        return self._event(f"response.{self._finished['status']}", response=response)

    def failure(self, error: ApiError) -> bytes:
        """Return the events of an error that ends the stream."""
        told: Any = error.body["error"]
        named = {name: told[name] for name in ("message", "code", "param")}
        shown = {"code": "server_error", "message": told["message"]}
        failed = {**self._body(), "status": "failed", "error": shown}
        error_event = self._opening() + self._event("error", **named)
        return error_event + self._event("response.failed", response=failed)

    def usage(self, usage: Usage) -> dict[str, JsonValue]:
        """Return token counts in the endpoint's own form."""
        return _usage(usage)

    def _opening(self) -> bytes:
        """Return the events of the start, before the first event; nothing after that."""
        if self._events:
            return b""
        created = self._event("response.created", response=self._body())
        return created + self._event("response.in_progress", response=self._body())

    def _body(self) -> dict[str, JsonValue]:
        head = self._head
        return {
            "id": head.id,
            "object": "response",
            "created_at": head.created,
            "completed_at": None,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "model": head.model,
            "output": [],
            "usage": None,
            **self._echo,
            "system_fingerprint": f"fp_{head.fingerprint}",
            "steering": list(head.steering),
        }

    def _event(self, kind: str, **fields: JsonValue) -> bytes:
        number = self._events
        self._events += 1
        return event({"type": kind, "sequence_number": number, **fields}, kind)


def _usage(usage: Usage) -> dict[str, JsonValue]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
