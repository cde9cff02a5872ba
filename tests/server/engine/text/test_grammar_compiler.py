"""Tests that grammars are compiled within limits, and that what is wrong in them is named."""

import json
import time

import pytest

from server.engine.errors import InvalidRequestError
from server.engine.text import grammar_compiler
from server.engine.text.grammar_compiler import GrammarCompiler
from tests.tiny import EOS, VOCABULARY, tiny_tokenizer


def compiler(vocabulary: int = VOCABULARY, *eos: int) -> GrammarCompiler:
    return GrammarCompiler(tiny_tokenizer(), vocabulary, frozenset(eos or {EOS}))


def schema(**fields: object) -> str:
    return f"start: %json {json.dumps(fields)}"


FAULTY = {"type": "string", "format": "frob"}
REFUSED = (
    ("start: nothing", "field", "unknown name"),
    ("", "field", ""),
    ("start: /a(?=b)/", "field", "look-around"),
    ('start: start "a"', "field", "no text has this structure"),
    (schema(**{"$ref": "#"}), "field", "no text has this structure"),
    ("start: <|nothing|>", "field", "unknown special token"),
    (schema(type="frob"), "field", "Invalid type"),
    (schema(properties={"a": {"items": FAULTY}}), "field.properties.a.items", "Unknown format"),
    (schema(anyOf=[{}, {"uniqueItems": True}]), "field.anyOf[1]", "uniqueItems"),
    (
        schema(properties={"a": {"$ref": "#/$defs/x"}}, **{"$defs": {"x": FAULTY}}),
        "field.$defs.x",
        "Unknown format",
    ),
    (
        schema(properties={"a": {"$ref": "#/properties/b"}, "b": {}, "c": {"not": {}}}),
        "field.properties.c",
        "not",
    ),
)
# Each would take all memory, minutes, or more stack than there is.
HUGE = (
    schema(type="array", items={"type": "null"}, minItems=2**31),
    schema(type="array", items={"type": "null"}, maxItems=1_000_000),
    schema(type="integer", multipleOf=5_000_011),
    "start: /" + "a?" * 30_000 + "/",
    "start: a0\n" + "".join(f"a{i}: a{i + 1}\n" for i in range(4000)) + 'a4000: "x"',
)


@pytest.mark.parametrize(("lark", "place", "words"), REFUSED)
def test_a_wrong_grammar_is_refused_by_its_place(lark: str, place: str, words: str) -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        compiler().compile(lark, "field")
    assert (refusal.value.param, refusal.value.code) == (place, "invalid_structure")
    assert words in str(refusal.value)


@pytest.mark.parametrize("lark", HUGE, ids=range(len(HUGE)))
def test_a_grammar_beyond_the_limits_is_refused_in_seconds(lark: str) -> None:
    began = time.monotonic()
    with pytest.raises(InvalidRequestError, match="more time or memory") as refusal:
        compiler().compile(lark, "field")
    assert refusal.value.param == "field"
    assert time.monotonic() - began < grammar_compiler._TRIAL_SECONDS + 1


def test_a_grammar_is_tried_and_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = compiler()
    first = grammars.compile('start: "a"', "one")
    monkeypatch.setattr(grammar_compiler, "_try", None)
    again = grammars.compile('start: "a"', "two")
    assert again.matcher is first.matcher
    assert (first.field, again.field) == ("one", "two")


def test_only_the_last_grammars_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = compiler()
    monkeypatch.setattr(grammar_compiler, "_try", lambda _lark, _field: None)
    for number in range(grammar_compiler._KEPT + 3):
        grammars.compile(f'start: "{number}"', "field")
    assert len(grammars._kept) == grammar_compiler._KEPT
    assert 'start: "0"' not in grammars._kept


@pytest.mark.parametrize("vocabulary", [VOCABULARY - 100, VOCABULARY, VOCABULARY + 60])
def test_the_logits_may_be_narrower_or_wider_than_the_tokenizer(vocabulary: int) -> None:
    state = compiler(vocabulary, EOS, 100_000).compile('start: "a"', "field").begin()
    mask = state.mask()
    allowed = [token for token in range(8 * len(mask)) if mask[token // 8] >> token % 8 & 1]
    assert allowed == tiny_tokenizer().encode("a", add_special_tokens=False)
    assert state.completed_by(allowed[0])


def test_an_ambiguous_grammar_ends_with_an_error_before_it_stalls_the_engine() -> None:
    state = compiler().compile('start: s\ns: s s s | s s | "a" |', "grammar").begin()
    [letter] = tiny_tokenizer().encode("a", add_special_tokens=False)
    with pytest.raises(InvalidRequestError, match="items") as refusal:  # noqa: PT012
        for _ in range(200):
            state.mask()
            state.completed_by(letter)
    assert refusal.value.param == "grammar"


def test_a_schema_may_have_a_thousand_properties_that_may_be_left_out() -> None:
    properties = {f"p{number}": {"type": "integer"} for number in range(1000)}
    whole = schema(type="object", properties=properties)
    grammar = compiler().compile(whole, "json", of_schemas=True)
    state = grammar.begin()
    for token in tiny_tokenizer().encode('{"p7": 1, "p9', add_special_tokens=False):
        state.mask()
        state.completed_by(token)


def test_answers_do_not_share_a_state() -> None:
    grammar = compiler().compile('start: "ab"', "field")
    a, b = tiny_tokenizer().encode("ab", add_special_tokens=False)
    one, other = grammar.begin(), grammar.begin()
    assert not one.completed_by(a)
    assert one.mask() != other.mask() == grammar.begin().mask()
    assert one.completed_by(b)
    with pytest.raises(InvalidRequestError):
        other.completed_by(b)


def test_a_tokenizer_that_llguidance_cannot_read_is_a_refusal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("no such decoder")

    monkeypatch.setattr(grammar_compiler, "from_tokenizer", fail)
    with pytest.raises(InvalidRequestError, match="this model's tokenizer") as refusal:
        compiler().compile('start: "a"', "field")
    assert refusal.value.code == "unsupported_parameter"
