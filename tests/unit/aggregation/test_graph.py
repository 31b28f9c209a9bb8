"""Whom to share with: the published table, the bound that owners enforce, and picks without bias."""

from __future__ import annotations

import time
from itertools import combinations

import numpy as np
import pytest
from scipy import stats

from fedllm.aggregation.secagg import graph
from fedllm.aggregation.secagg.graph import COMPLETE_UP_TO, Graph, check, parameters, pick, search
from fedllm.errors import ThresholdRefused
from fedllm.ids import OwnerId
from fedllm.messages.plan import honest_threshold
from fedllm.rng import OsRng, Rng

OWNERS = (64, 100, 200, 1000, 5000)
TABLE = {
    (0.05, 0.05): [(10, 7), (16, 11), (29, 20), (51, 36), (58, 41)],
    (0.10, 0.10): [(19, 13), (31, 21), (55, 38), (95, 66), (115, 80)],
    (0.33, 0.10): [(34, 28), (54, 44), (98, 78), (216, 169), (286, 223)],
}
"""Least k and its best t against a malicious coordinator, by corruption and dropout, for `OWNERS`."""
ROWS = [(n, rates, k, t) for rates, row in TABLE.items() for n, (k, t) in zip(OWNERS, row, strict=True)]
FALSE_ALARM = 1e-6


@pytest.mark.parametrize(("n", "rates", "k", "t"), ROWS)
def test_the_search_gives_the_table(n: int, rates: tuple[float, float], k: int, t: int) -> None:
    """Counts are floor(rate * n), drawn from the n - 1 others; the smallest k, and the smallest t for it."""
    assert search(n, *rates) == Graph(k, t)


