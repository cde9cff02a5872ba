"""Tests the scheduler's invariants under random arrivals, cancellations and ends of sequences."""

from collections import deque

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from server.engine.errors import NoBackgroundRoomError, QueueFullError
from server.engine.request import Request, SamplingSettings
from server.engine.torch.scheduling.block_pool import BlockPool
from server.engine.torch.scheduling.scheduler import Scheduler
from server.engine.torch.scheduling.sequence import Sequence

BLOCK_SIZE = 4


class Scheduling(RuleBasedStateMachine):
    """Drives the scheduler as the engine does, and compares it with a simple model of its state."""

    @initialize(
        blocks=st.integers(2, 8),
        batch=st.integers(1, 5),
        more_tokens=st.integers(0, 10),
        waiting=st.integers(1, 8),
    )
    def begin(self, blocks: int, batch: int, more_tokens: int, waiting: int) -> None:
        self.pool = BlockPool(blocks, BLOCK_SIZE)
        self.scheduler = Scheduler(self.pool, batch, batch + more_tokens, waiting)
        self.living: deque[Sequence] = deque()  # in order of arrival
        self.background: list[Sequence] = []
        self.finished: list[Sequence] = []
        self.stored: dict[Sequence, int] = {}  # number of a sequence's tokens with stored K/V

    @rule(data=st.data(), scored=st.booleans())
    def arrive(self, data: st.DataObject, scored: bool) -> None:
        sequence = self._draw_sequence(data, scored)
        queued = len(self.scheduler.waiting)
        running = len(self.scheduler.running)
        try:
            self.scheduler.check_room(1)
        except QueueFullError:
            assert queued >= self.scheduler.max_waiting
        else:
            assert queued + running < self.scheduler.capacity
            self.scheduler.add(sequence)
            self.living.append(sequence)

    @rule(data=st.data())
    def arrive_in_background(self, data: st.DataObject) -> None:
        sequence = self._draw_sequence(data, scored=False, background=True)
        try:
            self.scheduler.check_background(sequence)
        except NoBackgroundRoomError:
            return
        assert not self.scheduler.waiting
        self.scheduler.add(sequence)
        self.background.append(sequence)

    def _draw_sequence(
        self, data: st.DataObject, scored: bool, background: bool = False
    ) -> Sequence:
        room = self.pool.capacity
        # Short prompts with long completions are favoured, because together they outgrow the pool.
        prompt = data.draw(st.integers(1, 4) | st.integers(1, room), "prompt")
        longest = room - prompt
        max_tokens = data.draw(st.just(longest) | st.integers(0, longest), "max_tokens")
        first = data.draw(st.integers(1, prompt), "prompt_logprobs_from") if scored else 1
        sampling = SamplingSettings(
            max_tokens, prompt_logprobs=1 if scored else None, prompt_logprobs_from=first
        )
        return Sequence.of(Request("test", (0,) * prompt, sampling, background=background))

    @precondition(lambda self: self.living or self.background)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self._end(data.draw(st.sampled_from([*self.living, *self.background]), "which"))

    @rule(data=st.data(), steps=st.integers(1, 12))
    def run(self, data: st.DataObject, steps: int) -> None:
        for _ in range(steps):
            self._step(data)

    def _step(self, data: st.DataObject) -> None:
        oldest = self.living[0] if self.living else None
        alone = {*self.background} if not self.living else set()
        plan = self.scheduler.schedule()
        for sequence in plan.preempted:
            self.stored.pop(sequence)
        for sequence in plan.dropped:
            self.background.remove(sequence)
            self.stored.pop(sequence, None)
        somebody = bool(self.living or self.background)
        assert bool(plan.chunks) == somebody, "somebody waits while nothing is computed"
        assert not alone or self.background, "all background gave way to nobody"
        assert not (plan.preempted and self.background), "a request yielded before background"
        assert not (self.scheduler.waiting and self.background), "background is in somebody's way"
        tokens = sum(chunk.count for chunk in plan.chunks)
        assert tokens <= self.scheduler.max_batch_tokens
        assert oldest not in plan.preempted
        if oldest is not None and oldest.pending_tokens == 1:
            assert oldest in [chunk.sequence for chunk in plan.chunks], "the oldest was passed over"
        for chunk in plan.chunks:
            assert chunk.count > 0
            assert chunk.start == self.stored.get(chunk.sequence, 0), "K/V that nobody computed"
            assert chunk.end <= len(chunk.sequence.tokens)
            self.stored[chunk.sequence] = chunk.end
        completed = [chunk.sequence for chunk in plan.chunks if chunk.completes]
        drawing = {chunk.sequence for chunk in plan.chunks if chunk.draws}
        for chunk in plan.chunks:
            chunk.sequence.scored_prompt_tokens += len(chunk.scored_positions)
            chunk.sequence.computed_tokens += chunk.count
        for sequence in completed:
            if sequence in drawing:
                sequence.tokens.append(0)
                stops = len(sequence.tokens) == sequence.max_length
                ended = stops or data.draw(st.integers(0, 29), "stops at 29") == 29
            else:
                ended = True
            if ended:
                self._assert_scored(sequence)
                self._end(sequence)

    def _assert_scored(self, sequence: Sequence) -> None:
        wanted = sequence.request.sampling.prompt_logprobs is not None
        assert sequence.scored_prompt_tokens == (sequence.prompt_length - 1 if wanted else 0)

    def _end(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        (self.background if sequence.request.background else self.living).remove(sequence)
        self.stored.pop(sequence, None)

    @invariant()
    def the_books_add_up(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check()
        assert {*self.scheduler.running, *self.scheduler.waiting} == set(self.living)
        assert self.scheduler.background == self.background
        held = sum(
            self.pool.blocks_for(max(self.stored.get(sequence, 0), 1))
            for sequence in (*self.scheduler.running, *self.background)
        )
        assert held <= self.pool.blocks - self.pool.free_blocks, "K/V without a block"

    def teardown(self) -> None:
        """Assert that all remaining sequences end within a bounded number of steps."""
        if not hasattr(self, "scheduler"):
            return
        for sequence in tuple(self.background):
            self._end(sequence)
        work = sum(sequence.max_length for sequence in self.living)
        # Preempted sequences' tokens are computed again, but each preemption lets another sequence
        # go on, so the bound is the number of tokens times the number of sequences.
        for _ in range(work * (len(self.living) + 1)):
            if not self.living:
                break
            self._advance()
        assert not self.living, "somebody starves"
        assert self.pool.free_blocks == self.pool.blocks

    def _advance(self) -> None:
        plan = self.scheduler.schedule()
        for chunk in plan.chunks:
            sequence, samples, completes = chunk.sequence, chunk.draws, chunk.completes
            sequence.computed_tokens += chunk.count
            if samples:
                sequence.tokens.append(0)
            if completes and len(sequence.tokens) == sequence.max_length:
                self.scheduler.remove(sequence)
                self.living.remove(sequence)


TestScheduling = pytest.mark.timeout(120)(Scheduling.TestCase)
TestScheduling.settings = settings(max_examples=300, stateful_step_count=30)
