"""The prefix cache: copies of full blocks' keys and values, for sequences that begin alike."""

from collections import Counter, OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Items
from itertools import islice
from typing import Final, Generic, Protocol, TypeVar

from server.engine.torch.scheduling.block_pool import BlockPool
from server.engine.torch.scheduling.sequence import Sequence as EngineSequence

Values = TypeVar("Values")
# While a lane gives up its memory, 1/_PARTS of all blocks may be in memory twice.
_PARTS: Final = 128


class KVLane(Protocol[Values]):
    """Holds one sequence's keys and values, as a slab does."""

    def read(self, start: int, end: int) -> Values:
        """Copy the keys and values of tokens `start` to `end`."""
        ...

    def write(self, start: int, values: Values) -> None:
        """Store the values that `read` returned, as the tokens from `start` on."""
        ...

    def truncate(self, tokens: int) -> None:
        """Keep the first `tokens` tokens only."""
        ...


class PrefixCache(Generic[Values]):
    """Keeps copies of blocks by key, the least recently used first.

    A cached block takes the room of a pool's block that no sequence holds, and is dropped as soon
    as a sequence wants that room: no sequence yields or waits for the cache. A sequence gets
    copies, so that it cannot write into another's prefix.
    """

    def __init__(self, pool: BlockPool, enabled: bool) -> None:
        self._pool = pool
        self._at_once = max(1, pool.blocks // _PARTS)  # blocks that a lane gives up at once
        self._enabled = enabled
        self._blocks: OrderedDict[bytes, Values] = OrderedDict()
        self._reserved = Counter[bytes]()  # by key, how often a block is still to be loaded
        self.queries = 0  # prompt tokens looked up since the start
        self.hits = 0  # prompt tokens found since the start

    def __len__(self) -> int:
        """Return the number of stored blocks."""
        return len(self._blocks)

    def find(self, sequence: EngineSequence) -> int:
        """Return how many of a sequence's first tokens are stored.

        Only `reusable_tokens` are looked up, whose logits nobody wants, so never the last one.
        """
        if not self._enabled:
            return 0
        size = self._pool.block_size
        blocks = sequence.reusable_tokens // size
        keys = sequence.chain.first_keys(blocks, size, sequence.tokens)
        found = next((i for i, key in enumerate(keys) if key not in self._blocks), blocks)
        return found * size

    def reserve_for(self, sequences: Iterable[EngineSequence]) -> None:
        """Keep the blocks that these sequences have found until they load them.

        Replaces the sequences of the call before. These sequences hold the pool's blocks for their
        copies already, but have not filled them; the cache may use that room until they load.
        """
        self._reserved = Counter(key for each in sequences for key in self._found_keys(each))
        self.trim()

    def load(self, sequence: EngineSequence, lane: KVLane[Values]) -> None:
        """Copy a beginning sequence's computed tokens into its lane.

        `find` has found these tokens, and their blocks were kept since.
        """
        size = self._pool.block_size
        if self._enabled and sequence.reusable_tokens and not sequence.preemptions:
            self.queries += sequence.prompt_length
            self.hits += sequence.computed_tokens
        keys = self._found_keys(sequence)
        for place in reversed(range(len(keys))):
            self._blocks.move_to_end(keys[place])
            lane.write(place * size, self._blocks[keys[place]])
            if self._reserved[keys[place]]:
                self._reserved[keys[place]] -= 1
                self.trim()

    def save(self, sequence: EngineSequence, lane: KVLane[Values], free_lane: bool = False) -> None:
        """Keep the full blocks of a sequence's finite tokens, as far as there is room.

        Args:
            free_lane: whether to empty the lane, part by part as its blocks are copied.
        """
        size = self._pool.block_size
        blocks = min(sequence.finite_tokens // size, self._pool.free_blocks) if self._enabled else 0
        keys = sequence.chain.first_keys(blocks, size, sequence.tokens)
        if free_lane:
            lane.truncate(blocks * size)
        # From the last block to the first, so that the last becomes the least recently used: it is
        # of no use without those before it.
        for place in reversed(range(blocks)):
            if keys[place] not in self._blocks:
                self.trim(1)
                self._blocks[keys[place]] = lane.read(place * size, (place + 1) * size)
            self._blocks.move_to_end(keys[place])
            if free_lane and not place % self._at_once:
                lane.truncate(place * size)
        self.trim()

    def trim(self, more: int = 0) -> None:
        """Drop old blocks until the rest, and `more` blocks, fit beside what sequences hold."""
        too_many = len(self._blocks) + more - self._pool.free_blocks - self._reserved.total()
        if too_many > 0:
            old = (key for key in self._blocks if not self._reserved[key])
            for key in list(islice(old, too_many)):
                del self._blocks[key]

    def clear(self) -> None:
        """Drop all blocks."""
        self._blocks.clear()

    def check(self) -> None:
        """Assert that the stored blocks have room. To be called between two steps."""
        assert len(self._blocks) <= self._pool.free_blocks, (
            "cached blocks take memory that others hold"
        )

    def _found_keys(self, sequence: EngineSequence) -> Items[bytes]:
        size = self._pool.block_size
        return sequence.chain.first_keys(sequence.computed_tokens // size, size, sequence.tokens)
