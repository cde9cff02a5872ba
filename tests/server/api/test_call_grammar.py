"""Tests the grammar of text with calls, token by token, for each way of writing calls."""

import pytest

from server.api.call_grammar import call_structure
from server.api.tools import ToolUse
from server.engine.chat import CallSyntax, Tool
from server.engine.torch.engine import TorchEngine
from tests.serving import Json
from tests.tiny import EOS, tiny_tokens

PARAMETERS: Json = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["x"],
}
PLAIN = CallSyntax("<call>", None, ("[",), ("|",), ("]</call>",), "arguments")
MARKED = CallSyntax("<bos>", EOS + 1, ("[",), (", ",), ("]",), "arguments")
BARE = CallSyntax("", None, (), None, (), "parameters")
GOOD, BAD = '{"name": "f", "arguments": {"x": 1}}', '{"name": "f", "arguments": {"y"'
# How calls are written, the pieces of an answer, and how many of its tokens are allowed.
STRICT: tuple[tuple[CallSyntax, tuple[str | int, ...], bool], ...] = (
    (PLAIN, ("Hello <b>",), True),
    (PLAIN, (f"Hi <call>[{GOOD}]</call>",), True),
    (PLAIN, (f"<call>[{GOOD}|{GOOD}]</call> and <call>[{GOOD}]</call>",), True),
    (PLAIN, (f"Hi <call>[{BAD}",), False),
    (PLAIN, (f"Hi <call>{BAD}",), False),
    (PLAIN, ("Hi <call> ",), False),
    (PLAIN, ('<call>[{"name": "g"',), False),
    (MARKED, ("<bos>[",), False),
    (MARKED, ("Hi [", EOS + 1, f"[{GOOD}, {GOOD}] so"), True),
    (MARKED, ("Hi ", EOS + 1, f"[{BAD}"), False),
    (BARE, ("Hello { }",), True),
    (BARE, ('{"name": "f", "parameters": {"x": 1}}',), True),
    (BARE, ('{"name": "f", "parameters": {"y"',), False),
    (BARE, ('  {"name": "g"',), False),
)


@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize(("syntax", "pieces", "allowed"), STRICT)
def test_calls_of_a_strict_tool_obey_its_schema_wherever_they_come(
    chat_engine: TorchEngine,
    syntax: CallSyntax,
    pieces: tuple[str | int, ...],
    allowed: bool,
    several: bool,
) -> None:
    use = ToolUse(
        (Tool("f", None, PARAMETERS, strict=True, field="tools.0.function"),), several=several
    )
    structure = call_structure(use, syntax, None)
    assert structure is not None
    assert structure.field == "tools.0.function.strict"
    matcher = chat_engine.compile_grammar(structure.lark, structure.field).matcher.deep_copy()
    tokens = [
        token
        for piece in pieces
        for token in (tiny_tokens(piece) if isinstance(piece, str) else [piece])
    ]
    several_calls = sum(piece.count(GOOD) for piece in pieces if isinstance(piece, str)) > 1
    accepted = matcher.try_consume_tokens(tokens)
    assert (accepted == len(tokens)) == (allowed and (several or not several_calls))
    assert not matcher.is_error()


NODE = {"type": "object", "properties": {"v": {"type": "integer"}}, "required": ["v"]}


@pytest.mark.parametrize(
    ("parameters", "arguments", "allowed"),
    [
        ({}, "{}", True),
        ({}, '{"y": 1}', False),
        (NODE, '{"v": 1}', True),
        (NODE, '{"v": 1, "y": 1}', False),
        ({**NODE, "additionalProperties": True}, '{"v": 1, "y": 1}', True),
        ({"properties": {"x": NODE}, "required": ["x"]}, '{"x": {"v": 1, "y": 1}}', False),
        ({"$ref": "#/$defs/n", "$defs": {"n": NODE}}, '{"v": 1}', True),
        ({"$ref": "#/$defs/n", "$defs": {"n": NODE}}, '{"v": 1, "y": 1}', False),
        ({"allOf": [NODE, {"properties": {"y": {}}}]}, '{"v": 1, "y": 1}', True),
    ],
)
def test_arguments_are_those_that_the_schema_declares(
    chat_engine: TorchEngine, parameters: dict[str, object], arguments: str, allowed: bool
) -> None:
    use = ToolUse((Tool("f", None, parameters, strict=True, field="tools.0.function"),))
    structure = call_structure(use, PLAIN, None)
    assert structure is not None
    matcher = chat_engine.compile_grammar(structure.lark, structure.field).matcher.deep_copy()
    call = f'<call>[{{"name": "f", "arguments": {arguments}}}]</call>'
    tokens = tiny_tokens(call)
    assert (matcher.try_consume_tokens(tokens) == len(tokens)) == allowed
