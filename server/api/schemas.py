"""The fields of `POST /v1/completions` that a chat request lacks, or has in another form."""

from typing import Annotated, Final, TypeAlias

from pydantic import BeforeValidator, Field, PlainValidator

from server.api.fields import MAX_LOGPROBS, TOKENS, GenerationFields
from server.api.request_shapes import PromptShape
from server.api.strict import only_neutral
from server.engine.grammar import CompiledGrammar
from server.engine.request import SamplingSettings

DEFAULT_MAX_TOKENS: Final = 16
MAX_PROMPTS: Final = 2048  # as many as OpenAI takes; the operator's limit is on prompts times n

Prompt: TypeAlias = str | tuple[int, ...]


def _parse_prompts(value: object) -> tuple[Prompt, ...]:
    """Parse a string, token ids, or a list of either, to a tuple of prompts."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise ValueError("it must be a string, a list of token ids, or a list of either")
    if all(type(item) is int for item in value):
        return (_parse_token_ids(value),)
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"it has {len(value)} prompts, more than {MAX_PROMPTS}")
    if all(isinstance(item, str) for item in value):
        return tuple(value)
    if all(isinstance(item, list) for item in value):
        return tuple(_parse_token_ids(item) for item in value)
    raise ValueError("its items must all be strings, all token ids, or all lists of token ids")


def _parse_token_ids(value: list[object]) -> tuple[int, ...]:
    ids = tuple(item for item in value if type(item) is int and 0 <= item < TOKENS)
    if len(ids) != len(value):
        raise ValueError("a token id is a whole number from 0 on")
    if not ids:
        raise ValueError("a list of token ids is empty")
    return ids


def _none_for_false(value: object) -> object:
    """Read false as None: in a chat request `logprobs` is a boolean, and false asks for none."""
    return None if value is False else value


class CompletionRequest(GenerationFields):
    """The body of `POST /v1/completions`."""

    prompt: Annotated[
        tuple[Prompt, ...], PlainValidator(_parse_prompts, json_schema_input_type=PromptShape)
    ]
    max_tokens: Annotated[int, Field(ge=0, lt=TOKENS)] = DEFAULT_MAX_TOKENS
    best_of: Annotated[int, Field(ge=1)] | None = None
    logprobs: Annotated[
        Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None, BeforeValidator(_none_for_false)
    ] = None
    echo: bool = False
    suffix: Annotated[str, only_neutral("suffix", "")] = ""

    def sampling(self, choice: int, grammar: CompiledGrammar | None) -> SamplingSettings:
        """Return one choice's sampling settings; `echo` asks for the prompt's logprobs too."""
        return self.settings(
            choice,
            grammar,
            max_tokens=self.max_tokens,
            logprobs=self.logprobs,
            echo_logprobs=self.logprobs if self.echo else None,
        )
