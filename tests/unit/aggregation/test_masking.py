"""Masks: uniform, cancelling, packed without loss, and hiding what is under them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from secagg_world import NAMES, World

from fedllm.aggregation.secagg.masking import CHUNK_BYTES, add_mask, add_packed, check_packed, pack, reduce_ring
from fedllm.errors import DecodeError
from fedllm.messages.secagg import MaskedVector
from fedllm.rng import OsRng, uniform_u32

FALSE_ALARM = 1e-6
"""Chance that a correct build fails one chi-square test; the critical value is computed from it."""
EAST = NAMES[0]


def masked_bytes(fill: int, bits: int, entries: int) -> np.ndarray:
    """Return one owner's masked vector of a constant, as bytes on the wire."""
    world = World(4, bits=bits, entries=entries)
    delivery = world.share(world.advertise())[EAST]
    vector: MaskedVector = world.owners[EAST].mask(delivery, np.full(entries, fill, dtype=np.uint32))
    return np.frombuffer(b"".join(vector.chunks), dtype=np.uint8)


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


@pytest.mark.parametrize("size", [1, 5, CHUNK_BYTES // 4, CHUNK_BYTES // 4 + 3])
def test_masks_are_the_keystream_and_cancel(size: int) -> None:
    """Adding equals the naive whole-stream sum whatever the chunking; subtracting undoes it."""
    key = OsRng().token(32)
    x = np.arange(size, dtype=np.uint32) * np.uint32(2_654_435_761)
    y = x.copy()
    add_mask(y, key, sign=1)
    np.testing.assert_array_equal(y, x + uniform_u32(key, size))
    add_mask(y, key, sign=-1)
    np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize("entry_bytes", [1, 2, 3, 4])
@pytest.mark.parametrize("entries", [1, 7, CHUNK_BYTES // 3 + 1, CHUNK_BYTES + 1])
def test_packing_keeps_the_low_bytes(entry_bytes: int, entries: int) -> None:
    """Unpacking gives the values modulo the ring; chunks hold whole entries and about 1 MiB."""
    x = np.frombuffer(OsRng().token(4 * entries), dtype="<u4")
    chunks = pack(x, entry_bytes)
    check_packed(chunks, entries, entry_bytes)
    assert sum(map(len, chunks)) == entries * entry_bytes
    assert all(CHUNK_BYTES <= len(chunk) < CHUNK_BYTES + entry_bytes for chunk in chunks[:-1])
    back = np.zeros(entries, dtype=np.uint32)
    add_packed(back, chunks, entry_bytes)
    np.testing.assert_array_equal(back, reduce_ring(x, 8 * entry_bytes))


@pytest.mark.parametrize("chunks", [(), (b"",), (bytes(5),), (bytes(7),), (bytes(3), bytes(3)), (bytes(6), b"")])
def test_chunks_are_cut_in_one_way(chunks: tuple[bytes, ...]) -> None:
    """Two 3-byte entries are one chunk of six bytes and nothing else."""
    check_packed((bytes(6),), 2, 3)
    with pytest.raises(DecodeError, match="1 chunks and 6 bytes expected"):
        check_packed(chunks, 2, 3)
