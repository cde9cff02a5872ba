"""The choices of `/v1/completions`: text, and log-probabilities in parallel lists."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pydantic import JsonValue

from server.api.logprobs import ListedTokens, Listing, finite
from server.engine.output import FinishReason, PromptDescription, StepOutput, TokenLogprobs


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
    listing: Listing
    echo: PromptDescription | None = None  # the prompt to repeat; None once it is repeated
    _texts: list[str] = field(default_factory=list)
    _tokens: list[_Scored] = field(default_factory=list)
    _token_ids: list[int] = field(default_factory=list)
    _of_prompt: dict[str, JsonValue] | None = None  # None before the first output
    _finish_reason: FinishReason | None = None
    _quoted: ListedTokens = field(default_factory=ListedTokens)
    _echoed: int = 0  # characters of the repeated prompt, before the completion

    def empty_copy(self) -> "CompletionChoice":
        return CompletionChoice(self.index, self.listing, self.echo)

    def shared(self) -> Mapping[str, JsonValue]:
        return {}

    def add(self, output: StepOutput) -> None:
        if self._of_prompt is None:
            self._of_prompt = self.listing.of_prompt(output.prompt_logprobs)
        text, tokens = self._take(output)
        self._texts.append(text)
        self._tokens.extend(tokens)
        self._token_ids += output.token_ids
        self._finish_reason = output.finish_reason

    def body(self) -> dict[str, JsonValue]:
        text = "".join(self._texts)
        choice = self._choice(text, self._tokens, self._token_ids, self._finish_reason)
        return choice | (self._of_prompt or {})

    def deltas(self, output: StepOutput) -> Sequence[dict[str, JsonValue]]:
        of_prompt: dict[str, JsonValue] = {}
        if self._of_prompt is None:
            of_prompt = self._of_prompt = self.listing.of_prompt(output.prompt_logprobs)
        text, tokens = self._take(output)
        shows_ids = self.listing.token_ids and output.token_ids
        if not (text or tokens or shows_ids or output.finish_reason):
            return ()
        choice = self._choice(text, tokens, output.token_ids, output.finish_reason)
        return (choice | of_prompt,)

    def _take(self, output: StepOutput) -> tuple[str, list[_Scored]]:
        """Return an output's text and tokens; an echoed prompt comes before the first output."""
        text, tokens = output.text, []
        echo, self.echo = self.echo, None
        if echo is not None:
            text = echo.text + text
            self._echoed = len(echo.text)
            if self.listing.logprobs is not None:
                tokens = self._prompt_tokens(echo, output.prompt_logprobs)
        listed = self._quoted.take(output)
        return text, tokens + [self._scored(each, self._echoed + each.offset) for each in listed]

    def _choice(
        self,
        text: str,
        tokens: Sequence[_Scored],
        token_ids: Sequence[int],
        finish_reason: FinishReason | None,
    ) -> dict[str, JsonValue]:
        return {
            "index": self.index,
            "text": text,
            "logprobs": None if self.listing.logprobs is None else _logprobs(tokens),
            "finish_reason": finish_reason,
            **self.listing.of_answer(token_ids),
        }

    def _prompt_tokens(
        self, echo: PromptDescription, logprobs: Sequence[TokenLogprobs]
    ) -> list[_Scored]:
        first, *others = echo.offsets
        ids = self.listing.names_are_ids
        name = f"token_id:{echo.tokens[0]}" if ids else echo.first_token
        return [
            # The first token follows nothing, so it has no probability.
            _Scored(name, None, None, first),
            *(self._scored(each, offset) for each, offset in zip(logprobs, others, strict=True)),
        ]

    def _scored(self, token: TokenLogprobs, offset: int) -> _Scored:
        chosen = token.chosen
        name = self.listing.name(chosen)
        return _Scored(name, finite(chosen.logprob), self._alternatives(token), offset)

    def _alternatives(self, logprobs: TokenLogprobs) -> dict[str, JsonValue]:
        """Return the log-probabilities of the best tokens and of the chosen one, as OpenAI does."""
        alternatives: dict[str, JsonValue] = {}
        # Two ids may have equal text (incomplete bytes); the better one is kept.
        for token in (*logprobs.top[: self.listing.logprobs], logprobs.chosen):
            alternatives.setdefault(self.listing.name(token), finite(token.logprob))
        return alternatives


def _logprobs(tokens: Sequence[_Scored]) -> dict[str, JsonValue]:
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [token.top for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }
