"""Tests of tools: what the model is told, which calls are demanded, and how answers show them."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from openai import AsyncOpenAI, pydantic_function_tool
from pydantic import BaseModel, Field

from interventions.registry import Registry
from server.api.tools import MAX_TOOLS, MAX_TOOLS_SIZE
from server.engine.grammar import CompiledGrammar
from server.engine.torch.engine import TorchEngine
from tests.conftest import TINY_OPTIONS, LoadTiny, WriteArtifact
from tests.engines import close_checked
from tests.live import live
from tests.serving import Json, Script, build_app, chat, chunks, error_of, say, user
from tests.tool_templates import write_templates

PARAMETERS: Json = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["x"],
}


def tool(name: str = "f", parameters: Json = PARAMETERS, **fields: object) -> Json:
    return {
        "type": "function",
        "function": {"name": name, "parameters": parameters, **fields},
    }


NAMED: Json = {"type": "function", "function": {"name": "g"}}
CALL = '<call>{"name": "f", "arguments": {"x": 1}}</call>'


def merged(stream: str) -> tuple[Json, object]:
    """Return the message that a stream's chunks make, and its finish reason."""
    message: dict[str, Any] = {}
    reason = None
    chunk: Any
    for chunk in chunks(stream):
        for choice in chunk["choices"]:
            reason = choice["finish_reason"] or reason
            for name, value in choice["delta"].items():
                if name == "tool_calls":
                    [call] = value
                    calls = message.setdefault(name, [])
                    assert call.pop("index") == len(calls)
                    calls.append(call)
                else:
                    message[name] = value if message.get(name) is None else message[name] + value
    return message, reason


async def both_ways(tool_client: httpx.AsyncClient, **fields: object) -> tuple[Any, object]:
    """Return a message and its finish reason, which must be the same whole and streamed."""
    response = await chat(tool_client, **fields)
    assert response.status_code == 200, response.text
    [choice] = response.json()["choices"]
    streamed, reason = merged((await chat(tool_client, **fields, stream=True)).text)
    message = choice["message"]
    each: Any
    for each in (message, streamed):
        for call in each.get("tool_calls", ()):
            assert re.fullmatch("[A-Za-z0-9]{9}", call.pop("id"))
    assert (streamed, reason) == (message, choice["finish_reason"])
    return message, reason


def call(name: str = "f", arguments: str = '{"x": 1}') -> Json:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


async def test_what_the_model_writes_becomes_a_message(
    tool_client: httpx.AsyncClient, tool_script: Script
) -> None:
    say(tool_script, f"<think>hm</think>Well. {CALL}{CALL}")
    message, reason = await both_ways(tool_client, tools=[tool()])
    assert message == {
        "role": "assistant",
        "content": "Well. ",
        "refusal": None,
        "reasoning_content": "hm",
        "tool_calls": [call(), call()],
    }
    assert reason == "tool_calls"


async def test_an_answer_of_calls_alone_has_no_content(
    tool_client: httpx.AsyncClient, tool_script: Script
) -> None:
    say(tool_script, CALL)
    message, _ = await both_ways(tool_client, tools=[tool()])
    assert message["content"] is None
    say(tool_script, CALL + CALL)
    message, _ = await both_ways(tool_client, tools=[tool()], parallel_tool_calls=False)
    assert message["tool_calls"] == [call()]


async def test_a_call_that_is_cut_off_is_content(
    tool_client: httpx.AsyncClient, tool_script: Script
) -> None:
    say(tool_script, CALL[:-9], "length")
    message, reason = await both_ways(tool_client, tools=[tool()])
    assert (message["content"], reason) == (CALL[:-9], "length")
    assert "tool_calls" not in message


async def test_without_tools_a_call_is_text(
    tool_client: httpx.AsyncClient, tool_script: Script
) -> None:
    say(tool_script, f"<think>hm</think>a{CALL}")
    message, reason = await both_ways(tool_client, tools=[tool()], tool_choice="none")
    assert message == {
        "role": "assistant",
        "content": f"a{CALL}",
        "refusal": None,
        "reasoning_content": "hm",
    }
    assert reason == "stop"


