"""Masks on the ring: AES-256-CTR words added in uint32 lanes, and vectors packed to whole bytes, in chunks.

2^8, 2^16 and 2^24 divide 2^32, so masks are added modulo 2^32 and only the low bytes are sent: the low bytes of
a uniform word are uniform. All masks are added to one block of the vector before the next block is touched, so that
the block, and the words that are added to it, stay in the processor's cache. The naive twins are in the tests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedllm.errors import DecodeError, DigestMismatch
from fedllm.messages.secagg import MaskedVector
from fedllm.rng import BYTES_PER_WORD, MAX_WORDS, WordStream

U32 = NDArray[np.uint32]
Mask = tuple[bytes, int]
"""Key and sign (1 or -1) of one mask; one key, one stream, from counter zero (see `fedllm.rng.keystream`)."""

CHUNK_BYTES = 1 << 20
"""Least size of all but the last chunk of a packed vector."""
BLOCK = MAX_WORDS // 2
"""Entries that all masks are added to before the next ones: 128 KiB."""
_STREAMS = 256
"""Cipher contexts open at a time where there may be one for each owner: bounds memory, not the count of masks."""


class MaskedInput(NamedTuple):
    """What an owner sends in place of its vector.

    Attributes
    ----------
    head : MaskedVector
        Names the chunks by digest.
    chunks : tuple[bytes, ...]
        The packed vector.
    """

    head: MaskedVector
    chunks: tuple[bytes, ...]


class _Masks:
    """Open streams of some masks, which go over a vector together, block after block."""

    def __init__(self, masks: Sequence[Mask]) -> None:
        self._plus = [WordStream(key) for key, sign in masks if sign > 0]
        self._minus = [WordStream(key) for key, sign in masks if sign < 0]
        buffer = bytearray(BYTES_PER_WORD * BLOCK)
        self._bytes, self._words = memoryview(buffer), np.frombuffer(buffer, dtype="<u4")

    def add_to(self, lanes: U32) -> None:
        """Add the next words of every mask to the next lanes, `BLOCK` at most, in place."""
        raw, words = self._bytes[: BYTES_PER_WORD * lanes.size], self._words[: lanes.size]
        for stream in self._plus:
            stream.fill(raw)
            np.add(lanes, words, out=lanes)
        for stream in self._minus:
            stream.fill(raw)
            np.subtract(lanes, words, out=lanes)


def add_masks(accumulator: U32, masks: Sequence[Mask]) -> None:
    """Add the masks, in place, modulo 2^32.

    Parameters
    ----------
    accumulator : NDArray[uint32]
        Shape ``(entries,)``.
    masks : Sequence[Mask]
        32-byte keys, and signs.
    """
    for first in range(0, len(masks), _STREAMS):
        batch = _Masks(masks[first : first + _STREAMS])
        for at in range(0, accumulator.size, BLOCK):
            batch.add_to(accumulator[at : at + BLOCK])


def mask_and_pack(values: U32, masks: Sequence[Mask], entry_bytes: int) -> tuple[bytes, ...]:
    """Return the values under the masks: the low `entry_bytes` bytes of each sum, little endian, in chunks.

    The values are left as they are, and are never held masked but not yet packed beyond one block.

    Parameters
    ----------
    values : NDArray[uint32]
        Shape ``(entries,)``.
    masks : Sequence[Mask]
    entry_bytes : int
        1 to 4.
    """
    streams = _Masks(masks)
    lanes = np.empty(BLOCK, dtype="<u4")
    cuts = _cuts(values.size, entry_bytes)
    packed = np.empty((max((stop - start for start, stop in cuts), default=0), entry_bytes), dtype=np.uint8)
    chunks: list[bytes] = []
    for start, stop in cuts:
        for at in range(start, stop, BLOCK):
            block = lanes[: min(BLOCK, stop - at)]
            block[:] = values[at : at + block.size]
            streams.add_to(block)
            _store_low_bytes(packed[at - start : at - start + block.size], block)
        chunks.append(packed[: stop - start].tobytes())
    return tuple(chunks)


def digests_of(chunks: Sequence[bytes]) -> tuple[bytes, ...]:
    """Return the SHA-256 of each chunk."""
    return tuple(hashlib.sha256(chunk).digest() for chunk in chunks)


def check_chunks(head: MaskedVector, chunks: Sequence[bytes]) -> None:
    """Return if the chunks are cut as `mask_and_pack` cuts them, and are the ones that the head names.

    Raises
    ------
    DecodeError
        If the head names another number of chunks: whoever signed it is wrong.
    DigestMismatch
        If a chunk is missing, too many, or not what the head says: it may have been changed on the way.
    """
    sizes = [head.entry_bytes * (stop - start) for start, stop in _cuts(head.entries, head.entry_bytes)]
    found = [len(chunk) for chunk in chunks]
    if len(head.chunks) != len(sizes):
        raise DecodeError(f"a masked vector's head names {len(head.chunks)} chunks, {len(sizes)} expected")
    if found != sizes:
        raise DigestMismatch(
            f"packed vector of {len(found)} chunks and {sum(found)} bytes, "
            f"{len(sizes)} chunks and {sum(sizes)} bytes expected"
        )
    for index, (chunk, digest) in enumerate(zip(chunks, head.chunks, strict=True)):
        if hashlib.sha256(chunk).digest() != digest:
            raise DigestMismatch(f"chunk {index} of the masked vector of {head.owner!r} is not the one its head names")


def add_packed(accumulator: U32, chunks: Sequence[bytes], entry_bytes: int) -> None:
    """Add a packed vector, in place, modulo 2^32; the chunks must have passed `check_chunks`."""
    lanes = np.zeros((BLOCK, BYTES_PER_WORD), dtype=np.uint8)
    words = lanes.view("<u4").reshape(-1)
    done = 0
    for chunk in chunks:
        low = np.frombuffer(chunk, dtype=np.uint8).reshape(-1, entry_bytes)
        for at in range(0, low.shape[0], BLOCK):
            block = low[at : at + BLOCK]
            for place in range(entry_bytes):  # column by column is 5 times as fast as one strided copy
                lanes[: block.shape[0], place] = block[:, place]
            accumulator[done : done + block.shape[0]] += words[: block.shape[0]]
            done += block.shape[0]


def reduce_ring(values: U32, bits: int) -> U32:
    """Reduce the values modulo 2^bits, in place, and return them."""
    values &= np.uint32((1 << bits) - 1)
    return values


def _cuts(entries: int, entry_bytes: int) -> list[tuple[int, int]]:
    """Return first and last (exclusive) entry of each chunk: whole entries, the least number that fills 1 MiB."""
    count = -(-CHUNK_BYTES // entry_bytes)
    return [(start, min(start + count, entries)) for start in range(0, entries, count)]


def _store_low_bytes(out: NDArray[np.uint8], lanes: U32) -> None:
    low = lanes.view(np.uint8).reshape(-1, BYTES_PER_WORD)
    for place in range(out.shape[1]):
        out[:, place] = low[:, place]
