"""Epsilon of a history of mechanisms, by privacy loss distributions.

The ledger of record is kept in PLD accounting (Koskela et al. 2020; Doroshenko et al. 2022, arXiv 2207.04380),
which composes different mechanisms tightly; dp-accounting discretises pessimistically, so the value is an upper
bound. Neighbouring data sets differ by adding or removing one unit.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from fedllm.messages.plan import Mechanism
from fedllm.privacy.mechanism import load_dp_accounting

_Steps = tuple[tuple[float, float, int], ...]


INTERVAL = 1e-4
"""Width of the discretised privacy losses that the ledger counts with."""


def epsilon(history: Sequence[Mechanism], delta: float, *, interval: float = INTERVAL) -> float:
    """Return the epsilon that all of `history` together spends at `delta`.

    Parameters
    ----------
    history : Sequence[Mechanism]
        Every mechanism ever run on one data set, in any order.
    delta : float
        In (0, 1). The deltas that the mechanisms name are not added up: one delta covers the composition.
    interval : float
        Width of discretised privacy losses; a wider one is faster and gives a larger (still valid) epsilon.

    Returns
    -------
    float
        0 for an empty history, ``inf`` if any round had no mechanism.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta {delta}: between 0 and 1 needed")
    if any(mechanism.kind == "none" for mechanism in history):
        return math.inf
    steps: Counter[tuple[float, float]] = Counter()
    for mechanism in history:
        # The clip norm cancels: the noise multiplier is noise over sensitivity.
        steps[mechanism.noise_multiplier, mechanism.sample_rate] += mechanism.steps
    return _epsilon(tuple(sorted((noise, rate, count) for (noise, rate), count in steps.items())), delta, interval)


@lru_cache(maxsize=1024)
def _epsilon(steps: _Steps, delta: float, interval: float) -> float:
    if not steps:
        return 0.0
    dp = load_dp_accounting()
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(dp.NeighboringRelation.ADD_OR_REMOVE_ONE, interval)
    for noise_multiplier, sample_rate, count in steps:
        event = dp.PoissonSampledDpEvent(sample_rate, dp.GaussianDpEvent(noise_multiplier))
        accountant.compose(event, count)
    return float(accountant.get_epsilon(delta))
