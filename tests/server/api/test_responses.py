"""Tests of `/v1/responses`: the answers of chats in OpenAI's newer form, whole and streamed."""

import json
from dataclasses import replace
from typing import Any

import httpx
import jsonschema
import openai.types.responses as openai_types
import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from interventions.registry import Registry
from server.engine.errors import StepFailedError
from server.engine.output import StepOutput
from server.engine.torch.engine import TorchEngine
from tests.conftest import WriteArtifact
from tests.live import live
from tests.serving import (
    Json,
    Script,
    ScriptedGeneration,
    build_app,
    chat,
    error_of,
    logprobs_of,
    say,
    user,
)

EVENTS: TypeAdapter[Any] = TypeAdapter(openai_types.ResponseStreamEvent)
SCHEMA: Json = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["x"],
    "additionalProperties": False,
}
COMPACT: Json = {**SCHEMA, "x-guidance": {"whitespace_flexible": False}}
TOOL: Json = {"type": "function", "name": "f", "parameters": SCHEMA, "strict": False}
CALL = '<call>{"name": "f", "arguments": {"x": 1}}</call>'


async def respond(tool_client: httpx.AsyncClient, **fields: object) -> httpx.Response:
    """Ask for a short greedy response, with some fields added or replaced."""
    body = {"model": "tiny", "input": "Hello", "max_output_tokens": 6, "temperature": 0, **fields}
    return await tool_client.post("/v1/responses", json=body)


def told(stream: str) -> list[Any]:
    """Return the events of a stream, each of which must be one of OpenAI's."""
    found = []
    for number, block in enumerate(stream.removesuffix("\n\n").split("\n\n")):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        assert type(EVENTS.validate_python(event)).model_fields["type"].annotation is not str
        found.append(event)
    return found


async def both_ways(tool_client: httpx.AsyncClient, **fields: object) -> Any:
    """Return a response, which must be the same whole and as the last event of a stream."""
    response = await respond(tool_client, **fields)
    assert response.status_code == 200, response.text
    whole = response.json()
    openai_types.Response.model_validate(whole)
    events = told((await respond(tool_client, **fields, stream=True)).text)
    assert [each["type"] for each in events[:2]] == ["response.created", "response.in_progress"]
    assert events[-1]["type"] == f"response.{whole['status']}"
    last = events[-1]["response"]
    assert without_ids(last) == without_ids(whole)
    assert items_of(events) == last["output"]
    return whole


def without_ids(value: Any) -> Any:
    if isinstance(value, dict):
        left_out = {"id", "call_id", "created_at", "completed_at", "input_tokens_details"}
        return {key: without_ids(each) for key, each in value.items() if key not in left_out}
    return [without_ids(each) for each in value] if isinstance(value, list) else value


def items_of(events: list[Any]) -> list[Any]:
    """Put a stream's items together from its deltas, and assert that all its parts agree."""
    items: list[Any] = []
    for event in events:
        kind = event["type"].removeprefix("response.")
        if "output_index" in event:
            assert event["output_index"] == len(items) - (kind != "output_item.added")
        if kind == "output_item.added":
            items.append({"deltas": "", "id": event["item"]["id"]})
        elif kind.endswith(".delta"):
            items[-1]["deltas"] += event["delta"]
        elif kind in ("output_text.done", "reasoning_text.done"):
            assert event["text"] == items[-1]["deltas"]
        elif kind == "function_call_arguments.done":
            assert event["arguments"] == items[-1]["deltas"]
        elif kind == "output_item.done":
            text = items[-1]["deltas"]
            assert event["item"]["id"] == items[-1]["id"]
            items[-1] = item = event["item"]
            shown = item["arguments"] if "arguments" in item else item["content"][0]["text"]
            assert shown == text
    return items


