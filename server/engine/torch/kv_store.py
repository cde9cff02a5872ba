"""Every sequence's keys and values: its lane, and what the prefix cache keeps of them."""

from collections.abc import Collection, Iterable

from torch import Tensor

from server.engine.base import EngineError
from server.engine.torch.attention_step import KVMemory, Lane
from server.engine.torch.postprocess import Delivery
from server.engine.torch.prefix_cache import PrefixCache
from server.engine.torch.scheduler import Chunk, Plan
from server.engine.torch.sequence import Sequence


class KVStore:
    """Lanes of the sequences that run."""

    def __init__(self, memory: KVMemory, prefixes: PrefixCache[list[Tensor]]) -> None:
        self.prefixes = prefixes
        self.memory = memory
        self.lanes: dict[Sequence, Lane] = {}

    def make_room(self, plan: Plan) -> list[Sequence]:
        """Free and reserve what a step's plan says; the sequences that begin with it."""
        for sequence in plan.dropped:
            self.discard(sequence)
        if self.memory.fixed:  # others want the room at once, so nothing can be kept of it first
            for sequence in plan.preempted:
                self.discard(sequence)
        begun = [chunk.sequence for chunk in plan.chunks if chunk.sequence not in self.lanes]
        for chunk in plan.chunks:
            if chunk.sequence not in self.lanes:
                self._begin(chunk)
            self.lanes[chunk.sequence].reserve(chunk.end)
        # Not before all have what they found, some of which may have to go for it.
        for sequence in plan.preempted:
            self.end(sequence)
        self.prefixes.trim()
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
                self.prefixes.save(sequence, self.lanes[sequence])

    def end(self, sequence: Sequence) -> None:
        """Free a sequence's lane, if it has one, and keep what is worth it."""
        if (lane := self.lanes.get(sequence)) is not None:
            self.prefixes.save(sequence, lane)
            self.discard(sequence)

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
