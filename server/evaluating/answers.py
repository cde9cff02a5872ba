"""The fields of the server's answers that an evaluation reads."""

from typing import Self

from pydantic import BaseModel, Field, JsonValue, model_validator


class Applied(BaseModel):
    """An intervention that the server says it applied, with all of its settings."""

    intervention: str
    digest: str
    kind: str
    settings: dict[str, JsonValue]


class Logprobs(BaseModel):
    """The log-probabilities of a text's tokens, in parallel lists."""

    token_logprobs: list[float | None]
    text_offset: list[int]

    @model_validator(mode="after")
    def _lists_are_equally_long(self) -> Self:
        if len(self.token_logprobs) != len(self.text_offset):
            raise ValueError("the lists have different lengths")
        return self


class Choice(BaseModel):
    """One completion."""

    text: str
    logprobs: Logprobs | None = None


class CompletionAnswer(BaseModel):
    """The answer of `POST /v1/completions`."""

    choices: list[Choice] = Field(min_length=1)
    steering: list[Applied] | None = None
