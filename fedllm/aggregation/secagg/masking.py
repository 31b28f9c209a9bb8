"""Masks on the ring: AES-256-CTR words added in uint32 lanes, and vectors packed to whole bytes.

2^8, 2^16 and 2^24 divide 2^32, so masks are added modulo 2^32 and only the low bytes are sent: the low bytes of
a uniform word are uniform. Work goes in chunks of 1 MiB, so that a vector of any length needs little memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedllm.errors import DecodeError
from fedllm.rng import uniform_u32

CHUNK_BYTES = 1 << 20
_CHUNK_WORDS = CHUNK_BYTES // 4
_LANE_BYTES = 4


def add_mask(accumulator: NDArray[np.uint32], key: bytes, *, sign: int) -> None:
    """Add (`sign` 1) or subtract (-1) the mask of `key`, in place, modulo 2^32.

    Parameters
    ----------
    accumulator : NDArray[uint32]
        Shape ``(entries,)``.
    key : bytes
        32 bytes; one key, one stream.
    """
    operate = np.add if sign > 0 else np.subtract
    for at in range(0, accumulator.size, _CHUNK_WORDS):
        lanes = accumulator[at : at + _CHUNK_WORDS]
        operate(lanes, uniform_u32(key, lanes.size, offset=at), out=lanes)


def pack(values: NDArray[np.uint32], entry_bytes: int) -> tuple[bytes, ...]:
    """Return the low `entry_bytes` bytes of each value, little endian, in chunks of about 1 MiB.

    A chunk holds whole entries, the least number that fills 1 MiB; only the last one may be smaller.
    """
    count = -(-CHUNK_BYTES // entry_bytes)
    lanes = values.astype("<u4", copy=False).view(np.uint8).reshape(-1, _LANE_BYTES)
    return tuple(lanes[at : at + count, :entry_bytes].tobytes() for at in range(0, values.size, count))


def check_packed(chunks: Sequence[bytes], entries: int, entry_bytes: int) -> None:
    """Return if the chunks are cut as `pack` cuts them; else raise `DecodeError`."""
    count = -(-CHUNK_BYTES // entry_bytes)
    sizes = [entry_bytes * min(count, entries - at) for at in range(0, entries, count)]
    found = [len(chunk) for chunk in chunks]
    if found != sizes:
        raise DecodeError(
            f"packed vector of {len(found)} chunks and {sum(found)} bytes, "
            f"{len(sizes)} chunks and {sum(sizes)} bytes expected"
        )


def add_packed(accumulator: NDArray[np.uint32], chunks: Sequence[bytes], entry_bytes: int) -> None:
    """Add a packed vector, in place, modulo 2^32; the chunks must have passed `check_packed`."""
    at = 0
    for chunk in chunks:
        low = np.frombuffer(chunk, dtype=np.uint8).reshape(-1, entry_bytes)
        lanes = np.zeros((low.shape[0], _LANE_BYTES), dtype=np.uint8)
        lanes[:, :entry_bytes] = low
        accumulator[at : at + low.shape[0]] += lanes.view("<u4").reshape(-1)
        at += low.shape[0]


def reduce_ring(values: NDArray[np.uint32], bits: int) -> NDArray[np.uint32]:
    """Return the values modulo 2^bits."""
    return values & np.uint32((1 << bits) - 1)
