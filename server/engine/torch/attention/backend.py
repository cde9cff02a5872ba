"""What every attention backend gives the engine: memory for K and V, and a step's attention."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionParams:
    """What a layer asks of its attention, beside queries, keys and values."""

    scaling: float | None  # None: 1 / sqrt(head_dim)
    window: int | None  # how many keys, its own among them, a query sees; None for all
    softcap: float | None  # bounds scores as softcap * tanh(scores / softcap) (Gemma 2)


class AttentionStep(ABC):
    """What the backend knows of one step: who owns which of the packed tokens."""

    def __init__(self) -> None:
        self.windows: set[int | None] = set()  # that the layers asked for

    @staticmethod
    def now() -> "AttentionStep":
        """The one whose context this is."""
        return _CURRENT.get()

    @contextmanager
    def current(self) -> Iterator[None]:
        """Within the context, the model's attention is this step's."""
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(token)

    @abstractmethod
    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, params: AttentionParams
    ) -> Tensor:
        """Store the step's keys and values, then attend.

        Args:
            layer: its index.
            query: (1, heads, tokens, head_dim).
            key, value: (1, kv_heads, tokens, head_dim).

        Returns:
            (1, tokens, heads, head_dim).
        """


# A compiled layer calls its attention as an operator, which takes nothing but tensors.
_CURRENT: ContextVar[AttentionStep] = ContextVar("steerserve_attention_step")


class Lane(ABC):
    """Room for one sequence's keys and values, in all layers."""

    @property
    @abstractmethod
    def capacity(self) -> int:
        """Tokens that it has room for."""

    @abstractmethod
    def reserve(self, tokens: int) -> None:
        """Have room for so many tokens; what is stored stays."""

    @abstractmethod
    def truncate(self, tokens: int) -> None:
        """Forget what is stored from a token on; its memory is given back where it can be."""

    @abstractmethod
    def free(self) -> None:
        """Give the memory back."""

    @abstractmethod
    def read(self, start: int, end: int) -> list[Tensor]:
        """A copy of what is stored of some tokens, for `write`; tokens are the third dimension."""

    @abstractmethod
    def write(self, start: int, values: Sequence[Tensor]) -> None:
        """Store what `read` gave, from a token on."""


@dataclass(frozen=True, slots=True)
class LaneSpan:
    """Consecutive tokens of one sequence in a step."""

    lane: Lane
    start: int  # tokens that the lane holds already
    count: int


class KVMemory(ABC):
    """Memory for the keys and values of all sequences."""

    fixed: bool  # all of it is there from the start, and no lane may take more than was planned
    # Where a step's tensors are built; None: on the model's own device.
    batch_device: torch.device | None = None
    probe_lanes: int  # how many lanes the self-test may take beside those of all sequences

    @abstractmethod
    def lane(self) -> Lane:
        """A lane without room yet."""

    @abstractmethod
    def order(self, span: LaneSpan) -> tuple[bool, int, int]:
        """A sort key: in this order, a step is attended for best."""

    @abstractmethod
    def step(self, spans: Sequence[LaneSpan]) -> AttentionStep:
        """The attention of a step whose packed tokens are those of `spans`."""

    @abstractmethod
    def check(self, lanes: Iterable[Lane]) -> None:
        """Assert that these lanes, and no others, have memory, each its own."""
