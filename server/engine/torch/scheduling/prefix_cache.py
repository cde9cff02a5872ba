"""The prefix cache: copies of full blocks' keys and values, for texts that begin alike."""

from collections import Counter, OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Items
from itertools import islice
from typing import Final, Generic, Protocol, TypeVar

from server.engine.torch.scheduling.block_pool import BlockPool
from server.engine.torch.scheduling.sequence import Sequence as EngineSequence

Values = TypeVar("Values")
# Of all blocks, so many parts: one of them may be there twice while a store gives it up.
_PARTS: Final = 128


class Store(Protocol[Values]):
    """One sequence's keys and values, such as a slab."""

    def read(self, start: int, end: int) -> Values:
        """A copy of those of some tokens."""
        ...

    def write(self, start: int, values: Values) -> None:
        """Store what was read, from a token on."""
        ...

    def truncate(self, tokens: int) -> None:
        """Forget what is stored from a token on."""
        ...


class PrefixCache(Generic[Values]):
    """Blocks by key, the least recently used first.

    Each takes one of the pool's blocks that no sequence holds, and gives it up as soon as one
    wants it: nobody yields or waits for the sake of what is stored here. A sequence gets copies,
    so that it cannot write into anybody else's prefix.
    """

    def __init__(self, pool: BlockPool, enabled: bool) -> None:
        self._pool = pool
        self._at_once = max(1, pool.blocks // _PARTS)  # blocks that a store gives up
        self._enabled = enabled
        self._blocks: OrderedDict[bytes, Values] = OrderedDict()
        self._expected = Counter[bytes]()  # how often a block is still to be loaded
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

    def expect(self, sequences: Iterable[EngineSequence]) -> None:
        """Keep the blocks that these sequences have found, and nobody else's, until they load them.

        They hold the memory of their copies by now, of which they have taken nothing yet.
        """
        self._expected = Counter(key for each in sequences for key in self._found(each))
        self.trim()

    def load(self, sequence: EngineSequence, store: Store[Values]) -> None:
        """Give a sequence that begins the tokens that count as computed.

        These are what `find` has found; nothing of it has gone since.
        """
        size = self._pool.block_size
        if self._enabled and sequence.skippable and not sequence.preemptions:
            self.queries += sequence.prompt_length
            self.hits += sequence.computed
        keys = self._found(sequence)
        for place in reversed(range(len(keys))):
            self._blocks.move_to_end(keys[place])
            store.write(place * size, self._blocks[keys[place]])
            if self._expected[keys[place]]:
                self._expected[keys[place]] -= 1
                self.trim()

    def save(self, sequence: EngineSequence, store: Store[Values], giving_up: bool = False) -> None:
        """Keep the full blocks of a sequence's checked tokens, as far as there is room.

        Args:
            giving_up: what is kept, or not worth it, is taken out of the store.
        """
        size = self._pool.block_size
        blocks = min(sequence.checked // size, self._pool.free) if self._enabled else 0
        keys = sequence.chain.first(blocks, size, sequence.tokens)
        if giving_up:
            store.truncate(blocks * size)
        # The last block first: it is no use without those before it, so it goes before them.
        for place in reversed(range(blocks)):
            if keys[place] not in self._blocks:
                self.trim(1)
                self._blocks[keys[place]] = store.read(place * size, (place + 1) * size)
            self._blocks.move_to_end(keys[place])
            if giving_up and not place % self._at_once:
                store.truncate(place * size)
        self.trim()

    def trim(self, more: int = 0) -> None:
        """Give up what sequences have taken the room of, and what `more` blocks would take."""
        too_many = len(self._blocks) + more - self._pool.free - self._expected.total()
        if too_many > 0:
            old = (key for key in self._blocks if not self._expected[key])
            for key in list(islice(old, too_many)):
                del self._blocks[key]

    def clear(self) -> None:
        """Give up everything."""
        self._blocks.clear()

    def check(self) -> None:
        """Assert that what is stored has room. Between two steps."""
        assert len(self._blocks) <= self._pool.free, "cached blocks take memory that others hold"

    def _found(self, sequence: EngineSequence) -> Items[bytes]:
        size = self._pool.block_size
        return sequence.chain.first(sequence.computed // size, size, sequence.tokens)
