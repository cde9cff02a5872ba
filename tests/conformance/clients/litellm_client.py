"""LiteLLM's completion, for a server that speaks OpenAI's protocol."""

from typing import Any

import litellm
from checks import (
    BASE,
    CITY,
    MODEL,
    PERSON,
    PROMPT,
    STEERED,
    STEERING,
    TOKENS,
    URL,
    WEATHER,
    called,
    run,
    same,
)
from pydantic import BaseModel


class Person(BaseModel):
    name: str
    age: int


def ask(text: str, **fields: Any) -> Any:
    given: dict[str, Any] = {"max_tokens": TOKENS, "temperature": 0, **fields}
    return litellm.completion(
        model=f"openai/{MODEL}",
        api_base=f"{URL}/v1",
        api_key="none",
        messages=[{"role": "user", "content": text}],
        **given,
    )


def chat() -> None:
    same(ask(PROMPT).choices[0].message.content, BASE)


def stream() -> None:
    chunks = ask(PROMPT, stream=True)
    same("".join(chunk.choices[0].delta.content or "" for chunk in chunks), BASE)


def steering() -> None:
    same(ask(PROMPT, extra_body=STEERING).choices[0].message.content, STEERED)


def tool() -> None:
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": CITY}}]
    answer = ask(WEATHER, tools=tools, tool_choice="required", max_tokens=60)
    [call] = answer.choices[0].message.tool_calls
    called(call.function.name, call.function.arguments)


def structure() -> None:
    answer = ask(PERSON, response_format=Person, max_tokens=60)
    Person.model_validate_json(answer.choices[0].message.content)


run(chat=chat, stream=stream, steering=steering, tool=tool, structure=structure)
