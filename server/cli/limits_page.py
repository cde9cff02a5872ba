"""Writes docs/limits.md: `python -m server.cli.limits_page > docs/limits.md`."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from interventions.request_settings import Caps
from server.api.call_grammar import MAX_FORCED_CALLS
from server.api.calls import MAX_CONTAINERS
from server.api.chat_schemas import ChatRequest
from server.api.fields import (
    LARGEST_BIAS,
    MAX_BIASES,
    MAX_LOGPROBS,
    MAX_STOP_LENGTH,
    MAX_STOP_TOKENS,
    MAX_STOPS,
    TOKENS,
)
from server.api.messages import MAX_CALLS, MAX_MESSAGES
from server.api.response_schemas import ResponseRequest
from server.api.schemas import MAX_PROMPTS, CompletionRequest
from server.api.steering_resolver import MAX_STACK
from server.api.structure import MAX_CHOICES, MAX_PATTERN, MAX_STRUCTURE
from server.api.tools import MAX_TOOLS, MAX_TOOLS_SIZE
from server.engine.text.grammar_check import CPU_SECONDS, MEMORY

_HEAD: Final = """\
# Limits of a request

Written by `python -m server.cli.limits_page > docs/limits.md` from the code that checks requests. A
test holds this page to it. A request beyond a limit is a 400 that names the field, before anything
is computed. [options.md](options.md) has the limits that an operator sets: `--max-body-bytes`,
`--max-completions-per-request` (prompts times `n`; three times as many with `compare`),
`--max-model-len`, `--request-timeout` and others.

| field | limit |
|---|---|
"""
_NUMBERS: Final = """
## Numbers

The fields of `POST /v1/completions`, `POST /v1/chat/completions` and `POST /v1/responses` that take
numbers within bounds; counts of tokens are bounded by the model's context too.

| field | from | to |
|---|---|---|
"""


def limits_page() -> str:
    """Return the page, with a row for each limit and for each bounded number."""
    return _HEAD + _rows(_counts()) + _NUMBERS + _rows(_numbers())


def _counts() -> Iterator[tuple[str, str]]:
    iterations = Caps().iterations[1]
    yield "`prompt`", f"{MAX_PROMPTS:,} prompts"
    yield "`messages`, `input`", f"{MAX_MESSAGES:,} messages or items"
    yield "`messages[].tool_calls`", f"{MAX_CALLS} calls"
    yield "arguments of all calls in a conversation", f"{MAX_CONTAINERS:,} objects and lists"
    yield "`tools`", f"{MAX_TOOLS} tools, {MAX_TOOLS_SIZE:,} characters of JSON in all"
    yield "calls of an answer that must call tools", str(MAX_FORCED_CALLS)
    yield "`stop`", f"{MAX_STOPS} strings of {MAX_STOP_LENGTH:,} characters each"
    yield "`stop_token_ids`", f"{MAX_STOP_TOKENS} tokens"
    yield (
        "`logit_bias`",
        f"{MAX_BIASES} tokens, with numbers from {-LARGEST_BIAS} to {LARGEST_BIAS}",
    )
    yield "`logprobs`, `top_logprobs`, `prompt_logprobs`", f"{MAX_LOGPROBS} alternatives"
    yield "`response_format`, `structured_outputs`", f"{MAX_STRUCTURE:,} characters"
    yield "`structured_outputs.regex`, and a `grammar` in GBNF", f"{MAX_PATTERN:,} characters"
    yield "`structured_outputs.choice`", f"{MAX_CHOICES:,} strings"
    memory = MEMORY // 2**20
    yield "any structure", f"{CPU_SECONDS} seconds and {memory} MiB to compile it"
    yield "`steering`", f"{MAX_STACK} interventions"
    yield "`steering.iterations`", f"{iterations}, or what the manifest says if that is less"


def _numbers() -> Iterator[tuple[str, str, str]]:
    found: dict[str, tuple[str, str, str]] = {}
    for model in (CompletionRequest, ChatRequest, ResponseRequest):
        for name, schema in model.model_json_schema()["properties"].items():
            for form in (schema, *schema.get("anyOf", ())):
                if abs(form.get("minimum", TOKENS)) < TOKENS:
                    row = (f"`{name}`", f"{form['minimum']:g}", _upper(form))
                    found.setdefault(name, row)
    yield from (found[name] for name in sorted(found))


def _upper(form: Mapping[str, Any]) -> str:
    largest = form.get("maximum", form.get("exclusiveMaximum"))
    # Counts of tokens are bounded by their type only, and by the model's context.
    return "" if largest is None or largest >= TOKENS else f"{largest:g}"


def _rows(rows: Iterable[tuple[str, ...]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    sys.stdout.write(limits_page())
