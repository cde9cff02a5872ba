"""The fields that all completion requests share: their checks, and the sampling settings."""

import re
from collections.abc import Sequence
from typing import Annotated, Final, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator

from server.api.logprobs import Listing
from server.api.request_shapes import LogitBiasShape, SteeringShape, StopShape
from server.api.strict import Strict, only_neutral
from server.api.structure import Structure, StructuredOutputs
from server.engine.grammar import CompiledGrammar
from server.engine.request import SamplingSettings

MAX_STOPS: Final = 32  # OpenAI takes 4; lm-evaluation-harness sends as many as a task has
MAX_STOP_LENGTH: Final = 1000
MAX_STOP_TOKENS: Final = 128
MAX_LOGPROBS: Final = 20  # alternatives of each token
MAX_BIASES: Final = 300
LARGEST_BIAS: Final = 100
SHOWN: Final = 100  # characters of a key that an error message shows
SEEDS: Final = 2**63
TOKENS: Final = 2**31  # above the length of any context and the ids of any tokenizer

# Each id has one spelling, so that no id comes twice.
TOKEN_ID: Final = re.compile("0|[1-9][0-9]{0,9}")


def _parse_stops(value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise ValueError(f"it must be a string or a list of at most {MAX_STOPS} strings")
    strings = tuple(
        stop for stop in stops if isinstance(stop, str) and 0 < len(stop) <= MAX_STOP_LENGTH
    )
    if len(strings) != len(stops):
        raise ValueError(f"each stop is a string of 1 to {MAX_STOP_LENGTH} characters")
    return strings


def _parse_logit_bias(value: object) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, dict):
        raise ValueError("it must be an object of token ids, as strings, with a number each")
    if len(value) > MAX_BIASES:
        raise ValueError(f"it has {len(value)} entries, more than {MAX_BIASES}")
    for token, bias in value.items():
        if not TOKEN_ID.fullmatch(token):
            raise ValueError(
                f"its keys must be token ids, as strings of digits; {token[:SHOWN]!r} is none"
            )
        is_number = isinstance(bias, int | float) and not isinstance(bias, bool)
        if not is_number or not -LARGEST_BIAS <= bias <= LARGEST_BIAS:
            raise ValueError(
                f"its values must be numbers from {-LARGEST_BIAS} to {LARGEST_BIAS}; that of token "
                f"{token} is none"
            )
    return tuple((int(token), float(bias)) for token, bias in value.items())


def _not_zero(length: int) -> int:
    if length == 0:
        raise ValueError("it must be at least 1, or -1 for all that the context has room for")
    return length


def _none_for_minus_one(value: object) -> object:
    """Read the seed -1 as no seed, as llama.cpp and vLLM do: some clients always send a seed."""
    return None if type(value) is int and value == -1 else value


TokenId: TypeAlias = Annotated[int, Field(ge=0, lt=TOKENS)]
# -1 keeps as many tokens as the context has room for.
TruncatedLength: TypeAlias = Annotated[int, Field(ge=-1, lt=TOKENS), AfterValidator(_not_zero)]


class StreamOptions(Strict):
    """Options that say what a stream carries beside the text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False  # vLLM's: usage in every chunk
    include_obfuscation: Annotated[
        bool, only_neutral("stream_options.include_obfuscation", False)
    ] = False


class GenerationFields(Strict):
    """The fields that requests for completions and for chat completions have in common.

    `server.api.steering_resolver`, which knows the stored interventions, checks `steering`. Null
    asks for no steering there, even if the server has a default.
    """

    model: str
    steering: Annotated[
        object, PlainValidator(lambda value: value, json_schema_input_type=SteeringShape)
    ] = None

    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0  # 0 takes the best token
    top_k: Annotated[int, Field(ge=-1, lt=TOKENS)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: Annotated[
        tuple[tuple[int, float], ...],
        PlainValidator(_parse_logit_bias, json_schema_input_type=LogitBiasShape),
    ] = ()
    n: Annotated[int, Field(ge=1, le=128)] = 1
    stop: Annotated[
        tuple[str, ...], PlainValidator(_parse_stops, json_schema_input_type=StopShape)
    ] = ()
    seed: Annotated[
        Annotated[int, Field(ge=-SEEDS, lt=SEEDS)] | None, BeforeValidator(_none_for_minus_one)
    ] = None
    ignore_eos: bool = False
    # vLLM's fields, from here on.
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS)] = Field(
        default_factory=list
    )
    include_stop_str_in_output: bool = False
    min_tokens: Annotated[int, Field(ge=0, lt=TOKENS)] = 0
    skip_special_tokens: bool = True
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    truncate_prompt_tokens: TruncatedLength | None = None
    return_token_ids: bool = False
    return_tokens_as_token_ids: bool = False
    structured_outputs: StructuredOutputs | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    # This server's own fields: they ask for the answer's toxicity, and for the base model's answer.
    toxicity: bool = False
    compare: bool = False
    user: str | None = None  # for OpenAI's abuse tracking; has no effect here

    @property
    def steering_given(self) -> bool:
        """True if the request has the field `steering`, even with the value null."""
        return "steering" in self.model_fields_set

    @property
    def is_structured(self) -> bool:
        """True if the request says which structure its answer must have."""
        return self.structured_outputs is not None

    def structure(self) -> Structure | None:
        """Return the structure that the answer must have, None if it is free.

        Raises:
            ApiError: what is asked for is too large, or is no structure.
        """
        given = self.structured_outputs
        return None if given is None else given.to_structure("structured_outputs")

    def truncated(self, tokens: Sequence[int], room: int) -> Sequence[int]:
        """Return a prompt's last tokens, as many as `truncate_prompt_tokens` says.

        Args:
            room: the tokens that the context has room for beside the answer.
        """
        length = self.truncate_prompt_tokens
        kept = max(room, 1) if length == -1 else length
        return tokens if kept is None else tokens[-kept:]

    def listing(self, prompt: Sequence[int], logprobs: int | None) -> Listing:
        """Return what the answer tells of its tokens and of the prompt's."""
        return Listing(
            tuple(prompt) if self.return_token_ids else (),
            logprobs,
            self.prompt_logprobs,
            self.return_token_ids,
            self.return_tokens_as_token_ids,
        )

    def settings(
        self,
        choice: int,
        grammar: CompiledGrammar | None,
        *,
        max_tokens: int,
        logprobs: int | None,
        echo_logprobs: int | None = None,
    ) -> SamplingSettings:
        """Return one choice's sampling settings; choice i has `seed + i`, so choices differ."""
        wanted = [each for each in (echo_logprobs, self.prompt_logprobs) if each is not None]
        return SamplingSettings(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p or 1.0,
            top_k=max(self.top_k, 0) if self.top_p else 1,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias,
            seed=None if self.seed is None else (self.seed + choice) % SEEDS,
            stop=self.stop,
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
            include_stop=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
            logprobs=logprobs,
            prompt_logprobs=max(wanted, default=None),
            grammar=grammar,
        )
