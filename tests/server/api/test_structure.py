"""Tests of `response_format` and `structured_outputs`: what is obeyed, and what is refused."""

import json
import re
from typing import Any

import httpx
import jsonschema
import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel, ConfigDict, Field

from interventions.registry import Registry
from server.api.structure import MAX_CHOICES, MAX_PATTERN, MAX_STRUCTURE
from server.engine.torch.engine import TorchEngine
from tests.conftest import WriteArtifact
from tests.live import live
from tests.serving import Json, build_app, chat, chunks, complete, error_of

OBJECT: Json = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["a"],
    "additionalProperties": False,
    # A random model would fill the answer with blanks.
    "x-guidance": {"whitespace_flexible": False},
}
UNSUPPORTED_PART: Json = {
    "type": "object",
    "properties": {"a": {"type": "array", "items": {"type": "string", "format": "frob"}}},
}


def json_schema(schema: Json, **fields: object) -> Json:
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, **fields}}


# Each has a structure, and a pattern of the whole answer.
STRUCTURES: tuple[tuple[Json, str], ...] = (
    ({"json": OBJECT}, r'\{"a":[0-9]\}'),
    ({"json": json.dumps(OBJECT)}, r'\{"a":[0-9]\}'),
    ({"regex": r"a/b\d{3}"}, "a/b[0-9]{3}"),
    ({"choice": ['say "a"', "b\n", "ü/ü"]}, '(say "a"|b\n|ü/ü)'),
    ({"grammar": 'start: word "-" word\nword: /[a-c]{2}/'}, "[a-c]{2}-[a-c]{2}"),
    ({"grammar": '?start: word "-" word\nword: /[a-c]{2}/'}, "[a-c]{2}-[a-c]{2}"),
    ({"json": None, "regex": "[xy]{3}", "choice": None}, "[xy]{3}"),
    (
        {"json": {"type": "array", "items": {"enum": [1]}, "minItems": 2, "maxItems": 3}}
        | {"disable_any_whitespace": True},
        r"\[1,1(,1)?\]",
    ),
    ({"grammar": 'root ::= word "-" word\nword ::= [a-c] [a-c]'}, "[a-c]{2}-[a-c]{2}"),
)


@pytest.mark.parametrize(("structure", "pattern"), STRUCTURES)
async def test_both_endpoints_obey_every_kind(
    chat_client: httpx.AsyncClient, structure: Json, pattern: str
) -> None:
    fields: Json = {
        "structured_outputs": structure,
        "max_tokens": 120,
        "temperature": 1,
        "seed": 3,
        "n": 3,
    }
    choices = (await complete(chat_client, **fields)).json()["choices"]
    messages = (await chat(chat_client, **fields)).json()["choices"]
    streamed = ["", "", ""]
    chunk: Any
    for chunk in chunks((await complete(chat_client, **fields, stream=True)).text):
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["text"]
    assert streamed == [choice["text"] for choice in choices]
    for text in (*streamed, *(each["message"]["content"] for each in messages)):
        assert re.fullmatch(pattern, text)
    assert {each["finish_reason"] for each in (*choices, *messages)} == {"stop"}


async def test_a_response_format_is_obeyed(chat_client: httpx.AsyncClient) -> None:
    async def content(response_format: Json, **fields: object) -> Any:
        body = (await chat(chat_client, response_format=response_format, **fields)).json()
        return body["choices"][0]["message"]["content"]

    found = await content(json_schema(OBJECT, strict=True, description="d"), max_tokens=60)
    jsonschema.validate(json.loads(found), OBJECT)
    free = await content({"type": "text"})
    assert free == (await chat(chat_client)).json()["choices"][0]["message"]["content"]
    assert (await content({"type": "json_object"}, max_tokens=3)).startswith("{")


async def test_a_response_has_the_properties_of_its_schema_only(
    chat_client: httpx.AsyncClient,
) -> None:
    compact: Json = {"x-guidance": {"whitespace_flexible": False}}
    object_of_a = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
    schema: Json = {**object_of_a, **compact}

    async def found(**asked: object) -> set[str]:
        fields = {"temperature": 1, "seed": 1, "n": 4, "max_tokens": 20, **asked}
        choices = (await chat(chat_client, **fields)).json()["choices"]
        return {choice["message"]["content"] for choice in choices}

    for strict in (True, False, None):
        assert await found(response_format=json_schema(schema, strict=strict)) == {'{"a":1}'}
    open_schema = {**schema, "additionalProperties": True}
    assert await found(response_format=json_schema(open_schema)) != {'{"a":1}'}
    structure: Json = {"json": schema, "disable_additional_properties": True}
    assert await found(structured_outputs=structure) == {'{"a":1}'}
    assert await found(structured_outputs={"json": schema}) != {'{"a":1}'}


