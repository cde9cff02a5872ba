"""The prefix cache: copies of full blocks' keys and values, for texts that begin alike."""

from collections import OrderedDict
from typing import Generic, Protocol, TypeVar

from server.engine.torch.kv_cache import BlockPool
from server.engine.torch.sequence import Sequence as EngineSequence

Values = TypeVar("Values")


class Store(Protocol[Values]):
    """One sequence's keys and values, such as a slab."""

    def read(self, start: int, end: int) -> Values:
        """A copy of those of some tokens."""
        ...

    def write(self, start: int, values: Values) -> None:
        """Store what was read, from a token on."""
        ...


class PrefixCache(Generic[Values]):
    """Blocks by key, the least recently used first.

    Each takes one of the pool's blocks that no sequence holds, and gives it up as soon as one
    wants it: nobody yields or waits for the sake of what is stored here. A sequence gets copies,
    so that it cannot write into anybody else's prefix.
    """

    def __init__(self, pool: BlockPool, enabled: bool) -> None:
        self._pool = pool
        self._enabled = enabled
        self._blocks: OrderedDict[bytes, Values] = OrderedDict()
        self.queries = 0  # tokens of prompts looked up since the start
        self.hits = 0  # those of them that were found

    def __len__(self) -> int:
        """Blocks that are stored."""
        return len(self._blocks)

    def find(self, sequence: EngineSequence) -> int:
        """How many of its first tokens are stored.

        Only those that are followed by no token whose logits are wanted, so never the last one.
        """
        if not self._enabled:
            return 0
        size = self._pool.block_size
        blocks = sequence.skippable // size
        keys = sequence.chain.first(blocks, size, sequence.tokens)
        found = next((i for i, key in enumerate(keys) if key not in self._blocks), blocks)
        return found * size

    def load(self, sequence: EngineSequence, store: Store[Values]) -> None:
        """Give a sequence that begins the tokens that count as computed.

        These are what `find` has found; nothing was saved or trimmed since.
        """
        size = self._pool.block_size
        blocks = sequence.computed // size
        if self._enabled and sequence.skippable and not sequence.preemptions:
            self.queries += sequence.prompt_length
            self.hits += sequence.computed
        keys = sequence.chain.first(blocks, size, sequence.tokens)
        for place in reversed(range(blocks)):
            self._blocks.move_to_end(keys[place])
            store.write(place * size, self._blocks[keys[place]])

    def save(self, sequence: EngineSequence, store: Store[Values]) -> None:
        """Keep the full blocks of a sequence's checked tokens, as far as there is room."""
        size = self._pool.block_size
        blocks = min(sequence.checked // size, self._pool.free) if self._enabled else 0
        keys = sequence.chain.first(blocks, size, sequence.tokens)
        # The last block first: it is no use without those before it, so it goes before them.
        for place in reversed(range(blocks)):
            if keys[place] not in self._blocks:
                self._blocks[keys[place]] = store.read(place * size, (place + 1) * size)
            self._blocks.move_to_end(keys[place])
            self.trim()

    def trim(self) -> None:
        """Give up what sequences have taken the room of."""
        while len(self._blocks) > self._pool.free:
            self._blocks.popitem(last=False)

    def clear(self) -> None:
        """Give up everything."""
        self._blocks.clear()

    def check(self) -> None:
        """Assert that what is stored has room. Between two steps."""
        assert len(self._blocks) <= self._pool.free, "cached blocks take memory that others hold"
