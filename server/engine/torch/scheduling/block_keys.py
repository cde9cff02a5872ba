"""Names for blocks of keys and values: equal where the model computes the same, and only there."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Final, TypeAlias

from server.engine.base import Edit
from steering.settings import AffineSettings, Positions

_ROOT: Final = bytes(32)  # the parent of every first block

# Digest, strength, and where in the block the edit acts first and last.
_Touch: TypeAlias = tuple[str, float, int, int]


@dataclass(slots=True)
class KeyChain:
    """The keys of a text's blocks, each from its parent's key, its tokens and their edits.

    An edit that leaves K and V alone (a reward), or that acts on no token so far, has no part in
    a key: whoever asks for it shares the blocks with those who do not.
    """

    prompt_length: int  # tokens; `positions` of an edit are relative to it
    edits: tuple[Edit, ...]  # in the order in which they apply
    _keys: list[bytes] = field(default_factory=list)

    def first(self, blocks: int, block_size: int, tokens: Sequence[int]) -> Sequence[bytes]:
        """The keys of the first blocks of a text, whose tokens never change, but grow in number.

        Each is made once.
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
        """What the affine edits do to a block, in the order in which they do it."""
        touches: list[_Touch] = []
        for edit in self.edits:
            if isinstance(edit.settings, AffineSettings):
                edited = _edited(edit.settings.positions, block, self.prompt_length)
                if edited:
                    first, last = edited[0] - block.start, edited[-1] - block.start
                    touches.append((edit.digest, edit.settings.strength, first, last))
        return touches


def _edited(positions: Positions, block: range, prompt_length: int) -> range:
    """Those places of a block at which an edit acts; as `steering.route` has it."""
    match positions:
        case "all":
            return block
        case "prompt":
            return range(block.start, min(block.stop, prompt_length))
        case "generated":
            return range(max(block.start, prompt_length), block.stop)
