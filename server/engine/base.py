"""The engine protocol: all that the API knows of what generates.

An engine never sees an intervention's name: a request carries digests and resolved settings.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from interventions.model import ModelDescription
from steering.settings import AffineSettings, RewardSettings

FinishReason: TypeAlias = Literal["stop", "length"]


class EngineError(Exception):
    """A request that the engine does not serve, with a sentence for the client that says why."""


class InvalidRequestError(EngineError):
    """The request itself is at fault; `param` names the field."""

    def __init__(self, message: str, param: str, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class QueueFullError(EngineError):
    """The waiting queue is at its bound; try again later."""


class BankFullError(EngineError):
    """Every slot of the bank is held by running requests; try again later."""


class UnservableInterventionError(EngineError):
    """This engine cannot apply the intervention; it is never served without it instead."""


class EngineDeadError(EngineError):
    """The engine thread has ended; no request can be served any more."""


class ShuttingDownError(EngineError):
    """The server is stopping, and did not wait for this request any longer."""


class GaveWayError(EngineError):
    """Background work was ended, or never begun, because requests want its room."""


class StepFailedError(EngineError):
    """The step that this request was part of raised; the request is lost, the engine goes on."""


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How the next token is drawn, and when to stop. Validated by whoever builds it.

    In this order: logit bias, penalties, temperature, min-p, top-k, top-p.
    """

    max_tokens: int  # 0 only reads the prompt
    temperature: float = 1.0  # 0 takes the best token
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps all
    min_p: float = 0.0  # least probability, as a share of the best token's
    repetition_penalty: float = 1.0  # divides positive logits of tokens in prompt or completion
    presence_penalty: float = 0.0  # subtracted from the logits of tokens in the completion
    frequency_penalty: float = 0.0  # the same, once for each time that a token is in it
    logit_bias: tuple[tuple[int, float], ...] = ()  # token id, what is added to its logit
    seed: int | None = None  # same draws whatever else runs; None draws anew every time
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # how many alternatives beside the sampled token; None for none
    prompt_logprobs: int | None = None  # the same for the tokens of the prompt
    prompt_logprobs_from: int = 1  # place of the first of them; token 0 follows nothing


@dataclass(frozen=True, slots=True)
class Edit:
    """One intervention of a request, fully resolved."""

    digest: str
    settings: AffineSettings | RewardSettings


