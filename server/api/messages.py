"""Parses the messages of a conversation into the form that a chat template takes."""

from collections.abc import Mapping, Sequence
from typing import Final, TypeAlias

from server.api.errors import ApiError, invalid
from server.api.parsing import UNSUPPORTED

MAX_MESSAGES: Final = 2048  # as many as OpenAI takes

# OpenAI's role `developer` is `system` to chat templates.
ROLES: Final[Mapping[str, str]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}
ASSISTANT: Final = "assistant"
# Fields beside a message's text for which templates have no place. They must be empty, as they are
# in an answer that a client sends back. The last two ask for the message to be continued.
EMPTY_FIELDS: Final = frozenset(
    {"refusal", "audio", "images", "function_call", "tool_calls", "prefix", "partial"}
)
HINTS: Final = frozenset({"cache_control", "prompt_cache_breakpoint"})  # where other servers cache
MESSAGE_FIELDS: Final = EMPTY_FIELDS | HINTS | {"role", "content", "name", "type", "annotations"}
PART_FIELDS: Final = HINTS | {"type", "text"}

_TEMPLATE_LENGTH: Final = 20  # characters that a chat template adds to a message, roughly

Message: TypeAlias = Mapping[str, str]


def characters(messages: Sequence[Message]) -> int:
    """Return the length of a conversation's text, roughly."""
    return sum(sum(map(len, message.values())) + _TEMPLATE_LENGTH for message in messages)


def parse_messages(value: object) -> tuple[Message, ...]:
    """Return each message's `role`, `content` as one string, and `name`, or raise a 400."""
    if not isinstance(value, list):
        raise invalid("'messages' must be a list of messages.", "messages", "invalid_type")
    if not 0 < len(value) <= MAX_MESSAGES:
        message = f"'messages' has {len(value)} messages; it takes 1 to {MAX_MESSAGES}."
        raise invalid(message, "messages", "invalid_value")
    return tuple(_parse_message(item, f"messages[{place}]") for place, item in enumerate(value))


def _parse_message(value: object, param: str) -> Message:
    if not isinstance(value, dict):
        raise invalid(f"'{param}' must be an object.", param, "invalid_type")
    # The role comes first: a tool's message is wrong for its role, not for its other fields.
    role = _parse_role(_required(value, "role", param), f"{param}.role")
    if role != ASSISTANT:
        # The assistant's messages may have unknown fields: other servers add reasoning or sources.
        _check_known(value, MESSAGE_FIELDS, param)
    if value.get("type") not in (None, "text", "message"):  # lm-evaluation-harness sends a type
        raise _no_text_part(value["type"], f"{param}.type")
    for name in sorted(EMPTY_FIELDS & value.keys()):
        _check_empty(value[name], f"{param}.{name}")
    content = _required(value, "content", param)
    message = {"role": role, "content": _parse_content(content, f"{param}.content")}
    if value.get("name") is not None and (name := _string(value["name"], f"{param}.name")):
        message["name"] = name  # some templates use it
    return message


def _string(value: object, param: str) -> str:
    if not isinstance(value, str):
        raise invalid(f"'{param}' must be a string.", param, "invalid_type")
    return value


def _parse_role(value: object, param: str) -> str:
    role = _string(value, param)
    if role not in ROLES:
        message = f"'{param}' is '{role[:100]}'; this server supports {', '.join(ROLES)}."
        raise invalid(message, param, UNSUPPORTED)
    return ROLES[role]


def _check_known(value: dict[str, object], known: frozenset[str], param: str) -> None:
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
    kind = _required(value, "type", param)
    if kind != "text":
        raise _no_text_part(kind, f"{param}.type")
    _check_known(value, PART_FIELDS, param)
    return _string(_required(value, "text", param), f"{param}.text")


def _no_text_part(kind: object, param: str) -> ApiError:
    message = f"'{param}' is '{_string(kind, param)[:100]}'; this server supports text only."
    return invalid(message, param, UNSUPPORTED)


def _required(fields: dict[str, object], name: str, param: str) -> object:
    if name not in fields:
        field = f"{param}.{name}"
        message = f"Missing required parameter: '{field}'."
        raise invalid(message, field, "missing_required_parameter")
    return fields[name]
