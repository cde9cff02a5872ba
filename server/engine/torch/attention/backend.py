"""Defines the interface of attention backends: memory for K and V, and a step's attention."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionParams:
    """A layer's parameters of attention, besides queries, keys and values."""

    scaling: float | None  # None: 1 / sqrt(head_dim)
    window: int | None  # how many keys a query sees, its own included; None for all
    softcap: float | None  # bounds scores as softcap * tanh(scores / softcap) (Gemma 2)


class AttentionStep(ABC):
    """Attends for one step, and knows which sequence each of its packed tokens belongs to."""

    def __init__(self) -> None:
        self.windows: set[int | None] = set()  # the windows that layers have asked for

    @staticmethod
    def active() -> "AttentionStep":
        """Return the step whose `activate` context is entered."""
        return _ACTIVE.get()

    @contextmanager
    def activate(self) -> Iterator[None]:
        """Make the model's attention use this step within the context."""
        token = _ACTIVE.set(self)
        try:
            yield
        finally:
            _ACTIVE.reset(token)

    @abstractmethod
    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
    ) -> Tensor:
        """Store the step's keys and values, then attend.

        Args:
            layer: the layer's index.
            query: (1, heads, tokens, head_dim).
            key, value: (1, kv_heads, tokens, head_dim).

        Returns:
            (1, tokens, heads, head_dim).
        """


# A compiled layer calls its attention as an operator, to which a step cannot be passed.
_ACTIVE: ContextVar[AttentionStep] = ContextVar("steerserve_attention_step")


class Lane(ABC):
    """Holds one sequence's keys and values, in all layers."""

    @property
    @abstractmethod
    def capacity(self) -> int:
        """The number of tokens that the lane has room for."""

    @abstractmethod
    def reserve(self, tokens: int) -> None:
        """Make room for at least `tokens` tokens; stored tokens are kept."""

    @abstractmethod
    def truncate(self, tokens: int) -> None:
        """Keep the first `tokens` tokens; give the memory of the others back where possible."""

    @abstractmethod
    def free(self) -> None:
        """Give the memory back."""

    @abstractmethod
    def read(self, start: int, end: int) -> list[Tensor]:
        """Copy the K and V of tokens `start` to `end`, for `write`.

        Tokens are the third dimension of each tensor.
        """

    @abstractmethod
    def write(self, start: int, values: Sequence[Tensor]) -> None:
        """Store the tensors that `read` returned, as the tokens from `start` on."""


@dataclass(frozen=True, slots=True)
class LaneSpan:
    """Consecutive tokens of one sequence in a step."""

    lane: Lane
    start: int  # tokens that the lane holds already
    count: int

    @property
    def end(self) -> int:
        """The number of tokens that the lane holds after the step."""
        return self.start + self.count


class KVMemory(ABC):
    """Memory for the keys and values of all sequences."""

    # True if all memory is allocated at the start, so that no lane can exceed the plan.
    is_preallocated: bool
    # The device on which a step's tensors are built; None for the model's own.
    batch_device: torch.device | None = None
    probe_lanes: int  # lanes that the self-test may use besides those of the sequences

    @abstractmethod
    def lane(self) -> Lane:
        """Make a lane that has no room yet."""

    def order(self, span: LaneSpan) -> tuple[bool, int, int]:
        """Return a sort key for the spans of a step: its order suits attention best.

        All keys are equal where every order suits.
        """
        return False, 0, 0

    @abstractmethod
    def step(self, spans: Sequence[LaneSpan]) -> AttentionStep:
        """Make the attention of a step whose packed tokens are those of `spans`, in order."""

    @abstractmethod
    def check(self, lanes: Iterable[Lane]) -> None:
        """Assert that exactly these lanes have memory, and that none share any."""
