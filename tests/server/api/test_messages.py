"""Tests of chat messages: which the chat template is given, and which are refused."""

import httpx
import pytest
from openai import AsyncOpenAI

from interventions.registry import Registry
from server.engine.torch.engine import TorchEngine
from tests.live import live
from tests.serving import (
    Json,
    Script,
    build_app,
    chat,
    error_of,
    user,
)


@pytest.mark.parametrize(
    ("messages", "rendered"),
    [
        ([{"role": "system", "content": "s"}, user("u")], "<system>s<user>u<assistant>"),
        ([{"role": "developer", "content": "d"}, user("u")], "<system>d<user>u<assistant>"),
        (
            [user("u"), {"role": "assistant", "content": "a"}, user("v")],
            "<user>u<assistant>a<user>v<assistant>",
        ),
        # After an assistant's message a new turn begins, as with OpenAI: it is not continued.
        ([user("u"), {"role": "assistant", "content": "a"}], "<user>u<assistant>a<assistant>"),
        (
            [user([{"type": "text", "text": "one "}, {"type": "text", "text": "two"}])],
            "<user>one two<assistant>",
        ),
        ([user("")], "<user><assistant>"),
        ([user("h\u00e9", name=None)], "<user>h\u00e9<assistant>"),
        ([user("u", name="Ann")], "<user>u<assistant>"),  # the template ignores names
        ([user("u", cache_control={"type": "ephemeral"}, type="message")], "<user>u<assistant>"),
        (
            [user([{"type": "text", "text": "u", "cache_control": {"type": "ephemeral"}}])],
            "<user>u<assistant>",
        ),
    ],
)
async def test_what_the_template_is_given(
    chat_client: httpx.AsyncClient,
    chat_engine: TorchEngine,
    script: Script,
    messages: list[Json],
    rendered: str,
) -> None:
    assert (await chat(chat_client, messages=messages)).status_code == 200
    assert script.submitted[0].prompt == tuple(chat_engine.prompts.tokenize(rendered))


async def test_an_answer_may_be_sent_back_as_the_client_got_it(
    chat_engine: TorchEngine, registry: Registry
) -> None:
    async with (
        live(build_app(chat_engine, registry)) as server,
        AsyncOpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0) as openai,
    ):
        first = await openai.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Hello"}], max_tokens=4
        )
        answer = first.choices[0].message.model_dump()
        assert answer["tool_calls"] is None  # a field that the server never sent
        second = await openai.chat.completions.create(
            model="tiny",
            messages=[user(), answer, user()],  # type: ignore[list-item]
            max_tokens=4,
        )
    assert second.usage is not None
    assert second.usage.prompt_tokens > len("<user>Hello<assistant>")  # the first request's


# Fields of an assistant's message that clients of other servers keep and send back with it.
SENT_BACK: tuple[Json, ...] = (
    # openai-python, parsed or not
    {
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
        "parsed": None,
    },
    # litellm
    {
        "tool_calls": [],
        "images": [],
        "reasoning_content": "Let me think.",
        "thinking_blocks": [{"type": "thinking", "thinking": "Let me think.", "signature": "x"}],
        "reasoning_items": [{"id": "r"}],
        "provider_specific_fields": {"refusal": None, "citations": [{"url": "x"}]},
        "annotations": [{"type": "url_citation", "url_citation": {"url": "x"}}],
    },
    # vLLM, SGLang, OpenRouter
    {"reasoning": "Let me think.", "reasoning_details": [{"type": "reasoning.text"}]},
    {"prefix": False, "name": None, "id": "msg_1", "finish_reason": "stop", "timestamp": 5},
)


@pytest.mark.parametrize("fields", SENT_BACK)
async def test_what_only_comes_back_with_an_answer_changes_nothing(
    chat_client: httpx.AsyncClient, chat_engine: TorchEngine, script: Script, fields: Json
) -> None:
    messages = [user("u"), {"role": "assistant", "content": "a", **fields}, user("v")]
    response = await chat(chat_client, messages=messages)
    assert response.status_code == 200, response.text
    rendered = "<user>u<assistant>a<user>v<assistant>"
    assert script.submitted[0].prompt == tuple(chat_engine.prompts.tokenize(rendered))


