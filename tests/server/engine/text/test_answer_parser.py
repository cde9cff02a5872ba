"""Tests that answers are divided into content, reasoning and calls, whatever a model writes."""

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import NamedTuple

import pytest

from server.engine.chat import AnswerParser, AnswerPart, Tool, ToolCall
from server.engine.text import response_format
from server.engine.text.answer_parser import TemplateFormat, part_at_end
from server.engine.text.response_format import ResponseFormat, read_format

CHATML = "<|im_start|>assistant\n"
LLAMA = "<|start_header_id|>assistant<|end_header_id|>\n\n"
MISTRAL = "[INST] x[/INST]"
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
F = ToolCall("f", '{"x": 1}')
G = ToolCall("g", "{}")
TOOLS = (Tool("f", None, {}, strict=False, field="tools.0.function"),)


class Case(NamedTuple):
    family: str
    text: str
    content: str = ""
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    prompt: str = CHATML


CASES = {
    "nothing": Case("hermes", ""),
    "text alone": Case("hermes", "Hello\n", "Hello\n"),
    "text that begins as a mark does": Case("hermes", "a <tool_", "a <tool_"),
    "a call": Case("hermes", CALL, calls=(F,)),
    "two calls after text": Case("hermes", f"Sure.\n\n{CALL}\n{CALL}", "Sure.", calls=(F, F)),
    "text after a call": Case("hermes", f"{CALL}\nDone  \n", "Done  \n", calls=(F,)),
    "no JSON": Case(
        "hermes",
        'Hi\n<tool_call>{"name": "f", </tool_call>\nbye',
        'Hi\n<tool_call>{"name": "f", </tool_call>\nbye',
    ),
    "a call cut off": Case("hermes", 'Hi <tool_call>{"name": "f"', 'Hi <tool_call>{"name": "f"'),
    "an end cut off": Case("hermes", f"x{CALL[:-3]}", f"x{CALL[:-3]}"),
    "no call": Case("hermes", "<tool_call>5</tool_call>", "<tool_call>5</tool_call>"),
    "no arguments": Case(
        "hermes",
        '<tool_call>{"name": "f"}</tool_call>',
        '<tool_call>{"name": "f"}</tool_call>',
    ),
    "arguments as text": Case(
        "hermes", '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', calls=(F,)
    ),
    "arguments of another kind": Case(
        "hermes",
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
    ),
    "no number of JSON": Case(
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>',
        '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>',
    ),
    "half of a pair of surrogates": Case(
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"x": "\\ud800"}}</tool_call>',
        calls=(ToolCall("f", '{"x": "\\ud800"}'),),
    ),
    "a name that is no text": Case(
        "hermes",
        '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>',
    ),
    "a list of calls": Case(
        "smollm2",
        '<tool_call>[\n{"name": "f", "arguments": {"x": 1}},\n'
        '{"name": "g", "arguments": {}}]</tool_call>',
        calls=(F, G),
    ),
    "an empty list": Case("smollm2", "<tool_call>[]</tool_call>", "<tool_call>[]</tool_call>"),
    "the end's mark in an argument": Case(
        "hermes",
        '<tool_call>{"name": "f", "arguments": {"x": "a</tool_call>b"}}</tool_call>',
        calls=(ToolCall("f", '{"x": "a</tool_call>b"}'),),
    ),
    "a mark that the prompt has begun": Case(
        "hermes", "garbage", "garbage", prompt=f'{CHATML}<tool_call>{{"name": '
    ),
    "reasoning's mark later": Case("qwen3", "Use <think> to think", "Use <think> to think"),
    "an answer that goes on": Case("hermes", " world", " world", prompt=f"{CHATML}Hello"),
    "a prompt that ends with a blank": Case("hermes", "wor", "wor", prompt=f"{CHATML}Hello "),
    "another prompt": Case("hermes", "a", "a", prompt="b <tool_call>"),
    "reasoning": Case("qwen3", "<think>\nhm\n</think>\n\nHello", "Hello", "\nhm"),
    "reasoning that the prompt begins": Case(
        "qwen3", f"hm\n</think>\n\nHello{CALL}", "Hello", "hm", (F,), f"{CHATML}<think>\n"
    ),
    "no reasoning": Case("qwen3", "Hello\n", "Hello\n", prompt=f"{CHATML}<think>\n\n</think>\n\n"),
    "reasoning cut off": Case("qwen3", "<think>\nhm", "", "\nhm"),
    "Llama": Case("llama3", '{"name": "f", "parameters": {"x": 1}}', calls=(F,), prompt=LLAMA),
    "Llama with its mark": Case(
        "llama3", '<|python_tag|>{"name": "g", "parameters": {}}', calls=(G,), prompt=LLAMA
    ),
    "Llama's text": Case("llama3", 'Hi {"name": "f"}', 'Hi {"name": "f"}', prompt=LLAMA),
    "Llama cut off": Case("llama3", '{"nam', '{"nam', prompt=LLAMA),
    "Llama with two objects": Case(
        "llama3",
        '{"name": "f", "parameters": {}}; {"name": "g"}',
        '{"name": "f", "parameters": {}}; {"name": "g"}',
        prompt=LLAMA,
    ),
    "Mistral": Case(
        "mistral",
        '[TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {}}]',
        calls=(F, G),
        prompt=MISTRAL,
    ),
    "Mistral's text": Case("mistral", "Hi [TOOL", "Hi [TOOL", prompt=MISTRAL),
}


