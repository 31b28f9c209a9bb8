"""Shamir over 2^256 + 297: known answers, and inputs that have none."""

from __future__ import annotations

import pytest

from fedllm.aggregation.secagg.shamir import (
    PRIME,
    combine,
    interpolate,
    lagrange_row,
    share_from_bytes,
    share_to_bytes,
    split,
)
from fedllm.errors import DecodeError, IntegrityError, ProtocolError
from fedllm.rng import OsRng, SeededRng


def test_the_modulus_is_the_least_prime_above_2_to_256() -> None:
    """Fermat to 20 bases says prime; every smaller candidate fails base 3 (2^256 + 1 passes base 2)."""
    assert all(pow(base, PRIME - 1, PRIME) == 1 for base in range(2, 22))
    assert all(pow(3, n - 1, n) != 1 for n in range(2**256 + 1, PRIME, 2))


def test_known_answers_by_hand() -> None:
    """f(x) = 7 + 5x + 3x²: f(1..4) = 15, 29, 49, 75, and any three give 7."""
    shares = {1: 15, 2: 29, 3: 49, 4: 75}
    for left_out in shares:
        assert combine({x: y for x, y in shares.items() if x != left_out}) == (7).to_bytes(32, "big")
    assert interpolate({x: shares[x] for x in (1, 2, 4)}, 3) == 49


@pytest.mark.parametrize("points", [(1, 2, 3), (7, 2, 30, 1000), tuple(range(5, 60, 3))])
def test_the_fast_row_is_lagranges_formula(points: tuple[int, ...]) -> None:
    """Barycentric weights and one inversion, or product by product by definition: the same row."""
    for at in (0, 4, 999):
        expected = []
        for i in points:
            numerator = denominator = 1
            for j in points:
                if j != i:
                    numerator, denominator = numerator * (at - j), denominator * (i - j)
            expected.append(numerator * pow(denominator, -1, PRIME) % PRIME)
        assert list(lagrange_row(points, at)) == expected


def test_the_largest_secret_survives() -> None:
    """32 bytes of 0xff are below the prime, so every key and seed can be shared."""
    assert combine(split(b"\xff" * 32, 2, [1, 2, 3], OsRng())) == b"\xff" * 32


def test_combining_to_more_than_32_bytes_is_refused() -> None:
    """A field element from 2^256 on is no secret: a share was wrong."""
    with pytest.raises(IntegrityError, match="32-byte secret"):
        combine({1: PRIME - 1, 2: PRIME - 1})


def test_shares_are_spread_over_the_whole_field() -> None:
    """Coefficients use all 257 bits: of 64 shares some lie above 2^256 - 2^255 (missed once in 10^19 runs)."""
    tops = [share >> 255 for seed in range(64) for share in split(bytes(32), 2, [1, 2], SeededRng(seed)).values()]
    assert {0, 1} <= set(tops)


@pytest.mark.parametrize(
    ("secret", "threshold", "points"),
    [
        (bytes(31), 2, [1, 2]),
        (bytes(32), 0, [1, 2]),
        (bytes(32), 3, [1, 2]),
        (bytes(32), 2, [1, 1]),
        (bytes(32), 2, [0, 1]),
    ],
)
def test_unusable_sharings_are_refused(secret: bytes, threshold: int, points: list[int]) -> None:
    """A short secret, an impossible threshold, a doubled point, or the secret's own place."""
    with pytest.raises(ProtocolError):
        split(secret, threshold, points, OsRng())


@pytest.mark.parametrize("data", [b"", bytes(32), bytes(34), PRIME.to_bytes(33, "big"), b"\xff" * 33])
def test_a_share_has_one_form(data: bytes) -> None:
    """33 big-endian bytes below the prime, nothing else."""
    with pytest.raises(DecodeError):
        share_from_bytes(data)
    assert share_from_bytes(share_to_bytes(PRIME - 1)) == PRIME - 1
