"""The choices of `/v1/completions`: text, and log-probabilities in parallel lists."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from pydantic import JsonValue

from server.api.frames import finite
from server.engine.base import FinishReason, StepOutput, TokenLogprobs


@dataclass(frozen=True, slots=True)
class PromptEcho:
    """What `echo` puts before a completion."""

    text: str
    first_token: str  # follows nothing, so that it has no probability


@dataclass(frozen=True, slots=True)
class _Scored:
    """A token in the lists of log-probabilities."""

    text: str
    logprob: float | None
    top: dict[str, JsonValue] | None


@dataclass(slots=True)
class CompletionChoice:
    """Implements server.api.frames.Choice."""

    index: int
    with_logprobs: bool
    echo: PromptEcho | None = None  # until it was said
    _texts: list[str] = field(default_factory=list)
    _tokens: list[_Scored] = field(default_factory=list)
    _finish_reason: FinishReason | None = None
    _offset: int = 0  # characters of the tokens that were listed

    def anew(self) -> "CompletionChoice":
        """An empty one, told in the same way."""
        return CompletionChoice(self.index, self.with_logprobs, self.echo)

    def add(self, output: StepOutput) -> None:
        """Append what one step gave."""
        text, tokens = self._take(output)
        self._texts.append(text)
        self._tokens.extend(tokens)
        self._finish_reason = output.finish_reason

    def body(self) -> dict[str, JsonValue]:
        """The choice of a whole answer."""
        return self._choice("".join(self._texts), self._tokens, self._finish_reason)

    def deltas(self, output: StepOutput) -> Sequence[dict[str, JsonValue]]:
        """The choice in a stream's next chunk, if the step has anything for the client."""
        text, tokens = self._take(output)
        if not (text or tokens or output.finish_reason):
            return ()
        return (self._choice(text, tokens, output.finish_reason),)

    def _take(self, output: StepOutput) -> tuple[str, list[_Scored]]:
        """An output's text and tokens, those of the prompt before the first one's."""
        tokens = [_scored(token) for token in (*output.prompt_logprobs, *output.logprobs)]
        echo, self.echo = self.echo, None
        if echo is None:
            return output.text, tokens
        if self.with_logprobs:
            tokens.insert(0, _Scored(echo.first_token, None, None))
        return echo.text + output.text, tokens

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
        offsets: list[JsonValue] = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token.text)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [token.top for token in tokens],
            "text_offset": offsets,
        }


def _scored(token: TokenLogprobs) -> _Scored:
    return _Scored(token.chosen.text, finite(token.chosen.logprob), _alternatives(token))


def _alternatives(logprobs: TokenLogprobs) -> dict[str, JsonValue]:
    """The best tokens, and the chosen one even where it is not among them, as OpenAI does."""
    alternatives: dict[str, JsonValue] = {}
    # Two ids may have equal text (incomplete bytes): the better one stands for it.
    for token in (*logprobs.top, logprobs.chosen):
        alternatives.setdefault(token.text, finite(token.logprob))
    return alternatives
