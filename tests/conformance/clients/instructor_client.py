"""instructor, over openai-python, by tools and by JSON schemas."""

from typing import Any

import instructor
from checks import MODEL, PERSON, STEERING, URL, WEATHER, called, run
from openai import OpenAI
from pydantic import BaseModel

CLIENT = OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)


class Person(BaseModel):
    name: str
    age: int


class get_weather(BaseModel):  # noqa: N801 - the tool's name
    """Get the weather of a city."""

    city: str


def ask(mode: instructor.Mode, text: str, model: Any, **fields: Any) -> Any:
    return instructor.from_openai(CLIENT, mode=mode).chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": text}],
        response_model=model,
        temperature=0,
        max_tokens=200,
        max_retries=0,
        **fields,
    )


def tool() -> None:
    called("get_weather", ask(instructor.Mode.TOOLS, WEATHER, get_weather).model_dump())


def structure() -> None:
    assert isinstance(ask(instructor.Mode.JSON_SCHEMA, PERSON, Person), Person)


def steering() -> None:
    found = ask(instructor.Mode.TOOLS, PERSON, Person, extra_body=STEERING)
    applied = found._raw_response.model_extra["steering"]
    assert applied[0]["intervention"] == "detox-lineas"


def stream() -> None:
    partial = instructor.Partial[Person]
    *_, last = ask(instructor.Mode.TOOLS, PERSON, partial, stream=True)
    assert Person.model_validate(last.model_dump())


run(stream=stream, steering=steering, tool=tool, structure=structure)
