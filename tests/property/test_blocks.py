"""The block pool never loses, doubles or mixes up a block."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.serving.native.blocks import BlockPool

COUNT, SIZE = 6, 2
ROOTS = (b"version-a", b"version-b")


def assert_books_balance(pool: BlockPool, held: list[list[int]]) -> None:
    """Users of every block equal the lists that hold it; the free ones are exactly the others."""
    uses = Counter(block for blocks in held for block in blocks)
    assert [uses[block] for block in range(pool.count)] == pool._users
    assert sorted(pool._free) == [block for block in range(pool.count) if not uses[block]]
    assert {key: block for block, key in pool._key_of.items()} == pool._block_of


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1), st.lists(st.integers(0, 1), max_size=9))))
@settings(deadline=None)
def test_no_block_is_lost_or_shared_by_accident(script) -> None:
    """Any order of allocations, matches and releases keeps the books balanced; equal blocks hold equal text."""
    pool = BlockPool(COUNT, SIZE)
    held: list[list[int]] = []
    content: dict[int, tuple[bytes, tuple[int, ...]]] = {}
    for action, root_index, tokens in script:
        root = ROOTS[root_index]
        if action == 0 and held:
            pool.release(held.pop())
        elif tokens:
            blocks, keys = pool.match(root, tokens)
            for index, block in enumerate(blocks):
                assert content[block] == (root, tuple(tokens[: (index + 1) * SIZE]))
            assert len(blocks) * SIZE < len(tokens)
            need = pool.needed(len(tokens), len(blocks))
            if need > pool.free:
                pool.release(blocks)
                continue
            new = pool.allocate(need)
            assert pool.take_fresh() == new
            blocks += new
            for index in range(len(tokens) // SIZE):
                content[blocks[index]] = (root, tuple(tokens[: (index + 1) * SIZE]))
            pool.remember(root, tokens, blocks, keys, len(tokens))
            held.append(blocks)
        assert_books_balance(pool, held)
    for blocks in held:
        pool.release(blocks)
    assert pool.free == COUNT


def test_equal_text_of_another_version_is_not_shared() -> None:
    """The prefix cache is keyed by the adapter's digest: versions never share keys and values."""
    pool = BlockPool(COUNT, SIZE)
    tokens = [1, 2, 3, 4]
    blocks = pool.allocate(2)
    pool.remember(ROOTS[0], tokens, blocks, [], 4)
    assert pool.match(ROOTS[0], [*tokens, 5])[0] == blocks
    assert pool.match(ROOTS[1], [*tokens, 5])[0] == []


def test_misuse_is_refused() -> None:
    """Allocating more than there is, or releasing twice, raises instead of corrupting."""
    pool = BlockPool(2, SIZE)
    with pytest.raises(ValueError, match="3 blocks asked for, 2 free"):
        pool.allocate(3)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(ValueError, match="nobody uses it"):
        pool.release(blocks)


@given(st.lists(st.integers(0, 3), min_size=SIZE + 1, max_size=10), st.integers(0, 9))
@settings(deadline=None)
def test_a_hit_is_the_same_version_and_the_same_beginning(tokens, changed) -> None:
    """A changed token, or another version, ends the match at its block; nothing behind it is ever taken."""
    pool = BlockPool(COUNT, SIZE)
    blocks = pool.allocate(pool.needed(len(tokens), 0))
    pool.remember(ROOTS[0], tokens, blocks, [], len(tokens))
    other = list(tokens)
    changed %= len(tokens)
    other[changed] += 1
    matched, _ = pool.match(ROOTS[0], other)
    assert matched == blocks[: min(changed, len(tokens) - 1) // SIZE]
    assert pool.match(ROOTS[1], tokens) == ([], [])
