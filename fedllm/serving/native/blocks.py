"""The paged KV cache's allocator and its prefix cache. Pure Python; no torch.

Blocks of a fixed number of tokens (PagedAttention, arXiv 2309.06180). A full block is also known by a key
chained from the *adapter version* and all tokens up to its end, so equal text under another version never
shares keys and values. A block that nobody uses keeps its key until it is needed for something else (least
recently freed first).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

BlockKey = bytes


def chain_key(parent: BlockKey, tokens: Sequence[int]) -> BlockKey:
    """Return the key of a full block whose predecessor (or version) has key `parent`."""
    data = np.asarray(tokens, dtype="<u4").tobytes()
    return hashlib.blake2b(data, digest_size=16, key=parent[:64]).digest()


class BlockPool:
    """Hands out blocks, counts their users and remembers full ones by key.

    Parameters
    ----------
    count : int
        Number of blocks.
    block_tokens : int
        Tokens per block.
    """

    def __init__(self, count: int, block_tokens: int) -> None:
        self.count = count
        self.block_tokens = block_tokens
        self._users = [0] * count
        self._key_of: dict[int, BlockKey] = {}
        self._block_of: dict[BlockKey, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))
        self._fresh: list[int] = []

    @property
    def free(self) -> int:
        """Blocks that nobody uses."""
        return len(self._free)

    def needed(self, tokens: int, held: int) -> int:
        """Return how many more blocks `tokens` tokens need when `held` blocks are there."""
        return max(0, -(-tokens // self.block_tokens) - held)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks with undefined content.

        Raises
        ------
        ValueError
            If fewer are free; the scheduler asks first.
        """
        if count > len(self._free):
            raise ValueError(f"{count} blocks asked for, {len(self._free)} free")
        taken = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._users[block] = 1
            taken.append(block)
        self._fresh += taken
        return taken

    def take_fresh(self) -> list[int]:
        """Return the blocks allocated since the last call: they hold somebody else's old content."""
        fresh, self._fresh = self._fresh, []
        return fresh

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one use of each block; the end of a sequence becomes reusable first.

        Raises
        ------
        ValueError
            If a block has no user.
        """
        for block in reversed(blocks):
            if self._users[block] == 0:
                raise ValueError(f"block {block} released but nobody uses it")
            self._users[block] -= 1
            if self._users[block] == 0:
                self._free[block] = None

    def match(self, root: BlockKey, tokens: Sequence[int]) -> tuple[list[int], list[BlockKey]]:
        """Take a use of every cached block that begins `tokens`, leaving at least one token to compute.

        Returns
        -------
        tuple of (list of int, list of bytes)
            The blocks and their keys.
        """
        taken: list[int] = []
        keys: list[BlockKey] = []
        size = self.block_tokens
        for start in range(0, len(tokens) - size, size):
            key = chain_key(keys[-1] if keys else root, tokens[start : start + size])
            block = self._block_of.get(key)
            if block is None:
                break
            self._free.pop(block, None)
            self._users[block] += 1
            taken.append(block)
            keys.append(key)
        return taken, keys

    def remember(
        self, root: BlockKey, tokens: Sequence[int], blocks: Sequence[int], keys: list[BlockKey], computed: int
    ) -> None:
        """Key the blocks that `computed` tokens have filled since last time, and append to `keys`."""
        size = self.block_tokens
        for index in range(len(keys), computed // size):
            key = chain_key(keys[-1] if keys else root, tokens[index * size : (index + 1) * size])
            keys.append(key)
            if key not in self._block_of:
                self._key_of[blocks[index]] = key
                self._block_of[key] = blocks[index]

    def _forget(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]
