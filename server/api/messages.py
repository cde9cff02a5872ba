"""Parses the messages of a conversation into the form that a chat template takes."""

import json
from collections.abc import Mapping
from typing import Final

from server.api.calls import Calls
from server.api.errors import ApiError, invalid
from server.api.parsing import UNSUPPORTED, required, string
from server.engine.chat import Conversation, Message

MAX_MESSAGES: Final = 2048  # as many as OpenAI takes
MAX_CALLS: Final = 128  # of one message

# OpenAI's role `developer` is `system` to chat templates.
ROLES: Final[Mapping[str, str]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
ASSISTANT: Final = "assistant"
TOOL: Final = "tool"
# Fields beside a message's text for which templates have no place. They must be empty, as they are
# in an answer that a client sends back. The last two ask for the message to be continued.
EMPTY_FIELDS: Final = frozenset(
    {"refusal", "audio", "images", "function_call", "prefix", "partial"}
)
HINTS: Final = frozenset({"cache_control", "prompt_cache_breakpoint"})  # where other servers cache
MESSAGE_FIELDS: Final = (
    EMPTY_FIELDS
    | HINTS
    | {"role", "content", "name", "type", "annotations", "tool_calls", "tool_call_id"}
)
PART_FIELDS: Final = HINTS | {"type", "text"}

_TEMPLATE_LENGTH: Final = 20  # characters that a chat template adds to a message, roughly


def characters(conversation: Conversation) -> int:
    """Return the length of a conversation's text, roughly."""
    values = (value for message in conversation.messages for value in message.values())
    tools = (tool.definition for tool in conversation.tools)
    length = sum(len(str(value)) for value in (*values, *tools))
    return length + _TEMPLATE_LENGTH * len(conversation.messages)


def shown_text(message: Message) -> str:
    """Return a message's text, and after it the calls that it makes, as JSON."""
    calls = message.get("tool_calls")
    return f"{message['content']}{json.dumps(calls) if calls else ''}"


def parse_messages(value: object) -> tuple[Message, ...]:
    """Return messages in the form that chat templates expect, or raise a 400."""
    if not isinstance(value, list):
        raise invalid("'messages' must be a list of messages.", "messages", "invalid_type")
    if not 0 < len(value) <= MAX_MESSAGES:
        message = f"'messages' has {len(value)} messages; it takes 1 to {MAX_MESSAGES}."
        raise invalid(message, "messages", "invalid_value")
    called = Calls()
    return tuple(
        _parse_message(item, f"messages[{place}]", called) for place, item in enumerate(value)
    )


def _parse_message(value: object, param: str, called: Calls) -> Message:
    if not isinstance(value, dict):
        raise invalid(f"'{param}' must be an object.", param, "invalid_type")
    # The role comes first: a message with another role is wrong for that, not for its fields.
    role = _parse_role(required(value, "role", param), f"{param}.role")
    _check_fields(value, role, param)
    calls = _parse_calls(value.get("tool_calls") or [], f"{param}.tool_calls", called)
    message: dict[str, object] = {"role": role, "content": ""}
    if not calls or value.get("content"):
        content = required(value, "content", param)
        message["content"] = _parse_content(content, f"{param}.content")
    if value.get("name") is not None and (name := string(value["name"], f"{param}.name")):
        message["name"] = name  # some templates use it
    if role == ASSISTANT and isinstance(reasoning := value.get("reasoning_content"), str):
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    if role == TOOL:
        answered = string(required(value, "tool_call_id", param), f"{param}.tool_call_id")
        message["tool_call_id"] = answered
        if answered in called.names:
            message.setdefault("name", called.names[answered])  # some templates need it
    return message


def _check_fields(value: dict[str, object], role: str, param: str) -> None:
    if role != ASSISTANT:
        # The assistant's messages may have unknown fields: other servers add sources and more.
        check_known(value, MESSAGE_FIELDS, param)
    if value.get("type") not in (None, "text", "message"):  # lm-evaluation-harness sends a type
        raise no_text_part(value["type"], f"{param}.type")
    for name in sorted(EMPTY_FIELDS & value.keys()):
        _check_empty(value[name], f"{param}.{name}")
    for name, owner in (("tool_calls", ASSISTANT), ("tool_call_id", TOOL)):
        if value.get(name) and role != owner:
            message = f"'{name}' is only allowed in a message of the role '{owner}'."
            raise invalid(message, f"{param}.{name}", "invalid_value")


def _parse_calls(value: object, param: str, called: Calls) -> list[dict[str, object]]:
    """Return calls in OpenAI's form, but with their arguments as objects."""
    if not isinstance(value, list):
        raise invalid(f"'{param}' must be a list of calls.", param, "invalid_type")
    if len(value) > MAX_CALLS:
        message = f"'{param}' has {len(value)} calls, more than {MAX_CALLS}."
        raise invalid(message, param, "invalid_value")
    return [_parse_call(call, f"{param}[{place}]", called) for place, call in enumerate(value)]


def _parse_call(value: object, param: str, called: Calls) -> dict[str, object]:
    if not isinstance(value, dict):
        raise invalid(f"'{param}' must be an object.", param, "invalid_type")
    if value.get("type") not in (None, "function"):
        message = f"This server supports calls of functions only, and '{param}' is another."
        raise invalid(message, f"{param}.type", UNSUPPORTED)
    function = required(value, "function", param)
    if not isinstance(function, dict):
        raise invalid(f"'{param}.function' must be an object.", f"{param}.function", "invalid_type")
    inner = f"{param}.function"
    name = string(required(function, "name", inner), f"{inner}.name")
    arguments = required(function, "arguments", inner)
    call_id = string(required(value, "id", param), f"{param}.id")
    return called.add(call_id, name, arguments, f"{inner}.arguments")


def _parse_role(value: object, param: str) -> str:
    role = string(value, param)
    if role not in ROLES:
        message = f"'{param}' is '{role[:100]}'; this server supports {', '.join(ROLES)}."
        raise invalid(message, param, UNSUPPORTED)
    return ROLES[role]


def check_known(value: dict[str, object], known: frozenset[str], param: str) -> None:
    """Raise a 400 if the object at `param` has another field than the known ones."""
    for name in value:
        if name not in known:
            field = f"{param}.{name[:100]}"
            message = f"Unrecognized request argument supplied: {field}."
            raise invalid(message, field, "unknown_parameter")


def _check_empty(value: object, param: str) -> None:
    if value not in (None, False, "", [], {}):
        raise invalid(f"This server does not support '{param}'.", param, UNSUPPORTED)


def _parse_content(value: object, param: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        message = f"'{param}' must be a string or a list of text parts."
        raise invalid(message, param, "invalid_type")
    return "".join(_parse_part(part, f"{param}[{place}]") for place, part in enumerate(value))


def _parse_part(value: object, param: str) -> str:
    if not isinstance(value, dict):
        message = f"'{param}' must be an object with 'type' and 'text'."
        raise invalid(message, param, "invalid_type")
    kind = required(value, "type", param)
    if kind != "text":
        raise no_text_part(kind, f"{param}.type")
    check_known(value, PART_FIELDS, param)
    return string(required(value, "text", param), f"{param}.text")


def no_text_part(kind: object, param: str) -> ApiError:
    """Return the error for content of another kind than text."""
    message = f"'{param}' is '{string(kind, param)[:100]}'; this server supports text only."
    return invalid(message, param, UNSUPPORTED)
