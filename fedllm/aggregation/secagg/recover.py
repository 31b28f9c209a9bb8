"""Opening a shared secret when some of the shares may be wrong, and naming the wrong ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import combinations

from fedllm.aggregation.secagg.shamir import combine, interpolate
from fedllm.errors import IntegrityError

MAX_TRIES = 10_000
"""Subsets tried for one secret: all single and double faults of 128 shares, seconds of work."""


def recover(
    shares: Mapping[int, int], threshold: int, accepted: Callable[[bytes], bool], *, colluders: int
) -> tuple[bytes, tuple[int, ...]]:
    """Return the secret that `accepted` knows, and the points of the shares that are provably wrong.

    A right secret does not prove the shares it came from: holders who collude can choose errors that cancel at
    the secret's own place and put every *other* share off the polynomial. Two polynomials of degree
    ``threshold - 1`` that meet in `threshold` places are one, so with at most `colluders` liars the found
    one is the dealer's if it misses at most ``len(shares) + 1 - threshold - colluders`` shares (the secret
    itself is the one more place). Beyond that nobody is named, so that nobody honest can be framed.

    Parameters
    ----------
    shares : Mapping[int, int]
        Point to share, the most trusted first.
    threshold : int
    accepted : Callable[[bytes], bool]
        Whether a 32-byte candidate is what was committed to.
    colluders : int
        The most owners that the protocol assumes to collude.

    Raises
    ------
    IntegrityError
        If no subset of `threshold` shares gives an accepted secret within `MAX_TRIES`.
    """
    for tries, points in enumerate(_subsets(tuple(shares), threshold)):
        if tries == MAX_TRIES:
            raise IntegrityError(f"{MAX_TRIES} subsets of {len(shares)} shares were tried")
        subset = {x: shares[x] for x in points}
        try:
            secret = combine(subset)
        except IntegrityError:
            continue
        if accepted(secret):
            wrong = tuple(x for x in shares if x not in subset and interpolate(subset, x) != shares[x])
            return secret, wrong if len(wrong) <= len(shares) + 1 - threshold - colluders else ()
    raise IntegrityError(f"no {threshold} of {len(shares)} shares open it")


def _subsets(points: tuple[int, ...], size: int) -> Iterator[tuple[int, ...]]:
    """Yield subsets of `size`, leaving out none, then one, then two of the points: few faults are found early."""
    seen: set[tuple[int, ...]] = set()
    for faults in range(len(points) - size + 1):
        for excluded in combinations(points[: size + faults], faults):
            subset = tuple(x for x in points[: size + faults] if x not in excluded)
            if subset not in seen:
                seen.add(subset)
                yield subset
