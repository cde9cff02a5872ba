"""Continuous batching: which tokens of which sequences the next step computes."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from server.engine.base import QueueFullError, Request
from server.engine.torch.kv_cache import BlockPool
from steering.settings import SlottedEdit


@dataclass(eq=False, slots=True)
class Sequence:
    """An admitted request and how far it is."""

    request: Request
    edits: tuple[SlottedEdit, ...]
    tokens: list[int]  # the prompt, then what was generated
    digests: tuple[str, ...] = ()  # of the interventions that it pins
    computed: int = 0  # how many of `tokens` have their K/V in the cache

    @property
    def id(self) -> str:
        """The request's id."""
        return self.request.request_id

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt)

    @property
    def max_length(self) -> int:
        """Tokens of the prompt and the longest completion asked for."""
        return self.prompt_length + self.request.sampling.max_tokens

    @property
    def pending(self) -> int:
        """Tokens whose K/V is still to be computed: 1 while decoding, more while prefilling."""
        return len(self.tokens) - self.computed


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence, computed in one step."""

    sequence: Sequence
    start: int
    count: int

    @property
    def samples(self) -> bool:
        """Whether this chunk ends with the last token known, so that the next one is drawn."""
        return self.start + self.count == len(self.sequence.tokens)


@dataclass(slots=True)
class Scheduler:
    """First come, first served. Sequences that decode go first, so that a long prompt, computed
    in chunks, does not stall them.

    A sequence is started only when the blocks for its longest completion are free, and holds
    them to its end: once started it never has to be put back.
    """

    pool: BlockPool
    max_batch_size: int  # sequences running at once
    max_batch_tokens: int  # tokens of one step
    max_waiting: int
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.max_batch_tokens < self.max_batch_size:
            raise ValueError(
                f"max_batch_tokens ({self.max_batch_tokens}) must be at least max_batch_size "
                f"({self.max_batch_size}), so that every running sequence can take its turn"
            )

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises:
            QueueFullError: the waiting queue is at its bound.
        """
        if len(self.waiting) >= self.max_waiting:
            raise QueueFullError(
                f"{len(self.waiting)} requests are waiting already; try again later"
            )
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, finished or not, and free its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.pool.release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def schedule(self) -> list[Chunk]:
        """The next step's chunks; empty when there is nothing to do."""
        budget = self.max_batch_tokens
        chunks = []
        for sequence in self._candidates():
            count = min(sequence.pending, budget)
            chunks.append(Chunk(sequence, sequence.computed, count))
            budget -= count
            if budget == 0:
                break
        return chunks

    def _candidates(self) -> Iterator[Sequence]:
        """Sequences in the order in which they get a share of the step."""
        yield from sorted(self.running, key=lambda sequence: sequence.pending > 1)
        while (sequence := self._admit()) is not None:
            yield sequence

    def _admit(self) -> Sequence | None:
        """Start the first waiting sequence, if there is one and room for it."""
        if not self.waiting or len(self.running) == self.max_batch_size:
            return None
        if not self.pool.reserve(self.waiting[0], self.waiting[0].max_length):
            return None
        self.running.append(self.waiting.popleft())
        return self.running[-1]
