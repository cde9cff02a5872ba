"""Defines the engine protocol: all that the API knows about an engine.

An engine never sees an intervention's name: a request carries digests and resolved settings.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from interventions.model import ModelDescription
from steering.settings import AffineSettings, RewardSettings

FinishReason: TypeAlias = Literal["stop", "length"]


class EngineError(Exception):
    """Raised for a request that the engine does not serve; the message tells the client why."""


class InvalidRequestError(EngineError):
    """The request itself is at fault; `param` names the faulty field."""

    def __init__(self, message: str, param: str, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class QueueFullError(EngineError):
    """The waiting queue is full; the client may try again later."""


class BankFullError(EngineError):
    """Admitted requests pin every slot of the bank; the client may try again later."""


class UnservableInterventionError(EngineError):
    """The engine cannot apply the intervention, and never serves the request unsteered instead."""


class EngineDeadError(EngineError):
    """The engine thread has ended; no request can be served any more."""


class ShuttingDownError(EngineError):
    """The server is stopping, and ended this request before it was complete."""


class NoBackgroundRoomError(EngineError):
    """Background work was ended, or refused, because requests need its room."""


class StepFailedError(EngineError):
    """A step raised an exception; its requests are lost, and the engine goes on."""


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """Says how the next token is drawn, and when generation stops.

    The caller validates the values. They apply in this order: logit bias, penalties, temperature,
    min-p, top-k, top-p.
    """

    max_tokens: int  # 0: the prompt is computed and nothing is generated
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps all tokens
    min_p: float = 0.0  # smallest probability kept, as a fraction of the best token's
    repetition_penalty: float = 1.0  # divides positive logits of tokens in prompt or completion
    presence_penalty: float = 0.0  # subtracted from the logits of tokens in the completion
    frequency_penalty: float = 0.0  # subtracted once per occurrence of a token in the completion
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, number added to its logit)
    seed: int | None = None  # fixes the draws, whatever else is in the batch; None: not fixed
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # alternatives beside the sampled token; None: no log-probabilities
    prompt_logprobs: int | None = None  # the same for the tokens of the prompt
    prompt_logprobs_from: int = 1  # index of the first prompt token scored; token 0 follows nothing


@dataclass(frozen=True, slots=True)
class Edit:
    """One intervention of a request, with its digest and settings resolved."""

    digest: str
    settings: AffineSettings | RewardSettings


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to be completed. `edits` apply in order."""

    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingSettings
    edits: tuple[Edit, ...] = ()
    # Background work runs only while there is room for it, and ends with NoBackgroundRoomError when
    # another request needs that room.
    background: bool = False
    # `Generation.follow` will admit a second request after this one; a place in the waiting queue
    # is reserved for it when this one is admitted.
    has_follower: bool = False

    @property
    def effective_edits(self) -> tuple[Edit, ...]:
        """The edits whose settings change something. If there are none, the base model answers."""
        return tuple(edit for edit in self.edits if not edit.settings.does_nothing)

    @property
    def queue_places(self) -> int:
        """Queue places that it takes: one (background work: none), and one more for a follower."""
        return (not self.background) + self.has_follower


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token and the steered model's log-probability of it, before bias, penalties and filters."""

    text: str  # the token's name in the vocabulary if its bytes alone are not valid UTF-8
    bytes: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The log-probabilities of a token of a text and of the likeliest tokens at its position."""

    chosen: ScoredToken
    top: tuple[ScoredToken, ...]  # best first; as many as were asked for
    # For a completion's token: the index of the text's character in which it begins. A token that
    # completes no character begins in the one that its bytes belong to, a special token where the
    # next token does. It is at least the text's length if nothing of the token is in the text.
    offset: int = 0


@dataclass(frozen=True, slots=True)
class PromptDescription:
    """A prompt as token ids and as text, to be shown with its completion."""

    tokens: tuple[int, ...]
    # The text as given. For a prompt given as token ids: their text, special tokens included,
    # without an incomplete character at the end (a completion that completes it has it instead).
    text: str
    offsets: tuple[int, ...]  # for each token, the index of the text's character where it begins
    first_token: str  # the text of the first token alone


@dataclass(frozen=True, slots=True)
class StepOutput:
    """One step's addition to one request's answer. The last output carries `finish_reason`.

    `text` may lag behind `token_ids` while a character or a possible stop string is incomplete.
    """

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    # On the first output, if asked for: one entry for each prompt token, from
    # `prompt_logprobs_from` to the last.
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    queue_seconds: float | None = None  # on the first output: from submission to first scheduling
    # On the first output: the number of prompt tokens that the prefix cache had.
    cached_tokens: int = 0
    # On some outputs only, one number for each effective edit: norm of the edit / norm of what it
    # edited, the mean over the edit's sites and over the tokens of one or several measured steps
    # up to this one. None for an edit that acted on none of these tokens.
    doses: tuple[float | None, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine's gauges and counters at one moment."""

    running: int
    waiting: int
    kv_cache_usage: float  # 0 to 1
    slots_used: int
    preemptions: int = 0  # since the start: how often a sequence gave up its K/V
    prefix_cache_queries: int = 0  # since the start: prompt tokens looked up
    prefix_cache_hits: int = 0  # since the start: prompt tokens found
    compiling: int = 0  # graphs being compiled or waiting for it; their layers run uncompiled
    # Since the start: the time of the measured steered steps, and of the edits in them. Both stay
    # 0 where the engine cannot measure them.
    measured_step_seconds: float = 0.0
    measured_edit_seconds: float = 0.0