async def test_a_response_is_what_a_chat_gives(tool_client: httpx.AsyncClient) -> None:
    messages = [{"role": "system", "content": "Be"}, {"role": "user", "content": "Hello"}]
    fields: Json = {"temperature": 1, "seed": 3, "top_k": 9}
    same = (await chat(tool_client, messages=messages, max_tokens=6, **fields)).json()
    response = await both_ways(tool_client, instructions="Be", **fields)
    [item] = response["output"]
    assert item["content"][0]["text"] == same["choices"][0]["message"]["content"]
    assert response["usage"]["output_tokens"] == same["usage"]["completion_tokens"] == 6
    assert response["usage"]["input_tokens"] == same["usage"]["prompt_tokens"]
    assert (response["status"], item["status"]) == ("incomplete", "incomplete")
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert (response["temperature"], response["store"]) == (1, False)


async def test_reasoning_text_and_calls_are_items(
    tool_client: httpx.AsyncClient, tool_script: Script
) -> None:
    say(tool_script, f"<think>hm</think>Well. {CALL}{CALL}")
    response = await both_ways(tool_client, tools=[TOOL])
    kinds = ["reasoning", "message", "function_call", "function_call"]
    assert [item["type"] for item in response["output"]] == kinds
    reasoning, message, call, _ = response["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "hm"}]
    assert message["content"][0]["text"] == "Well. "
    assert (call["name"], call["arguments"]) == ("f", '{"x": 1}')
    assert response["status"] == "completed"
    assert 0 < response["usage"]["output_tokens_details"]["reasoning_tokens"] < 10
    assert response["tools"] == [{**TOOL, "description": None}]


async def test_an_empty_answer_is_an_empty_message(
    tool_client: httpx.AsyncClient, tool_script: Script
) -> None:
    say(tool_script, "")
    [item] = (await both_ways(tool_client))["output"]
    assert item["content"] == [
        {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    ]


async def test_a_conversation_comes_back_item_by_item(
    tool_client: httpx.AsyncClient, tool_engine: TorchEngine, tool_script: Script
) -> None:
    say(tool_script, f"<think>hm</think>Well. {CALL}")
    output = (await respond(tool_client, tools=[TOOL])).json()["output"]
    call_id = output[-1]["call_id"]
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "u"}]},
        *output,
        {"type": "function_call_output", "call_id": call_id, "output": "t"},
        {"type": "message", "role": "assistant", "content": "a"},
        {"role": "developer", "content": "d"},
    ]
    assert (await respond(tool_client, input=items)).status_code == 200
    rendered = "<user>u<assistant>hmWell. [f 1]<f>t<assistant>a<system>d<assistant>"
    assert tool_script.submitted[1].prompt == tuple(tool_engine.prompts.tokenize(rendered))


def reasoning(text: str) -> Json:
    return {"type": "reasoning", "content": [{"type": "reasoning_text", "text": text}]}


def calling(call_id: str) -> Json:
    return {"type": "function_call", "call_id": call_id, "name": "f", "arguments": '{"x": 1}'}


def answer(call_id: str) -> Json:
    return {"type": "function_call_output", "call_id": call_id, "output": "t", "caller": None}


def said(text: str) -> Json:
    return {"role": "assistant", "content": text, "phase": None}