async def test_openais_client_parses_a_model_of_pydantic(
    chat_engine: TorchEngine, registry: Registry
) -> None:
    class Pet(BaseModel):
        model_config = ConfigDict(
            extra="forbid", json_schema_extra={"x-guidance": {"whitespace_flexible": False}}
        )

        age: int = Field(ge=0, le=20)
        tame: bool

    async with (
        live(build_app(chat_engine, registry)) as server,
        AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as openai,
    ):
        parsed = await openai.chat.completions.parse(
            model="tiny",
            messages=[{"role": "user", "content": "Hello"}],
            response_format=Pet,
            max_tokens=100,
            temperature=0,
        )
    assert isinstance(parsed.choices[0].message.parsed, Pet)


async def test_a_comparison_obeys_the_structure_on_both_sides(
    chat_client: httpx.AsyncClient, registry: Registry, affine_artifact: WriteArtifact
) -> None:
    registry.add(affine_artifact("maps"))
    body = (
        await complete(
            chat_client,
            structured_outputs={"choice": ["left", "right"]},
            steering={"intervention": "maps"},
            compare=True,
            max_tokens=10,
        )
    ).json()
    texts = [body["choices"][0]["text"], body["comparison"]["choices"][0]["text"]]
    assert set(texts) <= {"left", "right"}
    assert isinstance(body["comparison"]["mean_log_ratio"][0], float)


REFUSED: tuple[tuple[Json, str, str], ...] = (
    ({}, "", "invalid_value"),
    ({"regex": "a", "choice": ["a"]}, "", "invalid_value"),
    ({"json": None}, "", "invalid_value"),
    ({"json": 5}, ".json", "invalid_value"),
    ({"json": "{"}, ".json", "invalid_value"),
    ({"json": "[]"}, ".json", "invalid_value"),
    ({"json": '{"properties": {"\\ud800": {"type": "frob"}}}'}, ".json", "invalid_value"),
    ({"json": "{" + " " * MAX_STRUCTURE + "}"}, ".json", "invalid_value"),
    ({"json": {"type": "frob"}}, ".json", "invalid_structure"),
    ({"json": UNSUPPORTED_PART}, ".json.properties.a.items", "invalid_structure"),
    ({"json": {"$ref": "https://localhost/x"}}, ".json", "invalid_structure"),
    ({"json": {"enum": ["x" * MAX_STRUCTURE]}}, ".json", "structure_too_large"),
    ({"json_object": False}, ".json_object", "unsupported_parameter"),
    ({"json_object": 1}, ".json_object", "invalid_type"),
    ({"regex": "("}, ".regex", "invalid_structure"),
    ({"regex": "a\\"}, ".regex", "invalid_structure"),
    ({"regex": "a" * (MAX_PATTERN + 1)}, ".regex", "invalid_value"),
    ({"choice": []}, ".choice", "invalid_value"),
    ({"choice": ["a"] * (MAX_CHOICES + 1)}, ".choice", "invalid_value"),
    ({"choice": ["a" * 100] * MAX_CHOICES}, ".choice", "structure_too_large"),
    ({"choice": [1]}, ".choice.0", "invalid_type"),
    ({"grammar": "hello"}, ".grammar", "invalid_structure"),
    ({"grammar": "root ::= nothing"}, ".grammar", "invalid_structure"),
    ({"grammar": 'root ::= "a"\n' * 2000}, ".grammar", "invalid_structure"),
    ({"grammar": " \n" * 20_000}, ".grammar", "invalid_structure"),
    ({"whitespace_pattern": " "}, ".whitespace_pattern", "unknown_parameter"),
)


@pytest.mark.parametrize(("structure", "place", "code"), REFUSED)
async def test_what_cannot_be_compiled_is_a_400_that_says_where(
    chat_client: httpx.AsyncClient, structure: Json, place: str, code: str
) -> None:
    for ask in (complete, chat):
        response = await ask(chat_client, structured_outputs=structure)
        error = error_of(response)
        assert (response.status_code, error["code"]) == (400, code)
        assert error["param"] == f"structured_outputs{place}"


@pytest.mark.parametrize(
    ("response_format", "param"),
    [
        ({}, "response_format.type"),
        ({"type": "grammar"}, "response_format.type"),
        ({"type": "text", "more": 1}, "response_format.more"),
        ({"type": "json_schema"}, "response_format"),
        ({"type": "text", "json_schema": {"name": "s"}}, "response_format"),
        (json_schema(OBJECT, name="a b"), "response_format.json_schema.name"),
        (
            json_schema(UNSUPPORTED_PART),
            "response_format.json_schema.schema.properties.a.items",
        ),
    ],
)
async def test_a_wrong_response_format_is_a_400_that_says_where(
    chat_client: httpx.AsyncClient, response_format: Json, param: str
) -> None:
    response = await chat(chat_client, response_format=response_format)
    assert (response.status_code, error_of(response)["param"]) == (400, param)


async def test_two_structures_are_refused(chat_client: httpx.AsyncClient) -> None:
    response = await chat(
        chat_client, response_format={"type": "json_object"}, structured_outputs={"regex": "a"}
    )
    assert (response.status_code, error_of(response)["param"]) == (400, "structured_outputs")
