"""openai-python, with its own ways to send further fields and to parse answers."""

from typing import Any

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
from openai import OpenAI
from pydantic import BaseModel

client = OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
ASKED: dict[str, Any] = {"model": MODEL, "temperature": 0, "max_tokens": TOKENS}


class Person(BaseModel):
    name: str
    age: int


def messages(text: str) -> Any:
    return [{"role": "user", "content": text}]


def chat() -> None:
    answer = client.chat.completions.create(**ASKED, messages=messages(PROMPT))
    same(answer.choices[0].message.content, BASE)


def stream() -> None:
    chunks = client.chat.completions.create(**ASKED, messages=messages(PROMPT), stream=True)
    same("".join(each.choices[0].delta.content or "" for each in chunks), BASE)


def steering() -> None:
    answer = client.chat.completions.create(**ASKED, messages=messages(PROMPT), extra_body=STEERING)
    same(answer.choices[0].message.content, STEERED)


def tool() -> None:
    function = {"name": "get_weather", "parameters": CITY, "strict": True}
    with client.chat.completions.stream(
        model=MODEL,
        messages=messages(WEATHER),
        tools=[{"type": "function", "function": function}],  # type: ignore[typeddict-item]
        tool_choice="required",
        temperature=0,
        max_tokens=60,
    ) as events:
        made = events.get_final_completion().choices[0].message.tool_calls or []
    called(made[0].function.name, made[0].function.arguments)


def structure() -> None:
    answer = client.chat.completions.parse(
        model=MODEL, messages=messages(PERSON), response_format=Person, temperature=0, max_tokens=60
    )
    assert isinstance(answer.choices[0].message.parsed, Person)


def responses() -> None:
    with client.responses.stream(
        model=MODEL, input=PROMPT, temperature=0, max_output_tokens=TOKENS, extra_body=STEERING
    ) as events:
        deltas = [each.delta for each in events if each.type == "response.output_text.delta"]
    same("".join(deltas), STEERED)


run(
    chat=chat, stream=stream, steering=steering, tool=tool, structure=structure, responses=responses
)