@dataclass(frozen=True, slots=True)
class Request:
    """What to generate. `edits` apply in order."""

    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingSettings
    edits: tuple[Edit, ...] = ()
    # Nobody waits for it: it runs where there is room, and is ended with GaveWayError where not.
    background: bool = False
    # One more request will follow, by `Generation.follow`: its place in the waiting queue is taken
    # together with this one's.
    followed: bool = False

    @property
    def effective_edits(self) -> tuple[Edit, ...]:
        """The edits but for those whose settings do nothing: with none left, the base model."""
        return tuple(edit for edit in self.edits if not edit.settings.does_nothing)

    @property
    def places(self) -> int:
        """Places in the waiting queue that it takes: its own, and that of the one to follow."""
        return (not self.background) + self.followed


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token and the steered model's log-probability of it, before bias, penalties and filters."""

    text: str  # where its bytes are no text by themselves, its name in the vocabulary
    bytes: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A token of a text, and the best ones at its place."""

    chosen: ScoredToken
    top: tuple[ScoredToken, ...]  # best first; as many as were asked for
    # Of a completion's token: the character of the completion's text in which it begins, counted
    # from 0. A token that ends no character begins in the one that it is part of, a special token
    # where the next one does. It is the text's length or more where nothing of it is in the text.
    offset: int = 0


@dataclass(frozen=True, slots=True)
class SpelledPrompt:
    """A prompt as token ids and as text, to be shown with its completion."""

    tokens: tuple[int, ...]
    # As it was given. If that was as token ids: their text, special tokens included, without a
    # character at the end that is incomplete. (The completion's text has it, if it completes it.)
    text: str
    offsets: tuple[int, ...]  # of each token: the character of the text in which it begins
    first_token: str  # the first token's text by itself


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step added to one request. The last one carries `finish_reason`.

    `text` may lag behind `token_ids` while a character or a possible stop string is incomplete.
    """

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    # On the first output, if asked for: one for each token of the prompt, from the place that was
    # asked for to the last.
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    queue_seconds: float | None = None  # on the first output: from submission to first scheduling
    # On the first output: tokens of the prompt that were in a cache, and not computed for it.
    cached_tokens: int = 0
    # Of each effective edit, in some steps only: norm of the edit / norm of what it edited, a mean
    # over this step's tokens and the edit's sites; None where it acted on none of these tokens.
    doses: tuple[float | None, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine's gauges, at this moment."""

    running: int
    waiting: int
    kv_cache_usage: float  # 0 to 1
    slots_used: int
    preemptions: int = 0  # since the start: sequences that yielded their K/V
    prefix_cache_queries: int = 0  # since the start, in tokens of prompts
    prefix_cache_hits: int = 0
    compiling: int = 0  # graphs that are being made; until then, their layers run without
    # Since the start, of those steered steps that are measured, where that can be told.
    measured_step_seconds: float = 0.0
    measured_edit_seconds: float = 0.0


class Generation(Protocol):
    """The outputs of one admitted request, in order."""

    def __aiter__(self) -> AsyncIterator[StepOutput]:
        """Yields outputs until one carries a finish reason; raises EngineError if it is lost."""
        ...

    async def follow(self, request: Request) -> "Generation":
        """Admit one more request, in the place in the queue that is held for it.

        To be called once, for a request with `followed` that is not cancelled.

        Raises:
            EngineError: as `Engine.submit` does, but never QueueFullError.
        """
        ...

    def cancel(self) -> None:
        """Stop generating and free what the request holds, also a place that is held.

        Harmless when it has finished.
        """
        ...


class Engine(Protocol):
    """Loads a base model and generates from it, every request with its own edits."""

    @property
    def model(self) -> ModelDescription:
        """What the loaded model is."""
        ...

    @property
    def max_model_len(self) -> int:
        """The longest prompt and completion together, in tokens."""
        ...

    @property
    def ready(self) -> bool:
        """Whether the model is loaded and the engine alive."""
        ...

    @property
    def died(self) -> bool:
        """Whether the engine has ended without being told to. It stays so after `close`."""
        ...

    def tokenize(self, text: str) -> list[int]:
        """The prompt's token ids, with the special tokens that the tokenizer adds.

        Raises:
            InvalidRequestError: the text has more characters than `max_model_len` tokens can
                hold; known without tokenizing it.
        """
        ...

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The tokens' text, special tokens included."""
        ...

    def spell(self, prompt: str | Sequence[int]) -> SpelledPrompt:
        """Tells a prompt's tokens and text, and where in the text each token begins.

        Raises:
            InvalidRequestError: the prompt is a text that `tokenize` refuses, has no tokens, or
                is more token ids than `max_model_len`.
        """
        ...

    def tokenize_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The token ids of a conversation, up to where the assistant speaks next.

        Args:
            messages: each with `role` and `content`, as the model's template knows them, and with
                `name` where one was given, which many templates have no place for.

        Raises:
            InvalidRequestError: the model has no template, or its template refuses the messages.
        """
        ...

    async def submit(self, requests: Sequence[Request]) -> Sequence[Generation]:
        """Admit requests, all or none: load and pin their interventions, then queue them.

        Raises:
            InvalidRequestError: a prompt is empty or has unknown token ids, it and its
                completion are too long for the model or for the memory; or the requests name
                more interventions than the engine can hold at once.
            QueueFullError: the waiting queue has no room for them.
            BankFullError: no slot can be freed for one of their interventions.
            UnservableInterventionError: an edit does not reach this engine's logits.
            GaveWayError: there is no room for background work now.
            EngineDeadError: the engine thread has ended.
        """
        ...

    def stats(self) -> EngineStats:
        """Gauges for the metrics page."""
        ...

    async def start(self) -> None:
        """Start generating, after a self-test; returns when the engine is ready."""
        ...

    async def close(self) -> bool:
        """Stop; what still runs is lost with ShuttingDownError, at once. May be called again.

        Returns:
            Whether the engine has come to its end. False: it is stuck in a step, and only the
            end of the process will end it.
        """
        ...
