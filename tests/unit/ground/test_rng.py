"""Keystreams and random ports: known answers, seekability, uniformity."""

from __future__ import annotations

import numpy as np
import pytest

from fedllm.rng import MAX_WORDS, OsRng, SeededRng, WordStream, keystream, uniform_floats, uniform_u32


def test_keystream_is_aes_256_ctr_from_counter_zero() -> None:
    """The first block is AES-256 of the all-zero block: FIPS 197 / NIST AESAVS key-independent known answer."""
    # AESAVS GFSbox/VarTxt family: AES-256, zero key, zero plaintext.
    assert keystream(bytes(32), 16).hex() == "dc95c078a2408989ad48a21492842087"


def test_keystream_can_be_cut_into_chunks_anywhere_on_a_block() -> None:
    """A chunked mask equals the mask made in one go, so vectors can stream."""
    key = bytes(range(32))
    whole = uniform_u32(key, 1000)
    parts = np.concatenate([uniform_u32(key, 400), uniform_u32(key, 600, offset=400)])
    assert (whole == parts).all()


@pytest.mark.parametrize(("key", "offset"), [(bytes(16), 0), (bytes(32), 8)])
def test_keystream_refuses_short_keys_and_offsets_inside_a_block(key: bytes, offset: int) -> None:
    """A 128-bit key or a misaligned offset is a programming error, never a weaker mask."""
    with pytest.raises(ValueError, match="keystream"):
        keystream(key, 16, offset=offset)


@pytest.mark.parametrize("runs", [[1000], [1, 2, 3, 994], [37] * 27 + [1], [MAX_WORDS, 5]])
def test_a_word_stream_is_the_keystream_however_it_is_cut(runs: list[int]) -> None:
    """Runs that end inside an AES block go on where they stopped."""
    key = bytes(range(32))
    stream = WordStream(key)
    made = []
    for run in runs:
        buffer = bytearray(4 * run)
        stream.fill(memoryview(buffer))
        made.append(np.frombuffer(buffer, dtype="<u4"))
    assert (np.concatenate(made) == uniform_u32(key, sum(runs))).all()


def test_a_word_stream_refuses_short_keys_and_runs_that_are_too_long() -> None:
    """Neither gives weaker or missing words."""
    with pytest.raises(ValueError, match="keystream key has 16 bytes"):
        WordStream(bytes(16))
    with pytest.raises(ValueError, match="buffer"):
        WordStream(bytes(32)).fill(memoryview(bytearray(4 * MAX_WORDS + 4)))


def test_words_are_uniform() -> None:
    """Bytes of 2^20 words pass chi-square at a false-alarm rate of 1e-6 (255 degrees: bound 377)."""
    counts = np.bincount(uniform_u32(bytes(31) + b"\1", 1 << 18).view(np.uint8), minlength=256)
    expected = counts.sum() / 256
    assert ((counts - expected) ** 2 / expected).sum() < 377


def test_seeded_streams_repeat_and_differ_by_seed_and_os_streams_do_not_repeat() -> None:
    """Tests can repeat a run; production cannot be made to."""
    assert SeededRng(1).token(64) == SeededRng(1).token(64)
    assert SeededRng(1).token(64) != SeededRng(2).token(64)
    assert OsRng().token(32) != OsRng().token(32)


def test_uniform_floats_lie_in_the_half_open_unit_interval() -> None:
    """Means and bounds of 10^5 draws."""
    draws = uniform_floats(SeededRng("floats"), 100_000)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.005
