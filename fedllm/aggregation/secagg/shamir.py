"""Shamir's t-of-n sharing of a 32-byte secret over the prime 2^256 + 297 (Shamir 1979).

The prime is the least above 2^256, so that every 32-byte string is a field element and a share takes 33 bytes.
Python integers are not constant time; the sharer and the combiner of a secret are allowed to know it, and
nobody else can time them closely, which is what makes that acceptable here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

from fedllm.errors import DecodeError, IntegrityError, ProtocolError
from fedllm.rng import Rng

PRIME = 2**256 + 297
SECRET_BYTES = 32
SHARE_BYTES = 33
_TOP_BITS_UNUSED = 7  # 33 bytes hold 264 bits, a field element has 257


def split(secret: bytes, threshold: int, points: Sequence[int], rng: Rng) -> dict[int, int]:
    """Return one share for each point; any `threshold` of them give the secret, fewer give nothing.

    Parameters
    ----------
    secret : bytes
        32 bytes.
    threshold : int
        1 to ``len(points)``.
    points : Sequence[int]
        Distinct, from 1 on; 0 is the secret's own place.
    rng : Rng
        Draws the ``threshold - 1`` coefficients.

    Raises
    ------
    ProtocolError
        If secret, threshold or points are out of range.
    """
    if len(secret) != SECRET_BYTES:
        raise ProtocolError(f"a secret of {len(secret)} bytes cannot be shared, {SECRET_BYTES} needed")
    if not 1 <= threshold <= len(points):
        raise ProtocolError(f"threshold {threshold} of {len(points)} shares: 1 to {len(points)} allowed")
    if len(set(points)) != len(points) or not all(0 < x < PRIME for x in points):
        raise ProtocolError("share points must be distinct and positive")
    coefficients = [_element(rng) for _ in range(threshold - 1)] + [int.from_bytes(secret, "big")]
    shares: dict[int, int] = {}
    for x in points:
        y = 0
        for coefficient in coefficients:  # Horner, highest power first
            y = (y * x + coefficient) % PRIME
        shares[x] = y
    return shares


def interpolate(shares: Mapping[int, int], at: int) -> int:
    """Return the value at `at` of the least polynomial through the shares (Lagrange); `at` is none of their points."""
    row = lagrange_row(tuple(shares), at)
    return sum(weight * share for weight, share in zip(row, shares.values(), strict=True)) % PRIME


@lru_cache(maxsize=256)
def lagrange_row(points: tuple[int, ...], at: int) -> tuple[int, ...]:
    """Return what the shares at `points` are multiplied with to give the value at `at`.

    One row serves every secret that has the same holders.
    """
    weights = _weights(points)
    product = math.prod(at - x for x in points)
    return tuple(product * weight * _inverse(at - x) % PRIME for x, weight in zip(points, weights, strict=True))


@lru_cache(maxsize=64)
def _weights(points: tuple[int, ...]) -> tuple[int, ...]:
    """Return the barycentric weights ``1 / prod(x - y)``, with one inversion for all of them (Montgomery's trick)."""
    denominators = [math.prod(x - y for y in points if y != x) for x in points]
    running, before = 1, []
    for denominator in denominators:
        before.append(running)
        running = running * denominator % PRIME
    inverse = pow(running, -1, PRIME)
    weights: list[int] = []
    for denominator, product in zip(reversed(denominators), reversed(before), strict=True):
        weights.append(inverse * product % PRIME)
        inverse = inverse * denominator % PRIME
    return tuple(reversed(weights))


@lru_cache(maxsize=1 << 14)
def _inverse(difference: int) -> int:
    """Return the inverse of the difference of two points; there are as many as owners."""
    return pow(difference, -1, PRIME)


def combine(shares: Mapping[int, int]) -> bytes:
    """Return the 32-byte secret of exactly threshold many shares.

    Raises
    ------
    IntegrityError
        If the shares meet in a value that is no 32-byte string: at least one is wrong.
    """
    secret = interpolate(shares, 0)
    if secret >> (8 * SECRET_BYTES):
        raise IntegrityError("the shares do not combine to a 32-byte secret")
    return secret.to_bytes(SECRET_BYTES, "big")


def share_to_bytes(share: int) -> bytes:
    """Return the 33 big-endian bytes of a share."""
    return share.to_bytes(SHARE_BYTES, "big")


def share_from_bytes(data: bytes) -> int:
    """Return a share; raise `DecodeError` if `data` is not the 33-byte form of a field element."""
    if len(data) != SHARE_BYTES:
        raise DecodeError(f"share of {len(data)} bytes, {SHARE_BYTES} expected")
    share = int.from_bytes(data, "big")
    if share >= PRIME:
        raise DecodeError("share is not reduced modulo 2^256 + 297")
    return share


def _element(rng: Rng) -> int:
    """Return a uniform field element by rejection; half of the draws are kept."""
    while True:
        draw = int.from_bytes(rng.token(SHARE_BYTES), "big") >> _TOP_BITS_UNUSED
        if draw < PRIME:
            return draw
