"""Every sequence's keys and values: its lane, and what the prefix cache keeps of them."""

import logging
from collections.abc import Collection, Iterable

from torch import Tensor

from server.engine.base import EngineError
from server.engine.torch.attention.backend import KVMemory, Lane
from server.engine.torch.sampling.postprocess import Delivery
from server.engine.torch.scheduling.prefix_cache import PrefixCache
from server.engine.torch.scheduling.scheduler import Chunk, StepPlan
from server.engine.torch.scheduling.sequence import Sequence

logger = logging.getLogger(__name__)


class KVStore:
    """Lanes of the sequences that run."""

    def __init__(self, memory: KVMemory, prefixes: PrefixCache[list[Tensor]]) -> None:
        self.prefixes = prefixes
        self.memory = memory
        self.lanes: dict[Sequence, Lane] = {}
        self._warned = False  # that a copy has failed: once, as it may fail again and again

    def make_room(self, plan: StepPlan) -> list[Sequence]:
        """Free and reserve what a step's plan says; the sequences that begin with it."""
        for sequence in plan.dropped:
            self.discard(sequence)
        begun = [chunk.sequence for chunk in plan.chunks if chunk.sequence not in self.lanes]
        self.prefixes.expect(begun)
        try:
            # First, and where there is no memory for all, too: it is others' by now.
            for sequence in plan.preempted:
                # What has a fixed place cannot go there by and by as it becomes free.
                self.discard(sequence) if self.memory.fixed else self.end(sequence)
            for chunk in plan.chunks:
                if chunk.sequence not in self.lanes:
                    self._begin(chunk)
                self.lanes[chunk.sequence].reserve(chunk.end)
        finally:
            self.prefixes.expect(())
        return begun

    def _begin(self, chunk: Chunk) -> None:
        """Give a sequence its lane, with what the prefix cache has of it."""
        sequence = chunk.sequence
        lane = self.lanes[sequence] = self.memory.lane()
        lane.reserve(chunk.end)
        self.prefixes.load(sequence, lane)
        sequence.checked = sequence.computed

    def keep_prompts(self, deliveries: Iterable[Delivery]) -> None:
        """Keep each prompt that is whole now; what is generated is kept when its sequence ends."""
        for sequence, output in deliveries:
            if isinstance(output, EngineError) or not output.token_ids:
                continue  # no logits have shown that what was computed is a number
            whole = sequence.checked < sequence.prompt_length
            sequence.checked = sequence.computed
            if whole:
                self._keep(sequence, self.lanes[sequence], giving_up=False)

    def end(self, sequence: Sequence) -> None:
        """Free a sequence's lane, if it has one, and keep what is worth it."""
        if (lane := self.lanes.get(sequence)) is not None:
            self._keep(sequence, lane, giving_up=True)
            self.discard(sequence)

    def _keep(self, sequence: Sequence, lane: Lane, giving_up: bool) -> None:
        """Copy what is worth it to the prefix cache, which nobody depends on."""
        try:
            self.prefixes.save(sequence, lane, giving_up)
        except Exception:
            # Most likely there is no memory for copies; what is kept of others is memory, too.
            self.prefixes.clear()
            log = logger.debug if self._warned else logger.warning
            self._warned = True
            log("the prefix cache was emptied, as a copy of keys and values failed", exc_info=True)

    def discard(self, sequence: Sequence) -> None:
        """Free a sequence's lane, if it has one, and keep nothing of it."""
        if (lane := self.lanes.pop(sequence, None)) is not None:
            lane.free()

    def clear(self) -> None:
        """Free everything."""
        for sequence in tuple(self.lanes):
            self.discard(sequence)
        self.prefixes.clear()

    def check(self, running: Collection[Sequence]) -> None:
        """Assert that only what runs has a lane. Between two steps."""
        self.prefixes.check()
        assert self.lanes.keys() <= set(running), "a lane that nobody uses"
        self.memory.check(self.lanes.values())
