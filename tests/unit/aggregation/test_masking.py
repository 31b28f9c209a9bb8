"""Masks: uniform, cancelling, packed without loss, and hiding what is under them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from secagg_world import NAMES, World

from fedllm.aggregation.secagg.masking import (
    BLOCK,
    CHUNK_BYTES,
    Mask,
    add_masks,
    add_packed,
    check_chunks,
    digests_of,
    mask_and_pack,
    reduce_ring,
)
from fedllm.errors import DecodeError, DigestMismatch
from fedllm.messages.secagg import MaskedVector
from fedllm.rng import OsRng, uniform_u32

FALSE_ALARM = 1e-6
"""Chance that a correct build fails one chi-square test; the critical value is computed from it."""
EAST = NAMES[0]


def masked_bytes(fill: int, bits: int, entries: int, graph: tuple[int, int] | None = None) -> np.ndarray:
    """Return one owner's masked vector of a constant, as bytes on the wire."""
    world = World(4 if graph is None else 9, bits=bits, entries=entries, graph=graph)
    delivery = world.share(world.advertise())[EAST]
    masked = world.owners[EAST].mask(delivery, np.full(entries, fill, dtype=np.uint32))
    return np.frombuffer(b"".join(masked.chunks), dtype=np.uint8)


def chi_square(sample: np.ndarray) -> float:
    """Return the chi-square statistic of bytes against the uniform distribution."""
    counts = np.bincount(sample, minlength=256)
    expected = sample.size / 256
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("bits", [8, 16, 24, 32])
@pytest.mark.parametrize("fill", [0, 1, 255])
def test_a_masked_constant_looks_uniform(bits: int, fill: int) -> None:
    """Chi-square over the bytes of a masked constant vector, each byte of an entry by itself."""
    critical = float(stats.chi2.ppf(1 - FALSE_ALARM, 255))
    wire = masked_bytes(fill, bits, 60_000).reshape(-1, bits // 8)
    for place in range(bits // 8):
        assert chi_square(wire[:, place]) < critical


def test_a_masked_constant_looks_uniform_on_a_sparse_graph() -> None:
    """The same with four neighbours of eight."""
    critical = float(stats.chi2.ppf(1 - FALSE_ALARM, 255))
    wire = masked_bytes(200, 24, 60_000, graph=(4, 3)).reshape(-1, 3)
    for place in range(3):
        assert chi_square(wire[:, place]) < critical


def test_the_uniformity_test_can_fail() -> None:
    """The control: the same vector unmasked, or masked to all but one value, is far beyond the critical value."""
    critical = float(stats.chi2.ppf(1 - FALSE_ALARM, 255))
    assert chi_square(np.full(60_000, 7, dtype=np.uint8)) > critical
    wire = masked_bytes(0, 8, 60_000)
    assert chi_square(np.where(wire == 0, 1, wire)) > critical


def test_masked_zeros_and_masked_large_values_have_one_distribution() -> None:
    """Two-sample chi-square: what is under the mask does not show in the bytes (false alarm 1e-6)."""
    a = np.bincount(masked_bytes(0, 16, 60_000), minlength=256)
    b = np.bincount(masked_bytes(40_000, 16, 60_000), minlength=256)
    assert stats.chi2_contingency([a, b]).pvalue > FALSE_ALARM


def test_the_same_values_masked_for_another_sum_share_no_bytes_pattern() -> None:
    """Fresh keys for each sum: two masked vectors of equal values differ like independent noise."""
    a, b = masked_bytes(3, 32, 4_000), masked_bytes(3, 32, 4_000)
    assert abs(np.mean(a == b) - 1 / 256) < 6 * np.sqrt(1 / 256 / a.size)


def naive_pack(values: np.ndarray, entry_bytes: int) -> bytes:
    """Return the low bytes of value after value."""
    return b"".join((int(value) % 256**entry_bytes).to_bytes(entry_bytes, "little") for value in values)


def naive_masked(values: np.ndarray, masks: list[Mask]) -> np.ndarray:
    """Add one whole keystream after another."""
    total = values.copy()
    for key, sign in masks:
        total = total + uniform_u32(key, values.size) * np.uint32(sign % 2**32)
    return total


@pytest.mark.parametrize("size", [1, 5, BLOCK - 1, BLOCK, 3 * BLOCK + 7])
@pytest.mark.parametrize("count", [1, 7, 300])
def test_masks_are_the_keystreams_and_cancel(size: int, count: int) -> None:
    """Adding block by block equals the naive sum stream by stream; the opposite signs undo it."""
    if count * size > 10 * BLOCK:
        count = 4
    masks: list[Mask] = [(OsRng().token(32), 1 if i % 3 else -1) for i in range(count)]
    x = np.arange(size, dtype=np.uint32) * np.uint32(2_654_435_761)
    y = x.copy()
    add_masks(y, masks)
    np.testing.assert_array_equal(y, naive_masked(x, masks))
    add_masks(y, [(key, -sign) for key, sign in masks])
    np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize("entry_bytes", [1, 2, 3, 4])
@pytest.mark.parametrize("entries", [1, 7, BLOCK + 1, CHUNK_BYTES // 3 + 1, CHUNK_BYTES + 1])
def test_masking_and_packing_in_one_pass_is_masking_then_packing(entry_bytes: int, entries: int) -> None:
    """Chunks hold whole entries and 1 MiB at least; they are added back to the values modulo the ring."""
    x = np.frombuffer(OsRng().token(4 * entries), dtype="<u4")
    masks: list[Mask] = [(OsRng().token(32), 1), (OsRng().token(32), -1)]
    chunks = mask_and_pack(x, masks, entry_bytes)
    masked = naive_masked(x, masks)
    some = slice(0, 1000)
    assert b"".join(chunks)[: 1000 * entry_bytes] == naive_pack(masked[some], entry_bytes)
    assert sum(map(len, chunks)) == entries * entry_bytes
    assert all(CHUNK_BYTES <= len(chunk) < CHUNK_BYTES + entry_bytes for chunk in chunks[:-1])
    check_chunks(MaskedVector(EAST, "update", entries, entry_bytes, digests_of(chunks)), chunks)
    back = np.zeros(entries, dtype=np.uint32)
    add_packed(back, chunks, entry_bytes)
    np.testing.assert_array_equal(back, reduce_ring(masked, 8 * entry_bytes))


def test_a_vector_without_masks_is_packed_and_left_as_it_was() -> None:
    """The values themselves never change: they are asked for again when a reply is lost."""
    x = np.arange(10, dtype=np.uint32)
    before = x.copy()
    assert mask_and_pack(x, [(bytes(32), 1)], 4) != mask_and_pack(x, [], 4) == (x.astype("<u4").tobytes(),)
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("chunks", [(), (b"",), (bytes(5),), (bytes(7),), (bytes(3), bytes(3)), (bytes(6), b"")])
def test_chunks_are_cut_in_one_way(chunks: tuple[bytes, ...]) -> None:
    """Two 3-byte entries are one chunk of six bytes and nothing else, and its head names it."""
    head = MaskedVector(EAST, "update", 2, 3, digests_of([bytes(6)]))
    check_chunks(head, (bytes(6),))
    with pytest.raises(DigestMismatch, match="1 chunks and 6 bytes expected"):
        check_chunks(head, chunks)
    with pytest.raises(DigestMismatch, match=r"chunk 0 .* of 'east'"):
        check_chunks(head, (bytes(5) + b"\x01",))
    with pytest.raises(DecodeError, match="names 0 chunks"):
        check_chunks(MaskedVector(EAST, "update", 2, 3, ()), (bytes(6),))