class Generation(Protocol):
    """The outputs of one admitted request, in order."""

    def __aiter__(self) -> AsyncIterator[StepOutput]:
        """Yield outputs until one carries a finish reason; raise EngineError on failure."""

    async def follow(self, request: Request) -> "Generation":
        """Admit one more request into the queue place that is reserved for it.

        Call this at most once, for a request with `has_follower` that is not cancelled.

        Raises:
            EngineError: for the reasons that `Engine.submit` names, but never QueueFullError.
        """

    def cancel(self) -> None:
        """Stop generating, and free what the request holds, its follower's queue place included.

        Harmless when the request has finished.
        """


class Engine(Protocol):
    """Generates from a base model, with each request's own edits."""

    @property
    def model(self) -> ModelDescription:
        """The description of the loaded model."""

    @property
    def max_model_len(self) -> int:
        """The largest number of tokens that a prompt and its completion may have together."""

    @property
    def ready(self) -> bool:
        """True while the model is loaded and the engine is alive."""

    @property
    def died(self) -> bool:
        """True once the engine has ended without being told to, also after `close`."""

    def tokenize(self, text: str) -> list[int]:
        """Return the prompt's token ids, with the special tokens that the tokenizer adds.

        Raises:
            InvalidRequestError: the text has more characters than `max_model_len` tokens can
                hold; this is checked before it is tokenized.
        """

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Return the tokens' text, special tokens included."""

    def describe_prompt(self, prompt: str | Sequence[int]) -> PromptDescription:
        """Return a prompt's tokens and text, and where in the text each token begins.

        Raises:
            InvalidRequestError: the prompt is a text that `tokenize` refuses, has no tokens, or
                has more token ids than `max_model_len`.
        """

    def tokenize_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the token ids of a conversation, up to where the assistant's answer begins.

        Args:
            messages: each with the `role` and `content` that the model's template expects, and
                with `name` if the client gave one (many templates ignore it).

        Raises:
            InvalidRequestError: the model has no template, or its template refuses the messages.
        """

    async def submit(self, requests: Sequence[Request]) -> Sequence[Generation]:
        """Admit requests, all or none: load and pin their interventions, then queue them.

        Raises:
            InvalidRequestError: a prompt is empty or has unknown token ids; a prompt and its
                completion are too long for the model or for the memory; or the requests name
                more interventions than the engine can hold at once.
            QueueFullError: the waiting queue has no room for them.
            BankFullError: no slot can be freed for one of their interventions.
            UnservableInterventionError: an edit does not reach this engine's logits.
            NoBackgroundRoomError: there is no room for background work now.
            EngineDeadError: the engine thread has ended.
        """

    def stats(self) -> EngineStats:
        """Return the gauges and counters for the metrics page."""

    async def start(self) -> None:
        """Start the engine, and return when it is ready. Its self-test has passed by then."""

    async def close(self) -> bool:
        """Stop the engine; running requests fail with ShuttingDownError at once. Idempotent.

        Returns:
            True if the engine has ended. False if it is stuck in a step, which only the end of
            the process will end.
        """
