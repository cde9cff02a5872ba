"""The fields of a completion request, strictly checked, and what they mean to the engine."""

from typing import Annotated, Final, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator
from pydantic_core import PydanticCustomError

from server.api.parsing import UNSUPPORTED
from server.engine.base import SamplingSettings

DEFAULT_MAX_TOKENS: Final = 16
MAX_STOPS: Final = 4
MAX_STOP_LENGTH: Final = 1000
SEEDS: Final = 2**63

Prompt: TypeAlias = str | tuple[int, ...]


def _parse_prompts(value: object) -> tuple[Prompt, ...]:
    """A string, token ids, or a list of either, as a tuple of prompts."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not value:
        raise ValueError("it must be a string, a list of token ids, or a list of either")
    if all(type(item) is int for item in value):
        return (_parse_token_ids(value),)
    if all(isinstance(item, str) for item in value):
        return tuple(value)
    if all(isinstance(item, list) for item in value):
        return tuple(_parse_token_ids(item) for item in value)
    raise ValueError("its items must all be strings, all token ids, or all lists of token ids")


def _parse_token_ids(value: list[object]) -> tuple[int, ...]:
    ids = tuple(item for item in value if type(item) is int and 0 <= item < 2**31)
    if len(ids) != len(value):
        raise ValueError("a token id is a whole number from 0 on")
    if not ids:
        raise ValueError("a list of token ids is empty")
    return ids


def _parse_stops(value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise ValueError(f"it must be a string or a list of at most {MAX_STOPS} strings")
    strings = tuple(
        stop for stop in stops if isinstance(stop, str) and 0 < len(stop) <= MAX_STOP_LENGTH
    )
    if len(strings) != len(stops):
        raise ValueError(f"each stop is a string of 1 to {MAX_STOP_LENGTH} characters")
    return strings


def _only(name: str, neutral: object) -> AfterValidator:
    """Accept a field that we do not implement only at the value that means nothing."""

    def check(value: object) -> object:
        if value is not None and value != neutral:
            message = "This server does not support '{name}'."
            raise PydanticCustomError(UNSUPPORTED, message, {"name": name})
        return value

    return AfterValidator(check)


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """What a stream carries beside the text."""

    include_usage: bool | None = None
    include_obfuscation: Annotated[
        bool | None, _only("stream_options.include_obfuscation", False)
    ] = None


class CompletionRequest(_Strict):
    """The body of `POST /v1/completions`. As with OpenAI, null means that a field is not given.

    `steering` is the exception: null asks for none, even where the server has a default. It is
    checked with the interventions at hand, in `server.api.steering`.
    """

    model: str
    prompt: Annotated[tuple[Prompt, ...], PlainValidator(_parse_prompts)]
    steering: object = None

    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None
    stop: Annotated[tuple[str, ...], PlainValidator(_parse_stops)] = ()
    seed: Annotated[int, Field(ge=-SEEDS, lt=SEEDS)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None  # OpenAI's abuse tracking: nothing that we could honour or break

    echo: Annotated[bool | None, _only("echo", False)] = None
    suffix: Annotated[str | None, _only("suffix", "")] = None
    logit_bias: Annotated[dict[str, float] | None, _only("logit_bias", {})] = None
    presence_penalty: Annotated[float | None, _only("presence_penalty", 0.0)] = None
    frequency_penalty: Annotated[float | None, _only("frequency_penalty", 0.0)] = None

    @property
    def choices_per_prompt(self) -> int:
        """OpenAI's `n`."""
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that counts tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(self, choice: int) -> SamplingSettings:
        """How to sample one choice. Choice i draws by `seed + i`, so that choices differ."""
        return SamplingSettings(
            max_tokens=DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(self.top_k or 0, 0),
            seed=None if self.seed is None else (self.seed + choice) % SEEDS,
            stop=self.stop,
            ignore_eos=bool(self.ignore_eos),
            logprobs=self.logprobs,
        )
