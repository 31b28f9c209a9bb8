"""Randomness as a port: OS entropy, a seeded twin for tests, and the AES-256-CTR keystream of the masks.

`OsRng` is the only source for keys, nonces, masks and privacy noise. `SeededRng` is AES-256-CTR keyed by
SHA-256 of a label, so tests repeat bit for bit on every platform; it must never reach production code paths
(the composition roots construct `OsRng`).
"""

from __future__ import annotations

import hashlib
import os
from typing import Protocol

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

KEY_BYTES = 32
BYTES_PER_WORD = 4
MAX_WORDS = 1 << 16
"""Most words that `WordStream.fill` makes in one call."""
_BLOCK_BYTES = 16
_ZEROS = memoryview(bytes(BYTES_PER_WORD * MAX_WORDS))


class Rng(Protocol):
    """A source of uniform random bytes."""

    def token(self, size: int) -> bytes:
        """Return `size` uniform random bytes."""


class OsRng:
    """The operating system's CSPRNG."""

    def token(self, size: int) -> bytes:
        """Return `size` bytes from ``os.urandom``."""
        return os.urandom(size)


class SeededRng:
    """A repeatable stream for tests and simulations; never for keys that protect anyone.

    Parameters
    ----------
    seed : int or str
        Hashed to a 256-bit AES key.
    """

    def __init__(self, seed: int | str) -> None:
        key = hashlib.sha256(f"fedllm/seeded-rng:{seed}".encode()).digest()
        self._stream = Cipher(algorithms.AES(key), modes.CTR(bytes(_BLOCK_BYTES))).encryptor()

    def token(self, size: int) -> bytes:
        """Return the next `size` bytes of the stream."""
        return self._stream.update(bytes(size))


def keystream(key: bytes, size: int, *, offset: int = 0) -> bytes:
    """Return `size` bytes of the AES-256-CTR keystream of `key`, from byte `offset` on.

    The counter starts at zero: a key must be used for one stream only (NIST SP 800-38A §6.5), which holds
    because every mask seed is derived for one pair, one sum and one round.

    Parameters
    ----------
    key : bytes
        32 bytes.
    size : int
        Bytes wanted.
    offset : int
        Position of the first byte; a multiple of 16, so that chunks can be made independently.

    Raises
    ------
    ValueError
        If the key is not 32 bytes or the offset is not on a block.
    """
    if len(key) != KEY_BYTES:
        raise ValueError(f"keystream key has {len(key)} bytes, {KEY_BYTES} needed")
    if offset % _BLOCK_BYTES:
        raise ValueError(f"keystream offset {offset} is not a multiple of {_BLOCK_BYTES}")
    counter = (offset // _BLOCK_BYTES).to_bytes(_BLOCK_BYTES, "big")
    return Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor().update(bytes(size))


def uniform_u32(key: bytes, count: int, *, offset: int = 0) -> NDArray[np.uint32]:
    """Return `count` uniform 32-bit words of `key`'s keystream, little endian, from word `offset` on."""
    data = keystream(key, 4 * count, offset=4 * offset)
    return np.frombuffer(data, dtype="<u4").astype(np.uint32, copy=False)


class WordStream:
    """The words of `uniform_u32`, made into a caller's buffer run after run, on one cipher context.

    Parameters
    ----------
    key : bytes
        32 bytes (see `keystream`).
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"keystream key has {len(key)} bytes, {KEY_BYTES} needed")
        self._update = Cipher(algorithms.AES(key), modes.CTR(bytes(_BLOCK_BYTES))).encryptor().update_into

    def fill(self, out: memoryview) -> None:
        """Write the next ``len(out) / 4`` words, little endian; at most `MAX_WORDS` (else `ValueError`)."""
        if len(out) > len(_ZEROS):
            raise ValueError(f"a buffer of {len(out)} bytes, {len(_ZEROS)} at most")
        self._update(_ZEROS[: len(out)], out)


def uniform_floats(rng: Rng, count: int) -> NDArray[np.float64]:
    """Return `count` float64 drawn uniformly from the 2^53 multiples of 2^-53 in [0, 1)."""
    words = np.frombuffer(rng.token(8 * count), dtype="<u8")
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
