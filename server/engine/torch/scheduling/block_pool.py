"""Accounting of K/V memory in blocks. Where the values lie is the attention backend's business."""

from collections.abc import Collection, Hashable
from fractions import Fraction
from math import ceil


class BlockPool:
    """A fixed number of blocks of `block_size` tokens each; each block has one owner or none."""

    def __init__(self, blocks: int, block_size: int, page_tokens: Fraction = Fraction(1)) -> None:
        """`page_tokens` is in how many tokens an owner's memory really grows, 1 or more."""
        self.blocks = blocks
        self.block_size = block_size
        self._page_tokens = page_tokens
        self.free = blocks  # blocks that nobody holds
        self._held: dict[Hashable, int] = {}

    @property
    def usage(self) -> float:
        """The share of blocks that is held, 0 to 1."""
        return 1 - self.free / self.blocks

    @property
    def tokens(self) -> int:
        """Tokens of the largest owner that all blocks together can have."""
        return int(self.blocks * self.block_size // self._page_tokens * self._page_tokens)

    def needed(self, tokens: int) -> int:
        """Blocks that one owner's tokens take: so many that their pages' memory is no more."""
        pages = ceil(tokens / self._page_tokens)
        return ceil(pages * self._page_tokens / self.block_size)

    def hold(self, owner: Hashable, tokens: int) -> bool:
        """Make `owner` hold room for `tokens` tokens, with what it holds already.

        False if there is too little; nothing has changed then.
        """
        held = self._held.get(owner, 0)
        more = self.needed(tokens) - held
        if more > self.free:
            return False
        if more > 0:
            self._held[owner] = held + more
            self.free -= more
        return True

    def release(self, owner: Hashable) -> None:
        """Take back what `owner` holds, if anything."""
        self.free += self._held.pop(owner, 0)

    def check(self, owners: Collection[Hashable]) -> None:
        """Assert that every block is free or held by one of `owners`."""
        assert 0 <= self.free <= self.blocks, f"{self.free} of {self.blocks} blocks are free"
        assert self.free + sum(self._held.values()) == self.blocks, "blocks are lost or held twice"
        assert self._held.keys() <= set(owners), "blocks are held for nobody"