# The items of an input, and how the template renders the messages that they make.
TURNS: tuple[tuple[list[Json], str], ...] = (
    ([calling("1"), said("Done."), answer("1")], "<assistant>Done.[f 1]<f>t"),
    ([reasoning("a"), reasoning("b"), said("x")], "<assistant>a\nbx"),
    (
        [calling("1"), reasoning("r"), calling("2"), answer("1"), answer("2")],
        "<assistant>r[f 1][f 1]<f>t<f>t",
    ),
    ([said("x"), said("y")], "<assistant>x\ny"),
    ([said("x"), user("u"), said("y")], "<assistant>x<user>u<assistant>y"),
    ([{"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}], "<assistant>no"),
)


@pytest.mark.parametrize(("items", "rendered"), TURNS)
async def test_a_turn_of_the_assistant_is_one_message(
    tool_client: httpx.AsyncClient,
    tool_engine: TorchEngine,
    tool_script: Script,
    items: list[Json],
    rendered: str,
) -> None:
    say(tool_script, "ok")
    response = await respond(tool_client, input=[user("u"), *items])
    assert response.status_code == 200, response.text
    whole = f"<user>u{rendered}<assistant>"
    assert tool_script.submitted[0].prompt == tuple(tool_engine.prompts.tokenize(whole))


async def test_token_ids_come_whole_and_streamed(tool_client: httpx.AsyncClient) -> None:
    response = await both_ways(tool_client, return_token_ids=True)
    assert len(response["token_ids"]) == 6
    assert len(response["prompt_token_ids"]) == response["usage"]["input_tokens"]


async def test_what_steers_is_echoed(
    tool_client: httpx.AsyncClient, registry: Registry, affine_artifact: WriteArtifact
) -> None:
    registry.add(affine_artifact("maps"))
    response = await both_ways(tool_client, steering={"intervention": "maps", "strength": 0.5})
    [applied] = response["steering"]
    assert (applied["intervention"], applied["settings"]["strength"]) == ("maps", 0.5)
    base = await both_ways(tool_client)
    assert base["steering"] == []
    assert base["output"][0]["content"] != response["output"][0]["content"]
    compared = await both_ways(tool_client, steering={"intervention": "maps"}, compare=True)
    [other] = compared["comparison"]["choices"]
    assert compared["comparison"]["usage"]["output_tokens"] == 6
    assert without_ids(other["output"]) == without_ids(base["output"])
    assert (await respond(tool_client, model="tiny+maps")).json()["steering"][0][
        "source"
    ] == "model"


async def test_structures_are_obeyed(tool_client: httpx.AsyncClient) -> None:
    wanted = {"format": {"type": "json_schema", "name": "s", "schema": COMPACT, "strict": True}}
    response = await both_ways(tool_client, text=wanted, max_output_tokens=40)
    jsonschema.validate(json.loads(response["output"][0]["content"][0]["text"]), SCHEMA)
    assert response["text"]["format"]["schema"] == COMPACT
    free = await both_ways(
        tool_client, text={"format": {"type": "json_object"}}, max_output_tokens=3
    )
    assert free["output"][0]["content"][0]["text"].startswith("{")
    for choice in ("required", {"type": "function", "name": "f"}):
        called = await both_ways(
            tool_client,
            tools=[TOOL],
            tool_choice=choice,
            parallel_tool_calls=False,
            max_output_tokens=80,
        )
        assert called["tool_choice"] == choice
        [item] = called["output"]
        jsonschema.validate(json.loads(item["arguments"]), SCHEMA)


async def test_log_probabilities_come_with_the_text(tool_client: httpx.AsyncClient) -> None:
    same = (await chat(tool_client, logprobs=True, top_logprobs=2)).json()["choices"][0]["logprobs"]
    response = await both_ways(tool_client, top_logprobs=2)
    assert response["output"][0]["content"][0]["logprobs"] == same["content"]
    included = await both_ways(tool_client, include=["message.output_text.logprobs"])
    assert [len(each["top_logprobs"]) for each in included["output"][0]["content"][0]["logprobs"]]
    assert (await both_ways(tool_client))["output"][0]["content"][0]["logprobs"] == []


async def test_log_probabilities_wait_for_their_text(
    tool_client: httpx.AsyncClient, tool_script: Script
) -> None:
    scored = [logprobs_of(letter, -1.0, {}, offset=0) for letter in "ab"]
    outputs = (
        StepOutput((1,), "", logprobs=(scored[0],)),
        StepOutput((2,), "ab", logprobs=(scored[1],)),
        StepOutput((3,), "", finish_reason="stop"),
    )
    tool_script.steps += [ScriptedGeneration(outputs), ScriptedGeneration(outputs)]
    response = await both_ways(tool_client, top_logprobs=1)
    listed = response["output"][0]["content"][0]["logprobs"]
    assert [each["token"] for each in listed] == ["a", "b"]


async def test_a_text_lists_no_tokens_of_the_reasoning(
    tool_client: httpx.AsyncClient, tool_script: Script
) -> None:
    pieces = ("<think>", "hm", "</think>", "a", CALL)
    offsets = [sum(map(len, pieces[:place])) for place in range(len(pieces))]
    outputs = [
        StepOutput((1,), text, logprobs=(logprobs_of(text, -1.0, {}, offset),))
        for text, offset in zip(pieces, offsets, strict=True)
    ]
    outputs[-1] = replace(outputs[-1], finish_reason="stop")
    tool_script.steps += [ScriptedGeneration(tuple(outputs)), ScriptedGeneration(tuple(outputs))]
    response = await both_ways(tool_client, top_logprobs=1, tools=[TOOL])
    message = response["output"][1]
    listed = [each["token"] for each in message["content"][0]["logprobs"]]
    assert message["content"][0]["text"] == "a"
    assert listed == ["</think>", "a"]  # the mark between them adds no text of its own


async def test_a_lost_stream_ends_with_its_error(
    tool_client: httpx.AsyncClient, tool_script: Script
) -> None:
    tool_script.steps.append(
        ScriptedGeneration((StepOutput((1,), "Hello"),), StepFailedError("lost"))
    )
    *_, error, failed = told((await respond(tool_client, stream=True)).text)
    assert (error["type"], failed["type"]) == ("error", "response.failed")
    assert failed["response"]["status"] == "failed"
    assert failed["response"]["error"]["message"] == error["message"]


async def test_a_stream_that_fails_at_once_has_begun(
    tool_client: httpx.AsyncClient, tool_script: Script
) -> None:
    tool_script.steps.append(ScriptedGeneration((), StepFailedError("lost")))
    kinds = [event["type"] for event in told((await respond(tool_client, stream=True)).text)]
    assert kinds == ["response.created", "response.in_progress", "error", "response.failed"]


async def test_openais_client_works(tool_engine: TorchEngine, registry: Registry) -> None:
    class Pet(BaseModel):
        model_config = ConfigDict(
            extra="forbid", json_schema_extra={"x-guidance": {"whitespace_flexible": False}}
        )

        age: int = Field(ge=0, le=20)

    async with (
        live(build_app(tool_engine, registry)) as server,
        AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as openai,
    ):
        parsed = await openai.responses.parse(
            model="tiny", input="Hello", text_format=Pet, max_output_tokens=40
        )
        assert isinstance(parsed.output_parsed, Pet)
        tool: Any = {**TOOL, "strict": True}
        async with openai.responses.stream(
            model="tiny", input="Hello", tools=[tool], tool_choice="required", max_output_tokens=400
        ) as stream:
            response = await stream.get_final_response()
        first = response.output[0]
        if response.status == "completed":
            assert first.type == "function_call"
        given: Any = [{"role": "user", "content": "Hello"}, *response.output]
        again = await openai.responses.create(model="tiny", input=given, max_output_tokens=4)
        assert again.usage is not None
        assert again.usage.input_tokens > len("<user>Hello<assistant>")


def wrong_item(param: str, **fields: object) -> tuple[Json, str]:
    return {"input": [fields]}, f"input[0]{param}"


WRONG: tuple[tuple[Json, str], ...] = (
    ({"input": 5}, "input"),
    ({"input": []}, "input"),
    ({"input": [{"role": "user", "content": "a"}] * 2049}, "input"),
    ({"input": ["a"]}, "input[0]"),
    wrong_item(".type", type="item_reference", id="x"),
    wrong_item(".type", type="computer_call"),
    wrong_item(".role", content="a"),
    wrong_item(".role", role="tool", content="a"),
    wrong_item(".content", role="user"),
    wrong_item(".content", role="user", content=5),
    wrong_item(".content[0]", role="user", content=["a"]),
    wrong_item(".content[0].type", role="user", content=[{"type": "input_image"}]),
    wrong_item(".content[0].type", role="user", content=[{"type": {}}]),
    wrong_item(".content[0].type", role="user", content=[{"type": [1], "text": "a"}]),
    wrong_item(".type", type={"a": 1}),
    wrong_item(".role", role={}, content="a"),
    wrong_item(".content[0].text", role="user", content=[{"type": "input_text"}]),
    wrong_item(".frob", role="user", content="a", frob=1),
    wrong_item(".call_id", type="function_call", name="f", arguments="{}"),
    wrong_item(".name", type="function_call", call_id="1", arguments="{}"),
    wrong_item(".arguments", type="function_call", call_id="1", name="f", arguments="["),
    wrong_item(".output", type="function_call_output", call_id="1"),
    wrong_item(".call_id", type="function_call_output", output="a"),
    ({"input": "x" * 600}, "input"),
    ({"max_output_tokens": 600}, "max_output_tokens"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_tokens": 5}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"n": 2}, "n"),
    ({"store": True}, "store"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"background": True}, "background"),
    ({"prompt": {"id": "x"}}, "prompt"),
    ({"truncation": "auto"}, "truncation"),
    ({"include": ["file_search_call.results"]}, "include.0"),
    ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
    ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
    (
        {"text": {"format": {"type": "json_schema", "name": "s", "schema": {"type": "frob"}}}},
        "text.format.schema",
    ),
    ({"tools": [{"type": "web_search"}]}, "tools.0"),
    ({"tools": [{**TOOL, "defer_loading": True}]}, "tools.0.defer_loading"),
    ({"include": [0] * 100_000}, "include"),
    ({"input": [{"type": "reasoning", "summary": []}]}, "input"),
    wrong_item(".type", type=0, role="user", content="a"),
    wrong_item(".content", role="user", content=[]),
    wrong_item(".content", type="reasoning", content=0),
    ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "g"}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice"),
    (
        {"tools": [{**TOOL, "parameters": {"type": "frob"}}], "tool_choice": "required"},
        "tools.0.parameters",
    ),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options"),
    ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
    ({"logit_bias": {"999": 1}}, "logit_bias"),
)
HARMLESS: tuple[Json, ...] = (
    {"store": False, "previous_response_id": None, "conversation": None, "background": False},
    {"truncation": "disabled", "metadata": {"a": "b"}, "max_tool_calls": 3},
    {"include": ["reasoning.encrypted_content"], "reasoning": {"effort": None, "summary": "auto"}},
    {"text": {"format": {"type": "text"}, "verbosity": "medium"}, "tools": []},
    {"stream": True, "stream_options": {"include_obfuscation": False}},
    {"tool_choice": "auto"},
    {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a", "x": None}]}]},
    {"tools": [{**TOOL, "output_schema": None, "defer_loading": False}]},
)


async def test_a_wrong_field_is_named(tool_client: httpx.AsyncClient) -> None:
    for fields, param in WRONG:
        response = await respond(tool_client, **fields)
        error = error_of(response)
        assert response.status_code == 400, fields
        assert str(error["param"]).startswith(param), (fields, error)


@pytest.mark.parametrize("fields", HARMLESS)
async def test_what_asks_for_nothing_is_taken(tool_client: httpx.AsyncClient, fields: Json) -> None:
    response = await respond(tool_client, **fields)
    assert response.status_code == 200, response.text


async def test_a_model_without_tools_says_so(chat_client: httpx.AsyncClient) -> None:
    called = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
    for fields, param in (
        ({"tools": [TOOL]}, "tools"),
        ({"instructions": "Be", "input": [{"role": "user", "content": "a"}, called]}, "input"),
    ):
        response = await respond(chat_client, **fields)
        assert (response.status_code, error_of(response)["param"]) == (400, param)