async def test_a_template_with_a_place_for_names_is_given_them(
    chat_client: httpx.AsyncClient,
    chat_engine: TorchEngine,
    script: Script,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    template = "{% for m in messages %}<{{ m.name or m.role }}>{{ m.content }}{% endfor %}"
    monkeypatch.setattr(chat_engine.prompts._source, "chat_template", template)
    messages = [user("u", name="Ann"), user("v", name="")]
    assert (await chat(chat_client, messages=messages)).status_code == 200
    assert script.submitted[0].prompt == tuple(chat_engine.prompts.tokenize("<Ann>u<user>v"))


def made(**fields: object) -> Json:
    return {"id": "1", "function": {"name": "f", "arguments": "{}", **fields}}


def calling(calls: object) -> list[Json]:
    return [user(), {"role": "assistant", "tool_calls": calls}]


CALL = made()
HEAVY = made(arguments='{"x": [' + ",".join(["[]"] * 8000) + "]}")
WRONG_MESSAGES: tuple[tuple[object, str], ...] = (
    (None, "messages"),
    ("Hello", "messages"),
    ({"role": "user", "content": "a"}, "messages"),
    ([], "messages"),
    ([user()] * 2049, "messages"),
    (["Hello"], "messages[0]"),
    ([user(), None], "messages[1]"),
    ([{"content": "a"}], "messages[0].role"),
    ([{"role": None, "content": "a"}], "messages[0].role"),
    ([{"role": "User", "content": "a"}], "messages[0].role"),
    ([{"role": "tool", "content": "a"}], "messages[0].tool_call_id"),
    ([{"role": "tool", "content": "a", "tool_call_id": 1}], "messages[0].tool_call_id"),
    ([{"role": "tool", "content": None, "tool_call_id": "1"}], "messages[0].content"),
    ([user(tool_call_id="1")], "messages[0].tool_call_id"),
    ([user(tool_calls=[CALL])], "messages[0].tool_calls"),
    ([user(), {"role": "function", "name": "f", "content": "a"}], "messages[1].role"),
    ([{"role": "user"}], "messages[0].content"),
    ([user(None)], "messages[0].content"),
    ([user(5)], "messages[0].content"),
    ([user([])], "messages[0].content"),
    ([user({"type": "text", "text": "a"})], "messages[0].content"),
    ([user(), {"role": "assistant", "content": None}], "messages[1].content"),
    (calling("x"), "messages[1].tool_calls"),
    (calling([CALL] * 129), "messages[1].tool_calls"),
    (calling([5]), "messages[1].tool_calls[0]"),
    (calling([{"id": "1"}]), "messages[1].tool_calls[0].function"),
    (calling([{"id": "1", "function": 5}]), "messages[1].tool_calls[0].function"),
    (calling([{**CALL, "type": "custom"}]), "messages[1].tool_calls[0].type"),
    (calling([{"function": CALL["function"]}]), "messages[1].tool_calls[0].id"),
    (calling([CALL, made(name=5)]), "messages[1].tool_calls[1].function.name"),
    (calling([made(arguments={})]), "messages[1].tool_calls[0].function.arguments"),
    (calling([made(arguments="{")]), "messages[1].tool_calls[0].function.arguments"),
    (calling([made(arguments="[]")]), "messages[1].tool_calls[0].function.arguments"),
    (calling([made(arguments='{"x": 1e400}')]), "messages[1].tool_calls[0].function.arguments"),
    (calling([made(arguments="{}" + " " * 9)] * 2), "messages[1].tool_calls"),
    (
        [*calling([HEAVY] * 4), *calling([HEAVY])],
        "messages[3].tool_calls[0].function.arguments",
    ),
    (calling([CALL]), "messages[1].tool_calls"),  # the template knows no tools
    ([user(audio={"id": "1"})], "messages[0].audio"),
    ([user(refusal="no")], "messages[0].refusal"),
    ([user(name=5)], "messages[0].name"),
    ([user(cache_control={}, reasoning_content="a")], "messages[0].reasoning_content"),
    ([user(), {"role": "assistant", "content": "a", "refusal": "no"}], "messages[1].refusal"),
    ([user(), {"role": "assistant", "content": "a", "images": [{}]}], "messages[1].images"),
    ([user(), {"role": "assistant", "content": "a", "prefix": True}], "messages[1].prefix"),
    ([user(), {"role": "assistant", "content": "a", "partial": True}], "messages[1].partial"),
    ([user(), {"role": "assistant", "reasoning_content": "a"}], "messages[1].content"),
    ([user(weight=1)], "messages[0].weight"),
    ([user(weight=None)], "messages[0].weight"),
    ([user(["a"])], "messages[0].content[0]"),
    ([user([{"text": "a"}])], "messages[0].content[0].type"),
    ([user([{"type": 5, "text": "a"}])], "messages[0].content[0].type"),
    ([user([{"type": "text"}])], "messages[0].content[0].text"),
    ([user([{"type": "text", "text": None}])], "messages[0].content[0].text"),
    ([user([{"type": "text", "text": "a", "x": 1}])], "messages[0].content[0].x"),
    (
        [user([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}])],
        "messages[0].content[1].type",
    ),
    ([user([{"type": "input_audio", "input_audio": {}}])], "messages[0].content[0].type"),
    ([{"role": "assistant", "content": "a"}], "messages"),  # refused by the template
)


async def test_a_wrong_message_is_named(chat_client: httpx.AsyncClient) -> None:
    for messages, param in WRONG_MESSAGES:
        response = await chat(chat_client, messages=messages)
        error = error_of(response)
        assert (response.status_code, error["param"]) == (400, param), messages
        assert error["type"] == "invalid_request_error"
        assert len(str(error["message"])) < 300
    response = await chat_client.post("/v1/chat/completions", json={"model": "tiny"})
    error = error_of(response)
    assert (error["param"], error["code"]) == ("messages", "missing_required_parameter")


async def test_what_the_template_says_is_passed_on(chat_client: httpx.AsyncClient) -> None:
    response = await chat(chat_client, messages=[{"role": "assistant", "content": "a"}])
    assert "Users speak first." in str(error_of(response)["message"])


async def test_a_model_without_a_template(client: httpx.AsyncClient) -> None:
    response = await chat(client)
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, "messages")
    assert error["code"] == "no_chat_template"


async def test_a_conversation_as_lm_evaluation_harness_sends_it(
    chat_client: httpx.AsyncClient,
) -> None:
    messages = [{"role": "user", "content": "Hello", "type": "text"}]
    stop = ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]
    response = await chat(chat_client, messages=messages, stop=stop, seed=1234, temperature=0)
    assert response.status_code == 200, response.text


async def test_a_template_that_fails_is_the_requests_error(
    chat_client: httpx.AsyncClient, chat_engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = chat_engine.prompts._source
    for template in (
        "{{ 1 // 0 }}",
        "{{ raise_exception(messages[0].content) }}",
        "{{ '{a}'.format(b=1) }}",
    ):
        monkeypatch.setattr(tokenizer, "chat_template", template)
        response = await chat(chat_client, messages=[{"role": "user", "content": "x" * 3000}])
        error = error_of(response)
        assert (response.status_code, error["param"]) == (400, "messages")
        assert len(str(error["message"])) < 500
