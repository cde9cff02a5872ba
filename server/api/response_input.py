"""Parses the items of an input of `POST /v1/responses` into the messages of a conversation."""

from collections.abc import Sequence
from typing import Any, Final

from server.api.calls import Calls
from server.api.errors import invalid
from server.api.messages import (
    ASSISTANT,
    MAX_MESSAGES,
    ROLES,
    TOOL,
    check_known,
    no_text_part,
)
from server.api.parsing import UNSUPPORTED, required, string
from server.engine.chat import Message

_ITEM_FIELDS: Final = frozenset({"type", "id", "status"})
_MESSAGE_FIELDS: Final = _ITEM_FIELDS | {"role", "content", "phase"}
_RESULT_FIELDS: Final = _ITEM_FIELDS | {"call_id", "output"}
# A part of an answer that comes back has the last two.
_PART_FIELDS: Final = frozenset({"type", "text", "annotations", "logprobs"})
_TEXT_PARTS: Final = frozenset({"input_text", "output_text", "text", "reasoning_text"})


def parse_input(value: object) -> tuple[Message, ...]:
    """Return the messages of an input, a text or a list of items, or raise a 400.

    The items that make up one turn of the assistant (its reasoning, its text and its calls) become
    one message, as chat templates expect.
    """
    if isinstance(value, str):
        return ({"role": "user", "content": value},)
    if not isinstance(value, list):
        raise invalid("'input' must be a string or a list of items.", "input", "invalid_type")
    if not 0 < len(value) <= MAX_MESSAGES:
        message = f"'input' has {len(value)} items; it takes 1 to {MAX_MESSAGES}."
        raise invalid(message, "input", "invalid_value")
    conversation = _Conversation()
    for place, item in enumerate(value):
        conversation.add(item, f"input[{place}]")
    return tuple(conversation.messages)


class _Conversation:
    """The messages of the items so far."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._turn: dict[str, Any] | None = None  # the assistant's message, while items add to it
        self._called = Calls()

    def add(self, item: object, param: str) -> None:
        if not isinstance(item, dict):
            raise invalid(f"'{param}' must be an object.", param, "invalid_type")
        kind = item.get("type") or "message"
        match kind:
            case "message":
                self._add_message(item, param)
            case "reasoning":
                self._add_reasoning(item, param)
            case "function_call":
                self._add_call(item, param)
            case "function_call_output":
                self._add_result(item, param)
            case _:
                shown = string(kind, f"{param}.type")[:100]
                message = (
                    f"'{param}.type' is '{shown}'; this server supports message, reasoning, "
                    "function_call and function_call_output."
                )
                raise invalid(message, f"{param}.type", UNSUPPORTED)

    def _add_message(self, item: dict[str, Any], param: str) -> None:
        role = string(required(item, "role", param), f"{param}.role")
        if role not in ROLES or role == TOOL:
            message = (
                f"'{param}.role' is '{role[:100]}'; it takes user, system, developer, assistant."
            )
            raise invalid(message, f"{param}.role", UNSUPPORTED)
        if role != ASSISTANT:
            check_known(item, _MESSAGE_FIELDS, param)
        content = _text(required(item, "content", param), f"{param}.content")
        if role != ASSISTANT:
            self._turn = None
            self.messages.append({"role": ROLES[role], "content": content})
        else:
            turn = self._turn
            begun = turn is not None and not turn["content"] and "tool_calls" not in turn
            self._assistant(new=not begun)["content"] = content

    def _add_reasoning(self, item: dict[str, Any], param: str) -> None:
        # The summary and the encrypted content are for OpenAI's own models.
        text = _text(item.get("content") or "", f"{param}.content")
        if text:
            self._assistant(new=True)["reasoning_content"] = text

    def _add_call(self, item: dict[str, Any], param: str) -> None:
        call_id = string(required(item, "call_id", param), f"{param}.call_id")
        name = string(required(item, "name", param), f"{param}.name")
        arguments = required(item, "arguments", param)
        call = self._called.add(call_id, name, arguments, f"{param}.arguments")
        self._assistant().setdefault("tool_calls", []).append(call)

    def _add_result(self, item: dict[str, Any], param: str) -> None:
        check_known(item, _RESULT_FIELDS, param)
        call_id = string(required(item, "call_id", param), f"{param}.call_id")
        content = _text(required(item, "output", param), f"{param}.output")
        self._turn = None
        result = {"role": TOOL, "tool_call_id": call_id, "content": content}
        names = self._called.names
        self.messages.append(result | ({"name": names[call_id]} if call_id in names else {}))

    def _assistant(self, *, new: bool = False) -> dict[str, Any]:
        """Return the assistant's message that items add to."""
        if self._turn is None or new:
            self._turn = {"role": ASSISTANT, "content": ""}
            self.messages.append(self._turn)
        return self._turn


def _text(value: object, param: str) -> str:
    """Return the text of a content, which is a string or a list of parts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise invalid(f"'{param}' must be a string or a list of text parts.", param, "invalid_type")
    return "".join(_part(part, f"{param}[{place}]") for place, part in enumerate(value))


def _part(value: object, param: str) -> str:
    if not isinstance(value, dict):
        raise invalid(f"'{param}' must be an object.", param, "invalid_type")
    kind = string(required(value, "type", param), f"{param}.type")
    if kind not in _TEXT_PARTS:
        raise no_text_part(kind, f"{param}.type")
    check_known(value, _PART_FIELDS, param)
    return string(required(value, "text", param), f"{param}.text")


def with_instructions(instructions: str | None, messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return a conversation with instructions before it, if there are any."""
    before = () if instructions is None else ({"role": "system", "content": instructions},)
    return (*before, *messages)