async def test_the_template_is_told_of_tools_and_calls(
    tool_client: httpx.AsyncClient, tool_engine: TorchEngine, tool_script: Script
) -> None:
    say(tool_script, "ok")
    messages = [
        user("u"),
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "r",
            "tool_calls": [{"id": "1", **call()}, {"id": "2", **call("g", "")}],
        },
        {"role": "tool", "tool_call_id": "2", "content": [{"type": "text", "text": "t"}]},
        {"role": "tool", "tool_call_id": "9", "content": "s"},
    ]
    assert (
        await chat(tool_client, messages=messages, tools=[tool(), tool("g")])
    ).status_code == 200
    told = "TOOLS f,g<user>u<assistant>r[f 1][g ]<g>t<tool>s<assistant>"
    assert tool_script.submitted[0].prompt == tuple(tool_engine.prompts.tokenize(told))
    assert (await chat(tool_client, tools=[tool()], tool_choice="none")).status_code == 200
    untold = "<user>Hello<assistant>"
    assert tool_script.submitted[1].prompt == tuple(tool_engine.prompts.tokenize(untold))


FORCED: tuple[tuple[object, list[str], int], ...] = (
    ("required", ["f", "g"], 32),
    (NAMED, ["g"], 1),
)


@pytest.mark.parametrize(("choice", "names", "most"), FORCED)
@pytest.mark.parametrize("parallel", [True, False])
async def test_a_call_that_is_demanded_obeys_its_schema(
    tool_client: httpx.AsyncClient,
    registry: Registry,
    reward_artifact: WriteArtifact,
    choice: object,
    names: list[str],
    most: int,
    parallel: bool,
) -> None:
    registry.add(reward_artifact("head"))
    for steering in (None, {"intervention": "head"}):
        for seed in range(3):
            message, reason = await both_ways(
                tool_client,
                tools=[tool(), tool("g")],
                tool_choice=choice,
                parallel_tool_calls=parallel,
                steering=steering,
                temperature=1.5,
                seed=seed,
                max_tokens=400,
            )
            if reason == "length":
                assert parallel
                continue
            calls = message["tool_calls"]
            assert 1 <= len(calls) <= (most if parallel else 1)
            for each in calls:
                assert each["function"]["name"] in names
                jsonschema.validate(json.loads(each["function"]["arguments"]), PARAMETERS)
            assert message["content"] is None
            assert reason == ("stop" if choice == NAMED else "tool_calls")


async def test_every_choice_has_its_own_calls(tool_client: httpx.AsyncClient) -> None:
    fields: Json = {"tools": [tool()], "tool_choice": "required", "parallel_tool_calls": False}
    response = await chat(tool_client, **fields, n=3, temperature=2, seed=1, max_tokens=80)
    choices = response.json()["choices"]
    assert len({each["message"]["tool_calls"][0]["function"]["arguments"] for each in choices}) > 1
    assert len({each["message"]["tool_calls"][0]["id"] for each in choices}) == 3


async def test_a_comparison_shows_the_base_models_calls(
    tool_client: httpx.AsyncClient, registry: Registry, affine_artifact: WriteArtifact
) -> None:
    registry.add(affine_artifact("maps"))
    fields: Json = {"tools": [tool()], "tool_choice": "required", "parallel_tool_calls": False}
    steered: Json = {"steering": {"intervention": "maps"}, "compare": True, "max_tokens": 80}
    body = (await chat(tool_client, **fields, **steered)).json()
    for choice in (*body["choices"], *body["comparison"]["choices"]):
        [made] = choice["message"]["tool_calls"]
        jsonschema.validate(json.loads(made["function"]["arguments"]), PARAMETERS)


