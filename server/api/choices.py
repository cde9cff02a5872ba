"""The choices of `/v1/completions`: text, and log-probabilities in parallel lists."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from pydantic import JsonValue

from server.api.logprobs import ListedTokens, finite
from server.engine.base import FinishReason, PromptDescription, StepOutput, TokenLogprobs


@dataclass(frozen=True, slots=True)
class _Scored:
    text: str
    logprob: float | None
    top: dict[str, JsonValue] | None
    offset: int  # the character of the choice's text in which it begins


@dataclass(slots=True)
class CompletionChoice:
    """Implements server.api.frames.Choice, which documents the methods."""

    index: int
    with_logprobs: bool
    echo: PromptDescription | None = None  # the prompt to repeat; None once it is repeated
    _texts: list[str] = field(default_factory=list)
    _tokens: list[_Scored] = field(default_factory=list)
    _finish_reason: FinishReason | None = None
    _quoted: ListedTokens = field(default_factory=ListedTokens)
    _echoed: int = 0  # characters of the repeated prompt, before the completion

    def empty_copy(self) -> "CompletionChoice":
        return CompletionChoice(self.index, self.with_logprobs, self.echo)

    def add(self, output: StepOutput) -> None:
        text, tokens = self._take(output)
        self._texts.append(text)
        self._tokens.extend(tokens)
        self._finish_reason = output.finish_reason

    def body(self) -> dict[str, JsonValue]:
        return self._choice("".join(self._texts), self._tokens, self._finish_reason)

    def deltas(self, output: StepOutput) -> Sequence[dict[str, JsonValue]]:
        text, tokens = self._take(output)
        if not (text or tokens or output.finish_reason):
            return ()
        return (self._choice(text, tokens, output.finish_reason),)

    def _take(self, output: StepOutput) -> tuple[str, list[_Scored]]:
        """Return an output's text and tokens; an echoed prompt comes before the first output."""
        text, tokens = output.text, []
        echo, self.echo = self.echo, None
        if echo is not None:
            text = echo.text + text
            self._echoed = len(echo.text)
            if self.with_logprobs:
                tokens = _prompt_tokens(echo, output.prompt_logprobs)
        listed = self._quoted.take(output)
        return text, tokens + [_scored(token, self._echoed + token.offset) for token in listed]

    def _choice(
        self, text: str, tokens: Sequence[_Scored], finish_reason: FinishReason | None
    ) -> dict[str, JsonValue]:
        return {
            "index": self.index,
            "text": text,
            "logprobs": self._logprobs(tokens) if self.with_logprobs else None,
            "finish_reason": finish_reason,
        }

    def _logprobs(self, tokens: Sequence[_Scored]) -> dict[str, JsonValue]:
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [token.top for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }


def _prompt_tokens(echo: PromptDescription, logprobs: Sequence[TokenLogprobs]) -> list[_Scored]:
    first, *others = echo.offsets
    return [
        # The first token follows nothing, so it has no probability.
        _Scored(echo.first_token, None, None, first),
        *(_scored(token, offset) for token, offset in zip(logprobs, others, strict=True)),
    ]


def _scored(token: TokenLogprobs, offset: int) -> _Scored:
    chosen = token.chosen
    return _Scored(chosen.text, finite(chosen.logprob), _alternatives(token), offset)


def _alternatives(logprobs: TokenLogprobs) -> dict[str, JsonValue]:
    """Return the best tokens and the chosen token with their log-probabilities, as OpenAI does."""
    alternatives: dict[str, JsonValue] = {}
    # Two ids may have equal text (incomplete bytes); the better one is kept.
    for token in (*logprobs.top, logprobs.chosen):
        alternatives.setdefault(token.text, finite(token.logprob))
    return alternatives
