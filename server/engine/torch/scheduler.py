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
    tokens: list[int]  # the prompt, then what was generated
    edits: tuple[SlottedEdit, ...] = ()  # from the admission on, which knows the slots
    computed: int = 0  # how many of `tokens` have their K/V in the cache

    @property
    def id(self) -> str:
        """The request's id."""
        return self.request.request_id

    @classmethod
    def of(cls, request: Request) -> "Sequence":
        """A request at its beginning."""
        return cls(request, list(request.prompt))

    @property
    def digests(self) -> tuple[str, ...]:
        """The interventions that it pins, from its admission to its end."""
        return tuple(edit.digest for edit in self.request.effective_edits)

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

    def check_room(self, sequences: int) -> None:
        """Raise QueueFullError unless the waiting queue has room for so many.

        An empty queue takes whatever one client may ask for at once.
        """
        if self.waiting and len(self.waiting) + sequences > self.max_waiting:
            raise QueueFullError(
                f"{len(self.waiting)} requests are waiting already; try again later"
            )

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence, for which `check_room` found room."""
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
