"""The engine protocol: all that the API knows of what generates.

An engine never sees an intervention's name: a request carries digests and resolved settings.
"""

from collections.abc import AsyncIterator, Sequence
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


class StepFailedError(EngineError):
    """The step that this request was part of raised; the request is lost, the engine goes on."""


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How the next token is drawn, and when to stop. Validated by whoever builds it."""

    max_tokens: int
    temperature: float = 1.0  # 0 takes the best token
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps all
    seed: int | None = None  # same draws whatever else runs; None draws anew every time
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None  # how many alternatives beside the sampled token; None for none


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

    @property
    def effective_edits(self) -> tuple[Edit, ...]:
        """The edits but for those whose settings do nothing: with none left, the base model."""
        return tuple(edit for edit in self.edits if not edit.settings.does_nothing)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The steered model's log-probability of a sampled token, before temperature and filters."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...]  # best first


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step added to one request. The last one carries `finish_reason`.

    `text` may lag behind `token_ids` while a character or a possible stop string is incomplete.
    """

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    queue_seconds: float | None = None  # on the first output: from submission to first scheduling


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine's gauges, at this moment."""

    running: int
    waiting: int
    kv_cache_usage: float  # 0 to 1
    slots_used: int


class Generation(Protocol):
    """The outputs of one admitted request, in order."""

    def __aiter__(self) -> AsyncIterator[StepOutput]:
        """Yields outputs until one carries a finish reason; raises EngineError if it is lost."""
        ...

    def cancel(self) -> None:
        """Stop generating and free what the request holds. Harmless when it has finished."""
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

    def tokenize(self, text: str) -> list[int]:
        """The prompt's token ids, with the special tokens that the tokenizer adds."""
        ...

    async def submit(self, requests: Sequence[Request]) -> Sequence[Generation]:
        """Admit requests, all or none: load and pin their interventions, then queue them.

        Raises:
            InvalidRequestError: a prompt is empty, too long, or has unknown token ids; or the
                requests name more interventions than the engine can hold at once.
            QueueFullError: the waiting queue has no room for them.
            BankFullError: no slot can be freed for one of their interventions.
            UnservableInterventionError: an edit does not reach this engine's logits.
            EngineDeadError: the engine thread has ended.
        """
        ...

    def stats(self) -> EngineStats:
        """Gauges for the metrics page."""
        ...

    async def start(self) -> None:
        """Start generating, after a self-test; returns when the engine is ready."""
        ...

    async def close(self) -> None:
        """Stop, cancelling what still runs."""
        ...