@pytest.mark.parametrize(("n", "rates", "k", "t"), ROWS)
def test_owners_accept_the_table_and_nothing_below(
    n: int, rates: tuple[float, float], k: int, t: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planned (k, t) passes; one share less is refused."""
    monkeypatch.setattr(graph, "COMPLETE_UP_TO", 0)
    check(n, k, t, *rates)
    with pytest.raises(ThresholdRefused, match="does not keep the secrets"):
        check(n, k, t - 1, *rates)
    check(n, k, t, rates[0], 0.99)  # the odds of an abort are the coordinator's business


@pytest.mark.parametrize(("n", "rates"), [(200, (0.05, 0.05)), (1000, (0.1, 0.1)), (1000, (0.33, 0.1))])
def test_the_tails_are_those_of_scipy(n: int, rates: tuple[float, float]) -> None:
    """Privacy and abort of the found graph hold by scipy's hypergeometric law, and fail for one neighbour less."""

    def holds(k: int, t: int) -> bool:
        corrupt, dead = (stats.hypergeom(n - 1, int(rate * n), k) for rate in rates)
        return bool(n * corrupt.sf(2 * t - k - 1) <= 2**-40 and n * dead.sf(k - t) <= 2**-20)

    found = search(n, *rates)
    assert found is not None
    assert holds(found.neighbours, found.threshold)
    assert not any(holds(found.neighbours - 1, t) for t in range(1, found.neighbours))


@pytest.mark.parametrize("n", [3, 4, 100, COMPLETE_UP_TO])
def test_small_cohorts_are_connected_completely(n: int) -> None:
    """Up to 128 owners: k = n - 1, and t of n since each keeps a share."""
    assert parameters(n, 0.05, 0.05) == Graph(n - 1, honest_threshold(n))
    check(n, n - 1, honest_threshold(n), 1 / 3, 0.0)
    for t in (honest_threshold(n) - 1, n + 1):
        with pytest.raises(ThresholdRefused, match=f"threshold is {t} of {n} owners"):
            check(n, n - 1, t, 0.0, 0.0)


def test_large_cohorts_take_the_search_or_else_everybody() -> None:
    """Above 128 the least graph; where none withstands the rates, the complete one, whose rule is the same there."""
    assert parameters(129, 0.05, 0.05) == search(129, 0.05, 0.05)
    assert parameters(200, 0.33, 0.45) == Graph(199, honest_threshold(200))
    check(200, 199, honest_threshold(200), 0.33, 0.45)
    with pytest.raises(ThresholdRefused):
        check(200, 199, honest_threshold(200) - 1, 0.05, 0.05)


def test_more_corruption_than_a_third_needs_more_shares() -> None:
    """The rule 2t > n + corrupt goes on above a third, up to everybody's share."""
    assert parameters(100, 0.5, 0.0).threshold == 76
    assert parameters(10, 0.95, 0.0).threshold == 10
    with pytest.raises(ThresholdRefused, match="threshold is 67 of 100"):
        check(100, 99, 67, 0.5, 0.0)


@pytest.mark.parametrize(("k", "t"), [(0, 0), (10, 0), (10, 11), (200, 150), (-1, 1)])
def test_graphs_that_are_none_are_refused(k: int, t: int) -> None:
    """T lies in 1 to k, and k below n."""
    with pytest.raises(ThresholdRefused):
        check(200, k, t, 0.0, 0.0)


def test_a_half_and_less_is_refused_even_without_corruption() -> None:
    """With t at most k/2 the coordinator splits honest holders into two halves; with one more it cannot."""
    with pytest.raises(ThresholdRefused):
        check(200, 6, 3, 0.0, 0.0)
    check(200, 6, 4, 0.0, 0.0)


@pytest.mark.parametrize("n", [4, 64, COMPLETE_UP_TO])
def test_a_small_cohort_on_a_sparse_graph_is_refused(n: int) -> None:
    """Rates are rounded down to whole owners: of four, five per cent are none, and one peer would be enough."""
    for k, t in ((1, 1), (2, 2), (n - 2, n - 2)):
        with pytest.raises(ThresholdRefused, match=f"among {n} owners: up to 128 everybody is one"):
            check(n, k, t, 0.05, 0.05)


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_rates_are_shares(rate: float) -> None:
    """Neither rate may be negative, everybody, or no number."""
    for rates in ((rate, 0.0), (0.0, rate)):
        with pytest.raises(ThresholdRefused, match="shares of the cohort"):
            check(200, 100, 90, *rates)


def test_the_search_is_fast() -> None:
    """Five thousand owners at rates that need thousands of neighbours: below two seconds of CPU."""
    graph.search.cache_clear()
    start = time.process_time()
    assert search(5000, 0.33, 0.3) is not None
    assert time.process_time() - start < 2


def test_every_subset_is_picked_equally_often() -> None:
    """Chi-square over the 35 subsets of 3 of 7, 35,000 draws, false alarm 1e-6."""
    names = [OwnerId(f"o{i}") for i in range(7)]
    counts = dict.fromkeys(combinations(names, 3), 0)
    rng = OsRng()
    for _ in range(35_000):
        counts[pick(names, 3, rng)] += 1  # type: ignore[index]
    assert stats.chisquare(np.array(list(counts.values()))).pvalue > FALSE_ALARM


class Words(Rng):
    """Gives the words it was given."""

    def __init__(self, *words: int) -> None:
        self._words = list(words)

    def token(self, size: int) -> bytes:
        """Return the next word."""
        return self._words.pop(0).to_bytes(size, "big")


def test_a_word_beyond_the_last_whole_multiple_is_drawn_again() -> None:
    """2^32 is no multiple of 3: its last word would make the first candidate likelier, so it is rejected."""
    names = [OwnerId(name) for name in "abc"]
    assert pick(names, 1, Words(2**32 - 1, 5)) == ("c",)
    assert pick(names, 1, Words(2**32 - 2)) == ("c",)


def test_more_picks_than_peers_are_refused() -> None:
    """Four of three cannot be picked."""
    with pytest.raises(ThresholdRefused, match="4 neighbours of 3 peers"):
        pick([OwnerId(name) for name in "abc"], 4, OsRng())
