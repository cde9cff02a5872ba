"""Parses the items of an input of `POST /v1/responses` into the messages of a conversation."""

from collections.abc import Sequence
from typing import Any, Final

from server.api.calls import Calls
from server.api.errors import invalid
from server.api.messages import (
    ASSISTANT,
    HINTS,
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
_RESULT_FIELDS: Final = _ITEM_FIELDS | {"call_id", "output", "name"}
# A part of an answer that comes back has the last two.
_PART_FIELDS: Final = HINTS | {"type", "text", "annotations", "logprobs"}
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
    if not conversation.messages:
        raise invalid("'input' has no message.", "input", "invalid_value")
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
        item = {name: value for name, value in item.items() if value is not None}
        kind = item.get("type", "message")
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
        given = required(item, "content", param)
        content = _text(given, f"{param}.content")
        if role != ASSISTANT:
            if given == []:
                message = f"'{param}.content' has no parts."
                raise invalid(message, f"{param}.content", "invalid_value")
            self._turn = None
            self.messages.append({"role": ROLES[role], "content": content})
        else:
            self._append("content", content)

    def _add_reasoning(self, item: dict[str, Any], param: str) -> None:
        # The summary and the encrypted content are for OpenAI's own models.
        if text := _text(item.get("content", ""), f"{param}.content"):
            self._append("reasoning_content", text)

    def _add_call(self, item: dict[str, Any], param: str) -> None:
        call_id = string(required(item, "call_id", param), f"{param}.call_id")
        name = string(required(item, "name", param), f"{param}.name")
        arguments = required(item, "arguments", param)
        call = self._called.add(call_id, name, arguments, f"{param}.arguments")
        self._own_turn().setdefault("tool_calls", []).append(call)

    def _add_result(self, item: dict[str, Any], param: str) -> None:
        check_known(item, _RESULT_FIELDS, param)
        call_id = string(required(item, "call_id", param), f"{param}.call_id")
        content = _text(required(item, "output", param), f"{param}.output")
        self._turn = None
        result = {"role": TOOL, "tool_call_id": call_id, "content": content}
        names = self._called.names
        self.messages.append(result | ({"name": names[call_id]} if call_id in names else {}))

    def _append(self, name: str, text: str) -> None:
        """Append a text to a field of the assistant's message."""
        turn = self._own_turn()
        turn[name] = "\n".join(filter(None, (turn.get(name), text)))

    def _own_turn(self) -> dict[str, Any]:
        """Return the message of the assistant's turn, which a user's item or a result ends."""
        if self._turn is None:
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
    value = {name: each for name, each in value.items() if each is not None}
    kind = string(required(value, "type", param), f"{param}.type")
    if kind == "refusal":
        return string(required(value, "refusal", param), f"{param}.refusal")
    if kind not in _TEXT_PARTS:
        raise no_text_part(kind, f"{param}.type")
    check_known(value, _PART_FIELDS, param)
    return string(required(value, "text", param), f"{param}.text")


def with_instructions(instructions: str | None, messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return a conversation with instructions before it, if there are any."""
    before = () if instructions is None else ({"role": "system", "content": instructions},)
    return (*before, *messages)
