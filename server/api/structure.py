"""The request fields that say which structure an answer must have, and the grammars they give."""

import json
import re
from typing import Annotated, Final, Literal, NamedTuple, TypeAlias

from llguidance import grammar_from, regex_to_lark
from llguidance.gbnf_to_lark import gbnf_to_lark
from pydantic import Field, JsonValue, PlainValidator, model_validator

from interventions.strict_json import StrictJSONError, parse_json
from server.api.closed_schema import closed_schema
from server.api.errors import ApiError, invalid
from server.api.strict import Strict, only_neutral
from server.engine.errors import InvalidRequestError
from server.engine.grammar import refused

MAX_STRUCTURE: Final = 64 * 1024  # characters of a schema, of a grammar, or of all choices
MAX_PATTERN: Final = 8 * 1024  # characters of a regular expression, or of a grammar in GBNF
MAX_CHOICES: Final = 1000

# Lark's first rule is `start: ...`, and GBNF's is `root ::= ...`.
_LARK: Final = re.compile(r"^(?:%llguidance\b|[?!]?start\b[^\n:]*:(?!:=))", re.MULTILINE)

_ONLY_RULE: Final = "start: "
_PLACE: Final = re.compile(r": at (?P<line>\d+)\(\d+\): (?P<fault>.*)", re.DOTALL)

Schema: TypeAlias = dict[str, JsonValue]

_ANY_OBJECT: Final[Schema] = {"type": "object"}


class Structure(NamedTuple):
    """A grammar that is to be compiled."""

    lark: str  # in llguidance's dialect
    field: str  # the request's field that asks for it
    lines: tuple[str, ...] = ()  # the fields that the grammar's first lines are made of
    of_schemas: bool = False  # beside JSON schemas, there is nothing of the client's in it

    def json_rule(self) -> str:
        """Return the body of the only rule of a grammar that is a JSON schema.

        Raises:
            ApiError: it is another grammar, whose texts may look like calls.
        """
        if not self.of_schemas:
            message = f"'{self.field}' cannot be used together with tools that may be called."
            raise invalid(message, self.field, "unsupported_parameter")
        return self.lark.removeprefix(_ONLY_RULE)

    def blame(self, error: InvalidRequestError) -> InvalidRequestError:
        """Return a compiler's error with the field that the line at fault is made of."""
        found = _PLACE.search(str(error))
        if found is None or not 0 < int(found["line"]) <= len(self.lines):
            return error
        return refused(self.lines[int(found["line"]) - 1], found["fault"])


def _parse_schema(value: object) -> Schema:
    """Take a schema as an object, or as the text of one."""
    if isinstance(value, str):
        if len(value) > MAX_STRUCTURE:
            raise ValueError(f"it has {len(value):,} characters, more than {MAX_STRUCTURE:,}")
        try:
            value = parse_json(value)
        except StrictJSONError as error:
            raise ValueError(f"its text {error}") from None
    if not isinstance(value, dict):
        raise ValueError("it must be a JSON schema: an object, or a string that holds one")
    return value


class StructuredOutputs(Strict):
    """vLLM's field: one of a JSON schema, any JSON object, a pattern, choices, and a grammar."""

    schema_: Annotated[
        Schema | None, PlainValidator(_parse_schema, json_schema_input_type=Schema | str)
    ] = Field(None, alias="json")
    json_object: Annotated[bool, only_neutral("structured_outputs.json_object", True)] = False
    regex: Annotated[str, Field(max_length=MAX_PATTERN)] | None = None
    choice: Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)] | None = None
    grammar: Annotated[str, Field(min_length=1, max_length=MAX_STRUCTURE)] | None = None
    disable_any_whitespace: bool = False  # between JSON's tokens
    disable_additional_properties: bool = False  # in objects that declare properties

    @model_validator(mode="after")
    def _check_one(self) -> "StructuredOutputs":
        kinds = {"schema_", "json_object", "regex", "choice", "grammar"}
        if len(self.model_fields_set & kinds) != 1:
            raise ValueError("it takes one of json, json_object, regex, choice and grammar")
        return self

    def to_structure(self, field: str) -> Structure:
        """Return the structure. `field` is this object's place in the request.

        Raises:
            ApiError: what is given is too large, or is no pattern or grammar.
        """
        if self.schema_ is not None:
            return _of_schema(
                self.schema_,
                f"{field}.json",
                compact=self.disable_any_whitespace,
                closed=self.disable_additional_properties,
            )
        if self.regex is not None:
            return _of_regex(self.regex, f"{field}.regex")
        if self.choice is not None:
            text = json.dumps(self.choice)
            _check_size(text, f"{field}.choice")
            return Structure(grammar_from("choice", text), f"{field}.choice")
        if self.grammar is not None:
            return _of_grammar(self.grammar, f"{field}.grammar")
        return _of_schema(_ANY_OBJECT, f"{field}.json_object", compact=self.disable_any_whitespace)


