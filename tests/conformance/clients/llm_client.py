"""The `llm` command's library. It sends no further fields, so the model's name steers."""

import os
import tempfile
from pathlib import Path

from checks import (
    BASE,
    CITY,
    MODEL,
    PERSON,
    PROMPT,
    STEERED,
    TOKENS,
    URL,
    WEATHER,
    called,
    run,
    same,
)

FOLDER = Path(tempfile.mkdtemp())
os.environ["LLM_USER_PATH"] = str(FOLDER)
(FOLDER / "extra-openai-models.yaml").write_text(
    "".join(
        f"- model_id: {name}\n  model_name: {name}\n  api_base: {URL}/v1\n"
        "  supports_tools: true\n  supports_schema: true\n"
        for name in (MODEL, f"{MODEL}+detox-lineas")
    )
)

import llm  # noqa: E402 - it reads the folder


def ask(text: str, name: str = MODEL, *, stream: bool = False) -> str:
    return str(
        llm.get_model(name).prompt(
            text, key="none", stream=stream, temperature=0, max_tokens=TOKENS
        )
    )


def chat() -> None:
    same(ask(PROMPT), BASE)


def stream() -> None:
    same(ask(PROMPT, stream=True), BASE)


def steering() -> None:
    same(ask(PROMPT, f"{MODEL}+detox-lineas"), STEERED)


def tool() -> None:
    weather = llm.Tool("get_weather", "Get the weather of a city", CITY)
    answer = llm.get_model(MODEL).prompt(
        WEATHER, key="none", stream=False, tools=[weather], temperature=0, max_tokens=60
    )
    calls = answer.tool_calls()  # `llm` cannot demand a call, and a small model chooses none
    for call in calls:
        called(call.name, call.arguments)


def structure() -> None:
    schema = llm.schema_dsl("name, age int")
    answer = llm.get_model(MODEL).prompt(
        PERSON, key="none", stream=False, schema=schema, temperature=0, max_tokens=60
    )
    assert '"age"' in answer.text()


run(chat=chat, stream=stream, steering=steering, tool=tool, structure=structure)
