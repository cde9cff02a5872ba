"""Continuous batching: decides which tokens of which sequences the next step computes."""

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Final

from server.engine.errors import NoBackgroundRoomError, QueueFullError
from server.engine.torch.scheduling.block_pool import BlockPool
from server.engine.torch.scheduling.sequence import Sequence
from server.engine.torch.scheduling.shares import share_tokens

BACKGROUND_TOKENS: Final = 8  # for all background work together, in a step that serves requests


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive tokens of one sequence, computed in one step."""

    sequence: Sequence
    start: int
    count: int

    @property
    def end(self) -> int:
        """The position after the chunk's last token."""
        return self.start + self.count

    @property
    def completes(self) -> bool:
        """True if the chunk ends with the sequence's last known token."""
        return self.end == len(self.sequence.tokens)

    @property
    def draws(self) -> bool:
        """True if the sequence's next token is drawn after the chunk."""
        return self.completes and len(self.sequence.tokens) < self.sequence.max_length

    @property
    def scored_positions(self) -> range:
        """The positions of the chunk's tokens after which the prompt's next token is scored."""
        sequence = self.sequence
        if sequence.request.sampling.prompt_logprobs is None:
            return range(0)
        return range(
            max(self.start, sequence.scored_prompt_tokens),
            min(self.end, sequence.prompt_length - 1),
        )

    @property
    def logits_positions(self) -> range:
        """The positions of the chunk's tokens after which logits are needed."""
        scored = self.scored_positions
        if not self.draws:
            return scored
        # Where both are needed, the chunk ends with the prompt, and scoring ends just before that.
        return range(scored.start if scored else self.end - 1, self.end)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The chunks that the next step computes, and the sequences that gave up their K/V for them."""

    chunks: list[Chunk]
    preempted: list[Sequence]  # will be computed anew later
    dropped: list[Sequence]  # background work that was ended


@dataclass(slots=True)
class Scheduler:
    """Serves sequences in the order of their arrival, however they are steered or sampled.

    Each decoding sequence has its token in every step. Prompts are computed in chunks. In a step
    that decodes, all prompts together take at most `prefill_tokens` tokens, so that the step stays
    short. `share_tokens` says how they divide them.

    A sequence starts when there are free blocks for its tokens, and one to spare for each sequence
    that runs already; it takes more blocks as it grows. When none is free, the sequence that came
    last is preempted: it gives up its blocks, moves to the front of the queue, and is computed anew
    later. So the oldest sequence always goes on, and every sequence becomes the oldest.

    Background work starts at once or not at all, takes few tokens of a step that computes anything
    else, and is ended as soon as another sequence needs its room.
    """

    pool: BlockPool
    max_batch_size: int  # sequences running at once
    max_batch_tokens: int  # tokens of one step
    max_waiting: int
    # Prompt tokens in a step that also decodes; None for all that the step has room for.
    prefill_tokens: int | None = None
    # Says how many of a sequence's first tokens the prefix cache has, when it gets its first chunk.
    find_cached: Callable[[Sequence], int] = lambda _sequence: 0
    # Both in order of arrival; all running sequences came before all waiting ones.
    waiting: deque[Sequence] = field(default_factory=deque)
    running: list[Sequence] = field(default_factory=list)
    background: list[Sequence] = field(default_factory=list)  # runs too, in order of arrival
    # Sequences, running or finished, that another one will follow, for which a place in the waiting
    # queue is kept.
    leaders: set[Sequence] = field(default_factory=set)
    preemptions: int = 0  # since the start
    _arrivals: int = 0

    def __post_init__(self) -> None:
        if self.max_batch_tokens < self.max_batch_size:
            raise ValueError(
                f"max_batch_tokens ({self.max_batch_tokens}) must be at least max_batch_size "
                f"({self.max_batch_size}), so that every running sequence can take its turn"
            )
        if self.prefill_tokens is not None and self.prefill_tokens < 1:
            raise ValueError(
                f"prefill_tokens ({self.prefill_tokens}) must be at least 1, so that every prompt "
                "can take its turn"
            )

    @property
    def capacity(self) -> int:
        """The number of sequences that may run or wait at once."""
        return self.max_batch_size + self.max_waiting

    def check_room(self, places: int) -> None:
        """Raise QueueFullError unless `places` places of the waiting queue are free.

        Sequences that could start now take no place. A queue where no others wait takes any number,
        since a client may ask for more at once than the queue holds.
        """
        waiting = len(self.waiting) - self._startable()
        if waiting and waiting + len(self.leaders) + places > self.max_waiting:
            raise QueueFullError(f"{waiting} requests are waiting already; try again later")

    def _startable(self) -> int:
        """Count the waiting sequences that would start now, if all background work were ended."""
        places = self.max_batch_size - len(self.running)
        blocks = self.pool.free_blocks + sum(
            self.pool.blocks_for(len(each.tokens)) for each in self.background
        )
        for started, sequence in enumerate(self.waiting):
            places -= 1
            blocks -= self.pool.blocks_for(len(sequence.tokens))
            # As in `_has_room`: with a block to spare for each running sequence.
            if places < 0 or blocks < (len(self.running) + started) * self.pool.blocks_for(1):
                return started
        return len(self.waiting)

    def check_background(self, *sequences: Sequence) -> None:
        """Raise NoBackgroundRoomError unless background work can start beside all that runs."""
        if self.waiting or not self._has_room(*sequences):
            raise NoBackgroundRoomError("there is no room for background work now")

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence, or start it at once if it is background work.

        `check_room`, or `check_background`, must have found room for it, and the pool must be able
        to hold its longest completion.
        """
        assert sequence.max_length <= self.pool.capacity, "it would wait for ever"
        sequence.arrival = self._arrivals
        self._arrivals += 1
        if sequence.request.has_follower:
            self.leaders.add(sequence)
        if sequence.request.background:
            self._allocate(sequence)
            self.background.append(sequence)
        else:
            self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, finished or not, and free its blocks."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
            return
        for running in (self.running, self.background):
            if sequence in running:
                running.remove(sequence)
                self.pool.release(sequence)

    def schedule(self) -> StepPlan:
        """Plan the next step; the plan has no chunks if there is nothing to do."""
        plan = StepPlan([], [], [])
        self._make_room(plan)
        while self._start_next(plan):
            pass
        decoding = [sequence for sequence in self.running if sequence.pending_tokens == 1]
        prompts = [sequence for sequence in self.running if sequence.pending_tokens > 1]
        budget = self._add_chunks(plan, decoding, self.max_batch_tokens)
        if decoding and self.prefill_tokens is not None:
            budget = min(budget, self.prefill_tokens)
        budget = self._add_chunks(plan, prompts, budget)
        if self.running:
            budget = min(budget, BACKGROUND_TOKENS)
        self._add_chunks(plan, self.background, budget)
        return plan

    def _add_chunks(self, plan: StepPlan, sequences: Items[Sequence], budget: int) -> int:
        """Share a budget of tokens among sequences; return what is left of it."""
        # Cached tokens count as computed only with a chunk: until then the cache may drop them.
        starts = [each.computed_tokens or self.find_cached(each) for each in sequences]
        pending = [len(each.tokens) - start for each, start in zip(sequences, starts, strict=True)]
        counts = share_tokens(pending, budget)
        for sequence, start, count in zip(sequences, starts, counts, strict=True):
            if count:
                sequence.computed_tokens = start
                plan.chunks.append(Chunk(sequence, start, count))
                budget -= count
        return budget

    def _make_room(self, plan: StepPlan) -> None:
        """Let every running sequence hold blocks for its tokens, the oldest first."""
        for sequence in tuple(self.running):
            # The youngest yields, so that the oldest always goes on.
            while sequence in self.running and not self._allocate(sequence):
                if self.background:
                    plan.dropped.append(self._drop_youngest())
                else:
                    plan.preempted.append(self._preempt_youngest())
        for sequence in tuple(self.background):
            if not self._allocate(sequence):
                self.remove(sequence)
                plan.dropped.append(sequence)

    def _preempt_youngest(self) -> Sequence:
        sequence = self.running.pop()
        self.pool.release(sequence)
        sequence.computed_tokens = 0
        sequence.preemptions += 1
        self.waiting.appendleft(sequence)
        self.preemptions += 1
        return sequence

    def _drop_youngest(self) -> Sequence:
        sequence = self.background.pop()
        self.pool.release(sequence)
        return sequence

    def _start_next(self, plan: StepPlan) -> bool:
        """Start the first waiting sequence if there is room for it; False if none was started."""
        if not self.waiting:
            return False
        while not self._has_room(self.waiting[0]):
            if not self.background:
                return False
            plan.dropped.append(self._drop_youngest())
        sequence = self.waiting.popleft()
        self._allocate(sequence)
        self.running.append(sequence)
        return True

    def _allocate(self, sequence: Sequence) -> bool:
        """Allocate blocks for all tokens of a sequence; False if there are too few."""
        return self.pool.allocate(sequence, len(sequence.tokens))

    def _has_room(self, *sequences: Sequence) -> bool:
        """Return whether sequences can start beside all that run."""
        running = [*self.running, *self.background]
        if len(running) + len(sequences) > self.max_batch_size:
            return False
        # Without spare blocks, a sequence might be preempted, and its work lost, a few steps later.
        needed = sum(self.pool.blocks_for(len(sequence.tokens)) for sequence in sequences)
        return needed + len(running) * self.pool.blocks_for(1) <= self.pool.free_blocks

    def check(self) -> None:
        """Assert that queues and blocks are consistent. To be called between two steps."""
        running = [*self.running, *self.background]
        self.pool.check(running)
        assert len(running) <= self.max_batch_size, "more run than the batch holds"
        arrivals = [sequence.arrival for sequence in (*self.running, *self.waiting)]
        assert arrivals == sorted(set(arrivals)), "somebody was overtaken, or is here twice"
        for sequence in running:
            assert 0 <= sequence.computed_tokens < len(sequence.tokens), (
                "a sequence has nothing to do"
            )
        assert not any(sequence.computed_tokens for sequence in self.waiting), "K/V without blocks"
