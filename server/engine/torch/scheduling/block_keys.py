"""Makes keys for blocks of K and V: equal exactly if the same tokens and edits lead to them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Final, TypeAlias

from server.engine.request import Edit
from steering.settings import AffineSettings, Positions

_ROOT: Final = bytes(32)  # the parent's key of every first block

# An edit's digest and strength, and the first and last offset in the block at which it acts.
_Touch: TypeAlias = tuple[str, float, int, int]


@dataclass(slots=True)
class KeyChain:
    """The keys of a sequence's blocks: each hashes its parent's key, its tokens and their edits.

    Reward edits, which leave K and V alone, are no part of a key; nor are affine edits that act on
    no token of the block. So requests with and without such an edit share blocks.
    """

    prompt_length: int  # tokens; `positions` of an edit are relative to it
    edits: tuple[Edit, ...]  # in the order in which they apply
    _keys: list[bytes] = field(default_factory=list)

    def first_keys(self, blocks: int, block_size: int, tokens: Sequence[int]) -> Sequence[bytes]:
        """Return the keys of the first `blocks` blocks. Each key is computed once.

        Args:
            tokens: those of the call before, to which more may have been added.
        """
        assert blocks * block_size <= len(tokens), "a block that is not full has no key"
        for place in range(len(self._keys), blocks):
            block = range(place * block_size, (place + 1) * block_size)
            parent = self._keys[-1] if self._keys else _ROOT
            content = (tokens[block.start : block.stop], self._touches(block))
            # `repr` tells any two lists of numbers and strings apart.
            self._keys.append(sha256(parent + repr(content).encode()).digest())
        return self._keys[:blocks]

    def _touches(self, block: range) -> list[_Touch]:
        """List how the affine edits touch a block, in the order in which they apply."""
        touches: list[_Touch] = []
        for edit in self.edits:
            if isinstance(edit.settings, AffineSettings):
                edited = _edited(edit.settings.positions, block, self.prompt_length)
                if edited:
                    first, last = edited[0] - block.start, edited[-1] - block.start
                    touches.append((edit.digest, edit.settings.strength, first, last))
        return touches


def _edited(positions: Positions, block: range, prompt_length: int) -> range:
    """Return the places of a block at which an edit acts; agrees with `steering.route`."""
    match positions:
        case "all":
            return block
        case "prompt":
            return range(block.start, min(block.stop, prompt_length))
        case "generated":
            return range(max(block.start, prompt_length), block.stop)
