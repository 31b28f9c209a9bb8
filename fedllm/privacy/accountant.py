"""Epsilon of a history of mechanisms, by privacy loss distributions.

The ledger of record is kept in PLD accounting (Koskela et al. 2020; Doroshenko et al. 2022, arXiv 2207.04380),
which composes different mechanisms tightly; dp-accounting discretises pessimistically, so the value is an upper
bound. Neighbouring data sets differ by adding or removing one unit. Histories beyond any useful budget are priced by
Renyi accounting (Mironov et al. 2019, arXiv 1908.10530), also an upper bound, whose cost no plan can drive up.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from fedllm.messages.mechanism import Mechanism
from fedllm.privacy.mechanism import load_dp_accounting

_ROUGH = 100.0
"""Above this the fast Renyi bound is good enough: a distribution of such losses would fill the memory."""
_HEAVY = 1000.0
"""Expected loss without sampling from which on that is looked at first."""
_TINY = 1e-2  # below it the square may vanish
_Steps = tuple[tuple[float, float, int], ...]
_pricing = threading.Lock()  # many owners of one simulation ask for the same price at once: it is worked out once


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
    priced = tuple(sorted((noise, rate, count) for (noise, rate), count in steps.items()))
    with _pricing:
        return _epsilon(priced, delta, interval)


@lru_cache(maxsize=1024)
def _epsilon(steps: _Steps, delta: float, interval: float) -> float:
    if not steps:
        return 0.0
    dp = load_dp_accounting()
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    relation = dp.NeighboringRelation.ADD_OR_REMOVE_ONE
    if any(noise < _TINY for noise, _, _ in steps) or sum(n / (2 * noise * noise) for noise, _, n in steps) > _HEAVY:
        rough = _compose(RdpAccountant(neighboring_relation=relation), steps, delta)
        if not rough <= _ROUGH:
            return rough if rough > _ROUGH else math.inf
    return _compose(PLDAccountant(relation, interval), steps, delta)


def _compose(accountant: Any, steps: _Steps, delta: float) -> float:
    dp = load_dp_accounting()
    for noise_multiplier, sample_rate, count in steps:
        event = dp.PoissonSampledDpEvent(sample_rate, dp.GaussianDpEvent(noise_multiplier))
        accountant.compose(event, count)
    return float(accountant.get_epsilon(delta))
