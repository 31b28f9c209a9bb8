"""Whom an owner deals its shares to: all others, or k peers that it picks itself; and which (k, t) is safe.

Up to `COMPLETE_UP_TO` owners the graph is complete. Above, a holder is corrupt, or lost, by chance: of the n - 1
others ``floor(rate * n)`` are, and an owner's k picks are drawn from them without replacement. What an owner dealt
stays secret as long as fewer than 2t - k of its holders collude: each honest one gives one kind of share, so both
kinds need 2t of k + corrupt. The sum opens as long as no more than k - t of them are lost (Bell et al. 2020, eprint
2020/704, with the bound of a malicious coordinator).

Picks are drawn from the cohort that the plan names, not from those who advertised keys: a coordinator that leaves
honest owners out of that list loses holders, and does not raise the share of corrupt ones among the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from fedllm.errors import ThresholdRefused
from fedllm.ids import OwnerId
from fedllm.messages.plan import honest_threshold
from fedllm.rng import Rng

COMPLETE_UP_TO = 128
"""Largest cohort that is connected completely; 127 masks are cheaper there than a graph's worth of doubt."""
PRIVACY_BITS = 40
"""Odds that any owner's two kinds of share can meet: 2^-40."""
ABORT_BITS = 20
"""Odds that any owner's secrets cannot be opened at the planned dropout: 2^-20."""
_WORD_BYTES = 4


@dataclass(frozen=True)
class Graph:
    """How secrets are shared.

    Attributes
    ----------
    neighbours : int
        Peers k that an owner deals to; n - 1 on the complete graph, where it keeps a share itself, too.
    threshold : int
        Shares t that open a secret.
    """

    neighbours: int
    threshold: int


def parameters(owners: int, corruption: float, dropout: float) -> Graph:
    """Return the graph of a cohort: complete up to `COMPLETE_UP_TO` owners, else the least that `search` finds.

    Where it finds none, the complete graph is left, which stands a third of corrupt owners, and more with a larger t.
    """
    if owners > COMPLETE_UP_TO:
        found = search(owners, corruption, dropout)
        if found is not None:
            return found
    return Graph(owners - 1, _complete_threshold(owners, corruption))


@cache
def search(owners: int, corruption: float, dropout: float) -> Graph | None:
    """Return the least k below ``owners - 1`` that is safe and does not abort, with the least safe t; else None.

    The least t that keeps the two kinds of share apart is the best one: it leaves the most room for losses.
    """
    corrupt, dead = math.floor(corruption * owners), math.floor(dropout * owners)
    least = 1  # the fewest corrupt holders that are too improbable; never falls as k grows
    for k in range(1, owners - 1):
        while not _improbable(owners, corrupt, k, least, PRIVACY_BITS):
            least += 1
        t = max((k + least + 1) // 2, k // 2 + 1)  # 2t - k >= least
        if t <= k and _improbable(owners, dead, k, k - t + 1, ABORT_BITS):
            return Graph(k, t)
    return None


def check(owners: int, neighbours: int, threshold: int, corruption: float, dropout: float) -> None:
    """Return if k and t keep an owner's secrets secret at the rate of corruption; the odds of an abort are not asked.

    A cohort of up to `COMPLETE_UP_TO` must be connected completely: 5 % of four owners are none, and nothing would
    be left of the bound.

    Parameters
    ----------
    owners : int
        Size n of the cohort.
    neighbours, threshold : int
        k and t of the plan.
    corruption, dropout : float
        Shares of the cohort, in [0, 1).

    Raises
    ------
    ThresholdRefused
    """
    if not (0 <= corruption < 1 and 0 <= dropout < 1):
        raise ThresholdRefused(f"corruption {corruption} and dropout {dropout}: shares of the cohort, in [0, 1)")
    if neighbours == owners - 1:
        least = _complete_threshold(owners, corruption)
        if not least <= threshold <= owners:
            raise ThresholdRefused(
                f"the plan's threshold is {threshold} of {owners} owners, {least} to {owners} allowed"
            )
        return
    if owners <= COMPLETE_UP_TO or not 1 <= threshold <= neighbours < owners - 1:
        raise ThresholdRefused(
            f"the plan's threshold is {threshold} of {neighbours} neighbours among {owners} owners: up to "
            f"{COMPLETE_UP_TO} everybody is one, above that at most {owners - 1}, and the threshold is among them"
        )
    corrupt = math.floor(corruption * owners)
    least = 2 * threshold - neighbours
    if least < 1 or not _improbable(owners, corrupt, neighbours, least, PRIVACY_BITS):
        raise ThresholdRefused(
            f"the plan's threshold {threshold} of {neighbours} neighbours does not keep the secrets of {owners} owners "
            f"apart from {corrupt} who collude, with odds of 2^-{PRIVACY_BITS}",
            hint="the coordinator takes k and t from fedllm.aggregation.secagg.graph.parameters",
        )


def pick(candidates: Sequence[OwnerId], k: int, rng: Rng) -> tuple[OwnerId, ...]:
    """Return k of the candidates, sorted; every choice of k is equally likely.

    The first k places of a Fisher-Yates shuffle, each drawn without modulo bias.
    """
    if not 0 <= k <= len(candidates):
        raise ThresholdRefused(f"{k} neighbours of {len(candidates)} peers cannot be picked")
    if k == len(candidates):
        return tuple(sorted(candidates))
    pool = list(candidates)
    for place in range(k):
        other = place + _below(len(pool) - place, rng)
        pool[place], pool[other] = pool[other], pool[place]
    return tuple(sorted(pool[:k]))


def _below(bound: int, rng: Rng) -> int:
    """Return a uniform integer in ``[0, bound)``, by rejection."""
    span = 1 << (8 * _WORD_BYTES)
    limit = span - span % bound
    while True:
        draw = int.from_bytes(rng.token(_WORD_BYTES), "big")
        if draw < limit:
            return draw % bound


def _complete_threshold(owners: int, corruption: float) -> int:
    """Return the least t of n with own shares kept: 2t > n + corrupt, and never below that for n/3 corrupt."""
    return max(honest_threshold(owners), (owners + math.floor(corruption * owners)) // 2 + 1)


def _improbable(owners: int, marked: int, drawn: int, least: int, bits: int) -> bool:
    """Whether ``n * P[at least `least` of `drawn` picks are marked] <= 2^-bits``; hypergeometric, n - 1 others."""
    others = owners - 1
    # lgamma errs by a part in 10^9 of the tail: two platforms would disagree on a plan only if its tail came that
    # close to the bound.
    return math.log2(owners) + _log2_tail(others, min(marked, others), drawn, least) <= -bits


def _log2_tail(population: int, marked: int, drawn: int, least: int) -> float:
    """Return log2 P[X >= least] of a hypergeometric X: the first term by lgamma, the others by their ratio."""
    lowest, highest = max(0, drawn - (population - marked)), min(marked, drawn)
    if least <= lowest:
        return 0.0
    if least > highest:
        return -math.inf
    total = term = 1.0
    for x in range(least, highest):
        term *= (marked - x) * (drawn - x) / ((x + 1) * (population - marked - drawn + x + 1))
        total += term
        # Terms may rise before they fall; past the mode each is smaller than the one before.
        if term < total * 1e-18:
            break
    first = _ln_choose(marked, least) + _ln_choose(population - marked, drawn - least) - _ln_choose(population, drawn)
    return (first + math.log(total)) / math.log(2)


def _ln_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
