"""langchain-openai's ChatOpenAI."""

from typing import Any

from checks import (
    BASE,
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
from langchain_core.tools import tool as as_tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


def model(**fields: Any) -> ChatOpenAI:
    given: dict[str, Any] = {"max_completion_tokens": TOKENS, **fields}
    return ChatOpenAI(
        base_url=f"{URL}/v1", api_key="none", model=MODEL, temperature=0, max_retries=0, **given
    )


class Person(BaseModel):
    """A person."""

    name: str
    age: int


@as_tool
def get_weather(city: str) -> str:
    """Get the weather of a city."""
    return city


def chat() -> None:
    same(model().invoke(PROMPT).content, BASE)


def stream() -> None:
    same("".join(str(chunk.content) for chunk in model().stream(PROMPT)), BASE)


def steering() -> None:
    same(model(extra_body=STEERING).invoke(PROMPT).content, STEERED)


def tool() -> None:
    bound = model(max_completion_tokens=60).bind_tools([get_weather], tool_choice="required")
    for answer in (bound.invoke(WEATHER), sum_of(bound.stream(WEATHER))):
        [call] = answer.tool_calls
        called(call["name"], call["args"])


def sum_of(chunks: Any) -> Any:
    first, *others = chunks
    for other in others:
        first += other
    return first


def structure() -> None:
    asked = model(max_completion_tokens=60)
    for method in ("json_schema", "function_calling"):
        found = asked.with_structured_output(Person, method=method).invoke(PERSON)
        assert isinstance(found, Person), method


def responses() -> None:
    found = model(use_responses_api=True, extra_body=STEERING).invoke(PROMPT)
    same(found.text, STEERED)


run(
    chat=chat, stream=stream, steering=steering, tool=tool, structure=structure, responses=responses
)