async def test_only_a_strict_tool_has_a_grammar(
    tool_client: httpx.AsyncClient, tool_engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    compile_grammar = tool_engine.compile_grammar

    def record(lark: str, field: str, *, of_schemas: bool) -> CompiledGrammar:
        assert of_schemas
        compiled.append(field)
        return compile_grammar(lark, field, of_schemas=of_schemas)

    monkeypatch.setattr(tool_engine, "compile_grammar", record)
    await both_ways(tool_client, tools=[tool(), tool("g")])
    assert compiled == []
    await both_ways(tool_client, tools=[tool(), tool("g", strict=True)])
    assert compiled == ["tools.1.function.strict"] * 2


async def test_an_answer_may_be_a_call_or_have_its_structure(
    tool_client: httpx.AsyncClient,
) -> None:
    found = set()
    for seed in range(12):
        message, _ = await both_ways(
            tool_client,
            tools=[tool()],
            structured_outputs={"json": {"enum": ["left", "right"]}},
            parallel_tool_calls=False,
            temperature=2,
            seed=seed,
            max_tokens=80,
        )
        found.add(message["content"] or "a call")
    assert found <= {'"left"', '"right"', "a call"}
    assert len(found) > 1


BEGUN: Json = {
    "continue_final_message": True,
    "messages": [user(), {"role": "assistant", "content": "<think>hm"}],
}


async def test_what_must_have_a_structure_is_no_reasoning(tool_client: httpx.AsyncClient) -> None:
    chosen = {"structured_outputs": {"choice": ["<think>left", "<think>right"]}}
    for fields in (chosen, {**chosen, **BEGUN}):
        message, _ = await both_ways(tool_client, **fields, max_tokens=20)
        assert message["content"] in ("<think>left", "<think>right")
        assert "reasoning_content" not in message
    forced: Json = {"tools": [tool()], "tool_choice": "required", "parallel_tool_calls": False}
    message, _ = await both_ways(tool_client, **forced, **BEGUN, max_tokens=80)
    assert len(message["tool_calls"]) == 1
    message, _ = await both_ways(tool_client, **BEGUN, max_tokens=9)
    assert message["content"] is None
    assert message["reasoning_content"]


async def test_a_tool_may_have_many_arguments(tool_client: httpx.AsyncClient) -> None:
    many: Json = {"type": "object", "properties": {f"p{at}": {"enum": [1]} for at in range(300)}}
    message, _ = await both_ways(
        tool_client,
        tools=[tool(parameters=many)],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=300,
    )
    assert message["tool_calls"] or message["content"]


async def test_a_tool_without_declared_arguments_gets_none(tool_client: httpx.AsyncClient) -> None:
    for parameters in ({}, {"type": "object"}, None):
        function = {"type": "function", "function": {"name": "f", "parameters": parameters}}
        message, _ = await both_ways(
            tool_client,
            tools=[function],
            tool_choice="required",
            parallel_tool_calls=False,
            max_tokens=80,
        )
        assert message["tool_calls"] == [call("f", "{}")]


async def test_openais_client_parses_calls(tool_engine: TorchEngine, registry: Registry) -> None:
    class Move(BaseModel):
        steps: int = Field(ge=0, le=9)

    async with (
        live(build_app(tool_engine, registry)) as server,
        AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as openai,
        openai.chat.completions.stream(
            model="tiny",
            messages=[{"role": "user", "content": "Hello"}],
            tools=[pydantic_function_tool(Move)],
            tool_choice={"type": "function", "function": {"name": "Move"}},
            max_tokens=80,
        ) as stream,
    ):
        completion = await stream.get_final_completion()
    calls = completion.choices[0].message.tool_calls
    assert calls is not None
    assert isinstance(calls[0].function.parsed_arguments, Move)


WRONG: tuple[tuple[Json, str], ...] = (
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools.0.type"),
    ({"tools": [{"type": "function"}]}, "tools.0.function"),
    ({"tools": [tool("a b")]}, "tools.0.function.name"),
    ({"tools": [tool(frob=1)]}, "tools.0.function.frob"),
    ({"tools": [tool(), tool()]}, "tools"),
    ({"tools": [tool(f"f{number}") for number in range(MAX_TOOLS + 1)]}, "tools"),
    ({"tools": [tool(description="x" * MAX_TOOLS_SIZE)]}, "tools"),
    ({"tools": [tool()], "tool_choice": "f"}, "tool_choice"),
    ({"tools": [tool()], "tool_choice": NAMED}, "tool_choice"),
    ({"tools": [tool()], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"tool_choice": "required"}, "tool_choice"),
    (
        {"tools": [tool()], "tool_choice": "required", "response_format": {"type": "json_object"}},
        "tool_choice",
    ),
    (
        {"tools": [tool()], "structured_outputs": {"grammar": 'start: a\na: "b"'}},
        "structured_outputs.grammar",
    ),
    (
        {"tools": [tool(), tool("g", {"type": "frob"})], "tool_choice": "required"},
        "tools.1.function.parameters",
    ),
    (
        {"tools": [tool(), tool("g", {"type": "frob"})], "tool_choice": NAMED},
        "tools.1.function.parameters",
    ),
    (
        {"tools": [tool("g", {"type": "frob"}, strict=True)]},
        "tools.0.function.parameters",
    ),
    ({"tools": [tool("f", {"type": "array"})]}, "tools.0.function.parameters"),
    (
        {"tools": [tool()], "structured_outputs": {"regex": "(?s).*"}},
        "structured_outputs.regex",
    ),
    ({"tools": [tool()], "include_stop_str_in_output": True}, "include_stop_str_in_output"),
    (
        {
            "continue_final_message": True,
            "messages": [user(), {"role": "assistant", "tool_calls": [{"id": "1", **call()}]}],
        },
        "continue_final_message",
    ),
)


async def test_a_wrong_field_is_named(tool_client: httpx.AsyncClient) -> None:
    for fields, param in WRONG:
        response = await chat(tool_client, **fields)
        assert (response.status_code, error_of(response)["param"]) == (400, param), fields


async def test_without_a_syntax_no_call_can_be_demanded(
    load_tiny: LoadTiny, registry: Registry, tmp_path: Path
) -> None:
    options = replace(TINY_OPTIONS, templates=write_templates(tmp_path, calls=None))
    engine = TorchEngine(load_tiny(), lambda digest: registry.load(digest).parameters, options)
    transport = httpx.ASGITransport(app=build_app(engine, registry))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as tool_client:
        await engine.start()
        for fields, param in (
            ({"tools": [tool()], "tool_choice": "required"}, "tool_choice"),
            ({"tools": [tool(strict=True)]}, "tools.0.function.strict"),
            ({"tools": [tool()], "response_format": {"type": "json_object"}}, "response_format"),
        ):
            response = await chat(tool_client, **fields)
            assert (response.status_code, error_of(response)["param"]) == (400, param), fields
            assert "--response-template" in str(error_of(response)["message"])
        assert (await chat(tool_client, tools=[tool()])).status_code == 200
    await close_checked(engine)


async def test_a_template_that_knows_no_tools_is_an_error(chat_client: httpx.AsyncClient) -> None:
    answered = {"role": "tool", "tool_call_id": "1", "content": "t"}
    called = {"role": "assistant", "tool_calls": [{"id": "1", **call()}]}
    for fields, param in (
        ({"tools": [tool()]}, "tools"),
        ({"messages": [user(), answered]}, "messages[1].role"),
        ({"messages": [user(), called]}, "messages[1].tool_calls"),
    ):
        response = await chat(chat_client, **fields)
        assert (response.status_code, error_of(response)["param"]) == (400, param), fields
        assert "--chat-template" in str(error_of(response)["message"])
    assert (await chat(chat_client, tools=[tool()], tool_choice="none")).status_code == 200
