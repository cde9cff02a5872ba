"""Counts K/V memory in blocks. The attention backend decides where the values lie."""

from collections.abc import Collection, Hashable
from fractions import Fraction
from math import ceil


class BlockPool:
    """Counts a fixed number of blocks of `block_size` tokens; each has one owner or none."""

    def __init__(self, blocks: int, block_size: int, page_tokens: Fraction = Fraction(1)) -> None:
        """Start with `blocks` free blocks.

        An owner's memory grows by pages of the operating system. `page_tokens` is the number of
        tokens whose keys and values fill one, 1 or more, and seldom a whole number.
        """
        self.blocks = blocks
        self.block_size = block_size
        self._page_tokens = page_tokens
        self.free_blocks = blocks  # the number of blocks without an owner
        self._allocated: dict[Hashable, int] = {}

    @property
    def usage(self) -> float:
        """The share of blocks that are held, 0 to 1."""
        return 1 - self.free_blocks / self.blocks

    @property
    def capacity(self) -> int:
        """The number of tokens that one owner of all blocks can have."""
        return int(self.blocks * self.block_size // self._page_tokens * self._page_tokens)

    def blocks_for(self, tokens: int) -> int:
        """Return how many blocks an owner of `tokens` tokens needs, counting whole pages."""
        pages = ceil(tokens / self._page_tokens)
        return ceil(pages * self._page_tokens / self.block_size)

    def allocate(self, owner: Hashable, tokens: int) -> bool:
        """Make `owner` hold at least the blocks for `tokens` tokens; never free any.

        Returns False, and changes nothing, if too few blocks are free.
        """
        held = self._allocated.get(owner, 0)
        more = self.blocks_for(tokens) - held
        if more > self.free_blocks:
            return False
        if more > 0:
            self._allocated[owner] = held + more
            self.free_blocks -= more
        return True

    def release(self, owner: Hashable) -> None:
        """Free the blocks that `owner` holds, if any."""
        self.free_blocks += self._allocated.pop(owner, 0)

    def check(self, owners: Collection[Hashable]) -> None:
        """Assert that every block is free or held by one of `owners`."""
        assert 0 <= self.free_blocks <= self.blocks, (
            f"{self.free_blocks} of {self.blocks} blocks are free"
        )
        assert self.free_blocks + sum(self._allocated.values()) == self.blocks, (
            "blocks are lost or held twice"
        )
        assert self._allocated.keys() <= set(owners), "blocks are held for nobody"
