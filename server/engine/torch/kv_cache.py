"""Accounting of K/V memory in blocks. Where the values lie is the attention backend's business."""

from collections.abc import Hashable


class BlockPool:
    """A fixed number of blocks of `block_size` tokens each, held by owners."""

    def __init__(self, blocks: int, block_size: int) -> None:
        self.blocks = blocks
        self.block_size = block_size
        self._held: dict[Hashable, int] = {}

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return self.blocks - sum(self._held.values())

    @property
    def usage(self) -> float:
        """The share of blocks that is held, 0 to 1."""
        return 1 - self.free / self.blocks

    def needed(self, tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-tokens // self.block_size)

    def reserve(self, owner: Hashable, tokens: int) -> bool:
        """Hold room for `tokens` tokens in the name of `owner`; False if there is too little."""
        assert owner not in self._held, f"{owner} holds blocks already"
        needed = self.needed(tokens)
        if needed > self.free:
            return False
        self._held[owner] = needed
        return True

    def release(self, owner: Hashable) -> None:
        """Give back what `owner` holds, if anything."""
        self._held.pop(owner, None)
