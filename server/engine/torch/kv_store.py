"""Stores keys and values: a lane for each running sequence, and copies in the prefix cache."""

import logging
from collections.abc import Collection, Iterable

from torch import Tensor

from server.engine.errors import EngineError
from server.engine.torch.attention.backend import KVMemory, Lane
from server.engine.torch.sampling.postprocess import Delivery
from server.engine.torch.scheduling.prefix_cache import PrefixCache
from server.engine.torch.scheduling.scheduler import Chunk, StepPlan
from server.engine.torch.scheduling.sequence import Sequence

logger = logging.getLogger(__name__)


class KVStore:
    """Owns the lanes of the running sequences, and the prefix cache."""

    def __init__(self, memory: KVMemory, prefixes: PrefixCache[list[Tensor]]) -> None:
        self.prefixes = prefixes
        self.memory = memory
        self.lanes: dict[Sequence, Lane] = {}
        self._warned = False  # a failed copy is warned of only once, since it may fail often

    def allocate_lanes(self, plan: StepPlan) -> list[Sequence]:
        """Free and reserve lanes as a step's plan says. Return the sequences that begin with it."""
        for sequence in plan.dropped:
            self.free_lane(sequence)
        begun = [chunk.sequence for chunk in plan.chunks if chunk.sequence not in self.lanes]
        self.prefixes.reserve_for(begun)
        try:
            # Preempted sequences yield first, even if a reservation below fails: the scheduler has
            # given their blocks to others.
            for sequence in plan.preempted:
                # Caching hands a slab's memory to the prefix cache piece by piece. Preallocated
                # memory cannot be handed over, so nothing is kept there.
                if self.memory.is_preallocated:
                    self.free_lane(sequence)
                else:
                    self.cache_and_free_lane(sequence)
            for chunk in plan.chunks:
                if chunk.sequence not in self.lanes:
                    self._start_lane(chunk)
                self.lanes[chunk.sequence].reserve(chunk.end)
        finally:
            self.prefixes.reserve_for(())
        return begun

    def _start_lane(self, chunk: Chunk) -> None:
        """Give a sequence a lane, and fill in the blocks that the prefix cache has of it."""
        sequence = chunk.sequence
        lane = self.lanes[sequence] = self.memory.lane()
        lane.reserve(chunk.end)
        self.prefixes.load(sequence, lane)
        sequence.finite_tokens = sequence.computed_tokens

    def cache_prompts(self, deliveries: Iterable[Delivery]) -> None:
        """Copy prompts that are now completely computed to the prefix cache.

        Generated tokens are copied when their sequence ends.
        """
        for sequence, output in deliveries:
            if isinstance(output, EngineError) or not output.token_ids:
                continue  # without a drawn token, nothing shows that the new K/V are finite
            completes_prompt = sequence.finite_tokens < sequence.prompt_length
            sequence.finite_tokens = sequence.computed_tokens
            if completes_prompt:
                self._cache_blocks(sequence, self.lanes[sequence], free_lane=False)

    def cache_and_free_lane(self, sequence: Sequence) -> None:
        """Copy a sequence's full blocks to the prefix cache, and free its lane, if it has one."""
        if (lane := self.lanes.get(sequence)) is not None:
            self._cache_blocks(sequence, lane, free_lane=True)
            self.free_lane(sequence)

    def _cache_blocks(self, sequence: Sequence, lane: Lane, free_lane: bool) -> None:
        """Copy a lane's full blocks to the prefix cache. A failure is logged, not raised."""
        try:
            self.prefixes.save(sequence, lane, free_lane)
        except Exception:
            # Most likely memory is short, and the copies of other sequences take some of it.
            self.prefixes.clear()
            log = logger.debug if self._warned else logger.warning
            self._warned = True
            log("the prefix cache was emptied, as a copy of keys and values failed", exc_info=True)

    def free_lane(self, sequence: Sequence) -> None:
        """Free a sequence's lane, if it has one, without copying anything to the prefix cache."""
        if (lane := self.lanes.pop(sequence, None)) is not None:
            lane.free()

    def clear(self) -> None:
        """Free all lanes, and empty the prefix cache."""
        for sequence in tuple(self.lanes):
            self.free_lane(sequence)
        self.prefixes.clear()

    def check(self, running: Collection[Sequence]) -> None:
        """Assert that only running sequences have lanes. Call it between two steps."""
        self.prefixes.check()
        assert self.lanes.keys() <= set(running), "a lane that nobody uses"
        self.memory.check(self.lanes.values())
