"""The `llm` command's library. It sends no further fields, so the model's name steers.

It cannot demand a call of a tool, and a small model makes none by itself.
"""

import os
import tempfile
from pathlib import Path

from checks import (
    BASE,
    MODEL,
    PERSON,
    PROMPT,
    STEERED,
    TOKENS,
    URL,
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


def structure() -> None:
    schema = llm.schema_dsl("name, age int")
    answer = llm.get_model(MODEL).prompt(
        PERSON, key="none", stream=False, schema=schema, temperature=0, max_tokens=60
    )
    assert '"age"' in answer.text()


run(chat=chat, stream=stream, steering=steering, structure=structure)
