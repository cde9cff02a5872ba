"""pydantic-ai's agents."""

import asyncio
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
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

PROVIDER = OpenAIProvider(base_url=f"{URL}/v1", api_key="none")
LIKE: Any = OpenAIChatModel(MODEL, provider=PROVIDER)


class Person(BaseModel):
    name: str
    age: int


class get_weather(BaseModel):  # noqa: N801 - the tool's name
    city: str


def ask(text: str, output: Any = str, **fields: Any) -> Any:
    settings: Any = {"temperature": 0, "max_tokens": TOKENS, **fields}
    return Agent(LIKE, output_type=output, model_settings=settings).run_sync(text).output


def chat() -> None:
    same(ask(PROMPT), BASE)


def stream() -> None:
    async def collect() -> str:
        settings: Any = {"temperature": 0, "max_tokens": TOKENS}
        async with Agent(LIKE, model_settings=settings).run_stream(PROMPT) as streamed:
            return "".join([piece async for piece in streamed.stream_text(delta=True)])

    same(asyncio.run(collect()), BASE)


def steering() -> None:
    same(ask(PROMPT, extra_body=STEERING), STEERED)


def tool() -> None:
    made = ask(WEATHER, ToolOutput(get_weather, name="get_weather"), max_tokens=60)
    called("get_weather", made.model_dump())


def structure() -> None:
    assert isinstance(ask(PERSON, NativeOutput(Person), max_tokens=60), Person)


run(chat=chat, stream=stream, steering=steering, tool=tool, structure=structure)