def known(family: str) -> ResponseFormat:
    file = files(response_format.__package__) / "formats" / f"{family}.json"
    return read_format(json.loads(file.read_text()))


def parser(family: str, prompt: str = CHATML, *, reasoning: bool = True) -> AnswerParser:
    template = known(family).template
    inside = part_at_end(template, f"<|im_start|>user\nx<|im_end|>\n{prompt}")
    found = TemplateFormat(template, inside, TOOLS, frozenset(), None)
    return found.begin(reasoning=reasoning)


def joined(parts: Sequence[AnswerPart]) -> tuple[str, str, tuple[ToolCall, ...]]:
    return (
        "".join(part.content for part in parts),
        "".join(part.reasoning for part in parts),
        tuple(part.call for part in parts if part.call is not None),
    )


@pytest.mark.parametrize("name", CASES)
def test_an_answer_is_divided_alike_however_it_comes(name: str) -> None:
    case = CASES[name]
    for step in (1, 2, 3, 5, 7, 13, len(case.text) + 1):
        read = parser(case.family, case.prompt)
        parts = [
            part
            for at in range(0, len(case.text), step)
            for part in read.feed(case.text[at : at + step])
        ]
        assert joined([*parts, *read.finish()]) == (case.content, case.reasoning, case.calls)


def test_text_is_not_held_back_without_need() -> None:
    read = parser("hermes")
    assert joined(read.feed("Hello, "))[0] == "Hello,"
    assert joined(read.feed("world"))[0] == " world"


def test_a_deep_call_is_content() -> None:
    text = "<tool_call>" + "[" * 100_000
    read = parser("hermes")
    assert joined([*read.feed(text), *read.finish()]) == (text, "", ())


def test_many_line_breaks_are_read_in_time_that_grows_with_their_number() -> None:
    read = parser("qwen3")
    parts = [part for _ in range(200) for part in read.feed("\n" * 20)]
    assert joined([*parts, *read.finish()])[0] == "\n" * 4000


def test_reasoning_that_the_prompt_has_begun_is_known() -> None:
    template = known("qwen3").template
    begun = f"{CHATML}<think>\nhm"
    assert part_at_end(template, begun) == "thinking"
    for other in (CHATML, f"{begun}</think>", f"{begun}<|im_end|>\n{CHATML}", "a <think>"):
        assert part_at_end(template, other) is None
    assert part_at_end(known("hermes").template, begun) is None


def test_an_answer_with_a_structure_has_no_reasoning() -> None:
    for prompt in (CHATML, f"{CHATML}<think>\n"):
        read = parser("qwen3", prompt, reasoning=False)
        text = '<think>{"a": 1}</think>'
        assert joined([*read.feed(text), *read.finish()]) == (text, "", ())


def test_text_outside_of_all_parts_is_content() -> None:
    given = {"start_anchor": "A", "fields": {"tool_calls": {"open": "<c>", "close": "</c>"}}}
    found = TemplateFormat(read_format(given).template, None, TOOLS, frozenset(), None).begin()
    assert joined([*found.feed("hello"), *found.finish()]) == ("hello", "", ())


def test_a_part_that_a_template_demands_may_be_missing() -> None:
    fields: dict[str, object] = {"content": {}, "thinking": {"open": "<t>", "optional": False}}
    template = read_format({"start_anchor": "A", "fields": fields}).template
    found = TemplateFormat(template, None, (), frozenset(), None).begin()
    assert joined([*found.feed("hello"), *found.finish()]) == ("hello", "", ())
