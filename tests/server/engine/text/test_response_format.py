"""Tests that a model's own format of answers is found, and that operators may give another."""

import json
import re
from importlib.resources import files
from pathlib import Path

import pytest

from server.engine.chat import CallSyntax
from server.engine.templates import Templates, TemplatesError
from server.engine.text import response_format
from server.engine.text.call_marks import call_syntax, marks_of
from server.engine.text.response_format import (
    find_format,
    install_templates,
    read_format,
    recognised,
)
from tests.tiny import tiny_tokenizer

FOLDER = files(response_format.__package__) / "formats"
FAMILIES = sorted(
    file.name.removesuffix(".json") for file in FOLDER.iterdir() if file.name.endswith(".json")
)
RESPONSE = {"start_anchor": "<assistant>", "fields": {"content": {}}}


def given(family: str) -> dict[str, object]:
    read: dict[str, object] = json.loads((FOLDER / f"{family}.json").read_text())
    return read


def test_the_documented_families_are_known() -> None:
    assert FAMILIES == ["hermes", "llama3", "mistral", "qwen3", "smollm2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_recognised_by_its_chat_template(family: str) -> None:
    texts = given(family)["recognise"]
    assert isinstance(texts, list)
    found = recognised(" ".join(texts))
    assert found is not None
    assert found.calls == given(family)["calls"]
    assert found.has_reasoning == (family == "qwen3")
    assert recognised(" ".join(texts[1:])) is not found


def test_the_example_of_the_page_is_a_format() -> None:
    page = (Path(__file__).parents[4] / "docs" / "tools.md").read_text()
    [example] = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    found = read_format(json.loads(example))
    assert found.has_calls
    assert found.calls == given("hermes")["calls"]


def test_special_tokens_are_told_apart_in_the_marks() -> None:
    special = {"[TOOL_CALLS]": 5, "[/INST]": 6, "<|python_tag|>": 7}
    for family, token in (("mistral", 5), ("llama3", 7)):
        found = read_format(given(family))
        assert marks_of(found, found.template.fields, special) == {token}
        assert marks_of(found, {"content"}, special) == frozenset()
    calls = read_format(given("mistral")).calls
    assert calls is not None
    pieces = ((" [",), (", ",), ("]",), "arguments")
    assert call_syntax(calls, special) == CallSyntax("[TOOL_CALLS]", 5, *pieces)
    assert call_syntax(calls, {}) == CallSyntax("[TOOL_CALLS]", None, *pieces)
    marked = {**calls, "separator": "</s>a"}
    assert call_syntax(marked, {"</s>": 3}).separator == (3, "a")


def test_the_tokenizers_own_format_comes_first() -> None:
    tokenizer = tiny_tokenizer("<tool_call> <tool_response> <|im_start|>")
    hermes = find_format(tokenizer)
    assert hermes is not None
    assert hermes.has_calls
    tokenizer.response_template = RESPONSE
    own = find_format(tokenizer)
    assert own is not None
    assert not own.has_calls
    assert own.calls == hermes.calls  # which transformers' templates lack
    by_operator = find_format(tokenizer, given=True)
    assert by_operator is not None
    assert by_operator.calls is None
    tokenizer.response_template = None
    tokenizer.chat_template = {
        "default": "a",
        "tool_use": "<tool_call> <tool_response> <|im_start|>",
    }
    assert find_format(tokenizer) == hermes
    assert recognised("<tool_call> <tool_response> <|im_start|> <function=f>") is None
    assert find_format(tiny_tokenizer("{{ messages }}")) is None
    assert find_format(tiny_tokenizer(None)) is None


@pytest.mark.parametrize(
    "wrong",
    [
        *("[]", "{", "5", "{}", json.dumps({**RESPONSE, "frob": 1})),
        json.dumps({**RESPONSE, "calls": {"opening": "a"}}),
        json.dumps(
            {
                **RESPONSE,
                "calls": dict.fromkeys(("mark", "opening", "separator", "closing", "arguments")),
            }
        ),
        json.dumps({**RESPONSE, "fields": {"content": {"close_pattern": "("}}}),
        json.dumps({**RESPONSE, "fields": {"content": {"content": []}}}),
        json.dumps({**RESPONSE, "chat_template": 5}),
    ],
)
def test_a_wrong_response_template_stops_the_start(wrong: str, tmp_path: Path) -> None:
    file = tmp_path / "response.json"
    file.write_text(wrong)
    with pytest.raises(TemplatesError, match="--response-template"):
        install_templates(Templates(response=file), tiny_tokenizer())


def test_a_wrong_chat_template_stops_the_start(tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    with pytest.raises(TemplatesError, match="--chat-template"):
        install_templates(Templates(chat=file), tiny_tokenizer())
    file.write_text("{% for %}")
    with pytest.raises(TemplatesError, match="--chat-template"):
        install_templates(Templates(chat=file), tiny_tokenizer())


def test_a_wrong_template_of_the_tokenizers_own_stops_the_start() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.response_template = {"fields": 5}
    with pytest.raises(TemplatesError, match="the tokenizer's response template"):
        find_format(tokenizer)
