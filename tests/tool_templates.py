"""Templates for the tiny models that know tools."""

import json
from pathlib import Path
from typing import Any, Final

from server.engine.templates import Templates

# Without tools, it renders a conversation as `tests.tiny.CHAT_TEMPLATE` does.
CHAT: Final = (
    "{% if messages[0].role == 'assistant' %}{{ raise_exception('Users speak first.') }}{% endif %}"
    "{% if tools %}TOOLS {{ tools | map(attribute='function.name') | join(',') }}{% endif %}"
    "{% for m in messages %}<{{ m.name or m.role }}>{{ m.reasoning_content }}{{ m.content }}"
    "{% for c in m.tool_calls %}[{{ c.function.name }} {{ c.function.arguments.x }}]{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
RESPONSE: Final[dict[str, Any]] = {
    "start_anchor": "<assistant>",
    "fields": {
        "thinking": {"open": "<think>", "close": "</think>", "repeats": True, "join": ""},
        "tool_calls": {"open": "<call>", "close": "</call>", "repeats": True, "content": "json"},
        "content": {"repeats": True, "join": "", "content_args": {"strip": False}},
    },
    "calls": {
        "mark": "<call>",
        "opening": "",
        "separator": "</call><call>",
        "closing": "</call>",
        "arguments": "arguments",
    },
}


def write_templates(folder: Path, **changes: object) -> Templates:
    """Write both templates, with changes to the response template, and return their files."""
    templates = Templates(folder / "chat.jinja", folder / "response.json")
    (folder / "chat.jinja").write_text(CHAT)
    (folder / "response.json").write_text(json.dumps(RESPONSE | changes))
    return templates