class JsonSchemaFormat(Strict):
    """The schema of a response format, and its name, which changes nothing."""

    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: Schema = Field(default_factory=dict, alias="schema")
    strict: bool | None = None  # a schema is obeyed to the letter, whatever this says


class ResponseFormat(Strict):
    """OpenAI's field: plain text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> "ResponseFormat":
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError("'json_schema' goes with the type json_schema, and with no other")
        return self

    @property
    def is_text(self) -> bool:
        """True if the answer is free."""
        return self.type == "text"

    def to_structure(self, field: str) -> Structure | None:
        """Return the structure, None for text. `field` is this object's place in the request.

        Raises:
            ApiError: the schema is too large.
        """
        if self.json_schema is not None:
            return _of_schema(self.json_schema.schema_, f"{field}.json_schema.schema", closed=True)
        return _of_schema(_ANY_OBJECT, field) if self.type == "json_object" else None


class TextFormat(Strict):
    """The same as `ResponseFormat` in the form that `/v1/responses` takes."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")] | None = None
    description: str | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool | None = None  # a schema is obeyed to the letter, whatever this says

    @model_validator(mode="after")
    def _check_schema(self) -> "TextFormat":
        given = {self.name is not None, self.schema_ is not None}
        if given != {self.type == "json_schema"}:
            raise ValueError("'name' and 'schema' go with the type json_schema, and no other")
        return self

    @property
    def is_text(self) -> bool:
        """True if the answer is free."""
        return self.type == "text"

    def to_structure(self, field: str) -> Structure | None:
        """Return the structure, None for text; see `ResponseFormat.to_structure`."""
        if self.schema_ is not None:
            return _of_schema(self.schema_, f"{field}.schema", closed=True)
        return _of_schema(_ANY_OBJECT, field) if self.type == "json_object" else None


def _of_schema(
    schema: Schema, field: str, *, compact: bool = False, closed: bool = False
) -> Structure:
    _check_size(json.dumps(schema, ensure_ascii=False), field)
    used = closed_schema(schema) if closed else dict[str, object](schema)
    if compact:
        used["x-guidance"] = {"whitespace_flexible": False}
    text = json.dumps(used, ensure_ascii=False)
    return Structure(f"{_ONLY_RULE}%json {text}", field, of_schemas=True)


def _of_regex(pattern: str, field: str) -> Structure:
    backslashes = len(pattern) - len(pattern.rstrip("\\"))
    if backslashes % 2:
        raise _refused(field, "it ends with a backslash")
    return Structure(f"start: /{regex_to_lark(pattern, 'd')}/", field)


def _of_grammar(text: str, field: str) -> Structure:
    # Blank lines mean nothing, and thousands of them take seconds to read.
    text = "\n".join(line for line in text.splitlines() if line.strip())
    if _LARK.search(text) or "::=" not in text:
        return Structure(text, field)
    if len(text) > MAX_PATTERN:
        raise _refused(field, f"in GBNF it may have {MAX_PATTERN:,} characters; Lark takes more")
    try:
        return Structure(gbnf_to_lark(text), field)
    except Exception as error:  # the converter raises what it happens to meet
        raise _refused(field, f"it is no grammar in GBNF: {str(error)[:300]}") from None


def _check_size(text: str, field: str) -> None:
    if len(text) > MAX_STRUCTURE:
        message = f"'{field}' has {len(text):,} characters, more than {MAX_STRUCTURE:,}."
        raise invalid(message, field, "structure_too_large")


def _refused(field: str, fault: str) -> ApiError:
    return invalid(f"'{field}' cannot be used: {fault}.", field, "invalid_structure")
