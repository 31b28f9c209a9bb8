"""Masks on the ring: AES-256-CTR words added in uint32 lanes, and vectors packed to whole bytes.

2^8, 2^16 and 2^24 divide 2^32, so masks are added modulo 2^32 and only the low bytes are sent: the low bytes of
a uniform word are uniform. The keystream is made in a buffer that stays in the processor's cache; its naive twin
is `fedllm.rng.uniform_u32`, which the tests compare it with.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from fedllm.errors import DecodeError

CHUNK_BYTES = 1 << 20
"""Least size of all but the last chunk of a packed vector."""
_BUFFER_BYTES = 1 << 17
_LANE_BYTES = 4


def add_mask(accumulator: NDArray[np.uint32], key: bytes, *, sign: int) -> None:
    """Add (`sign` 1) or subtract (-1) the mask of `key`, in place, modulo 2^32.

    Parameters
    ----------
    accumulator : NDArray[uint32]
        Shape ``(entries,)``.
    key : bytes
        32 bytes; one key, one stream, from counter zero (see `fedllm.rng.keystream`).
    """
    operate = np.add if sign > 0 else np.subtract
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    zeros = memoryview(bytes(_BUFFER_BYTES))
    buffer = bytearray(_BUFFER_BYTES)
    words = np.frombuffer(buffer, dtype="<u4")
    step = _BUFFER_BYTES // _LANE_BYTES
    for at in range(0, accumulator.size, step):
        lanes = accumulator[at : at + step]
        size = _LANE_BYTES * lanes.size
        stream.update_into(zeros[:size], memoryview(buffer)[:size])
        operate(lanes, words[: lanes.size], out=lanes)


def pack(values: NDArray[np.uint32], entry_bytes: int) -> tuple[bytes, ...]:
    """Return the low `entry_bytes` bytes of each value, little endian, in chunks of about 1 MiB.

    A chunk holds whole entries, the least number that fills 1 MiB; only the last one may be smaller.
    """
    count = -(-CHUNK_BYTES // entry_bytes)
    return tuple(_low_bytes(values[at : at + count], entry_bytes) for at in range(0, values.size, count))


def _low_bytes(values: NDArray[np.uint32], entry_bytes: int) -> bytes:
    if entry_bytes in {1, 2, _LANE_BYTES}:
        return values.astype(f"<u{entry_bytes}").tobytes()  # a cast to a narrower unsigned keeps the low bytes
    lanes = values.astype("<u4", copy=False).view(np.uint8).reshape(-1, _LANE_BYTES)
    low = np.empty((lanes.shape[0], entry_bytes), dtype=np.uint8)
    for place in range(entry_bytes):  # column by column is 6 times as fast as one strided copy
        low[:, place] = lanes[:, place]
    return low.tobytes()


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
        for place in range(entry_bytes):
            lanes[:, place] = low[:, place]
        accumulator[at : at + low.shape[0]] += lanes.view("<u4").reshape(-1)
        at += low.shape[0]


def reduce_ring(values: NDArray[np.uint32], bits: int) -> NDArray[np.uint32]:
    """Return the values modulo 2^bits."""
    return values & np.uint32((1 << bits) - 1)
