"""Continuous batching: which tokens of which sequences the next step computes."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from server.engine.base import QueueFullError
from server.engine.torch.kv_cache import BlockPool
from server.engine.torch.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence, computed in one step."""

    sequence: Sequence
    start: int
    count: int

    @property
    def end(self) -> int:
        """The place after its last token."""
        return self.start + self.count

    @property
    def completes(self) -> bool:
        """Whether it ends with the last token known."""
        return self.end == len(self.sequence.tokens)

    @property
    def samples(self) -> bool:
        """Whether the next token is drawn after it."""
        return self.completes and len(self.sequence.tokens) < self.sequence.max_length

    @property
    def scores(self) -> range:
        """The places of those tokens after which the prompt's next token is to be scored."""
        sequence = self.sequence
        if sequence.request.sampling.prompt_logprobs is None:
            return range(0)
        return range(max(self.start, sequence.scored), min(self.end, sequence.prompt_length - 1))

    @property
    def logits_places(self) -> range:
        """The places of those tokens after which logits are needed."""
        scores = self.scores
        if not self.samples:
            return scores
        # Prompt tokens are scored before the first token is drawn, so the two join.
        return range(scores.start if scores else self.end - 1, self.end)


@dataclass(frozen=True, slots=True)
class Plan:
    """What the next step computes, and which sequences gave up their K/V for it."""

    chunks: list[Chunk]
    preempted: list[Sequence]


@dataclass(slots=True)
class Scheduler:
    """First come, first served. Sequences that decode go first, so that a long prompt, computed
    in chunks, does not stall them.

    A sequence starts when the blocks for the tokens that it has are free, with one to spare for
    each that runs already, and takes more as it grows. When none is left, the sequence that came
    last is preempted: it gives up its blocks, waits in front, and is computed anew later. So the
    oldest always goes on, and every sequence becomes the oldest.
    """

    pool: BlockPool
    max_batch_size: int  # sequences running at once
    max_batch_tokens: int  # tokens of one step
    max_waiting: int
    # Both in order of arrival, and all that run came before all that wait.
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)
    _arrivals: int = 0

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
        """Queue a sequence, for which `check_room` found room and which the pool can hold."""
        assert sequence.max_length <= self.pool.tokens, "it would wait for ever"
        sequence.arrival = self._arrivals
        self._arrivals += 1
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, finished or not, and free its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.pool.release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def schedule(self) -> Plan:
        """The next step's plan; without chunks when there is nothing to do."""
        preempted = self._make_room()
        budget = self.max_batch_tokens
        chunks = []
        for sequence in self._candidates():
            count = min(sequence.pending, budget)
            chunks.append(Chunk(sequence, sequence.computed, count))
            budget -= count
            if budget == 0:
                break
        return Plan(chunks, preempted)

    def _make_room(self) -> list[Sequence]:
        """Let every running sequence hold its tokens, the oldest first; who had to yield."""
        preempted: list[Sequence] = []
        for sequence in tuple(self.running):
            # The youngest yield, so that the oldest always goes on.
            while sequence in self.running and not self.pool.hold(sequence, len(sequence.tokens)):
                preempted.append(self._preempt_youngest())
        return preempted

    def _preempt_youngest(self) -> Sequence:
        sequence = self.running.pop()
        self.pool.release(sequence)
        sequence.computed = 0
        self.waiting.appendleft(sequence)
        return sequence

    def _candidates(self) -> Iterator[Sequence]:
        """Sequences in the order in which they get a share of the step."""
        yield from sorted(self.running, key=lambda sequence: sequence.pending > 1)
        while (sequence := self._start_next()) is not None:
            yield sequence

    def _start_next(self) -> Sequence | None:
        """Start the first waiting sequence, if there is one and room for it."""
        if not self.waiting or len(self.running) == self.max_batch_size:
            return None
        length = len(self.waiting[0].tokens)
        # Without the spare blocks it might be preempted, and its work lost, a few steps later.
        if self.pool.needed(length) + len(self.running) > self.pool.free:
            return None
        sequence = self.waiting.popleft()
        self.pool.hold(sequence, length)
        self.running.append(sequence)
        return sequence

    def check(self) -> None:
        """Assert that the books add up. Between two steps."""
        self.pool.check(self.running)
        assert len(self.running) <= self.max_batch_size, "more run than the batch holds"
        arrivals = [sequence.arrival for sequence in (*self.running, *self.waiting)]
        assert arrivals == sorted(set(arrivals)), "somebody was overtaken, or is here twice"
        for sequence in self.running:
            assert 0 <= sequence.computed < len(sequence.tokens), "a sequence has nothing to do"
        assert not any(sequence.computed for sequence in self.waiting), "K/V without blocks"
