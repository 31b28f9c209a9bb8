"""The noise that spends a given budget, solved with the ledger's own accountant."""

from __future__ import annotations

import math

from fedllm.errors import ConfigError
from fedllm.messages.mechanism import RELATION_ADD_REMOVE, UNIT_RECORD, Mechanism
from fedllm.privacy.accountant import INTERVAL
from fedllm.privacy.accountant import epsilon as spent_epsilon

_TOLERANCE = 1e-3
_SMALLEST = 0.1
_LARGEST = 4096.0
_STRIDE = 1.25


def noise_multiplier(*, epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    """Return the smallest noise multiplier (to 0.001) whose `steps` sampled steps spend at most `epsilon`.

    Epsilon falls as noise rises, so bisection finds it. The value returned was priced with the ledger's own
    accounting: the ledger never charges more than `epsilon` for it.

    Parameters
    ----------
    epsilon, delta : float
        The whole budget.
    sample_rate : float
        Poisson probability of a record in a step.
    steps : int
        Noisy steps over all rounds together.

    Raises
    ------
    ConfigError
        If the numbers are out of range, or no noise multiplier up to 4096 is enough.
    """
    if not (epsilon > 0 and 0 < delta < 1 and 0 < sample_rate <= 1 and steps >= 1):
        raise ConfigError(
            f"epsilon {epsilon:g}, delta {delta:g}, sample rate {sample_rate:g}, steps {steps}: epsilon must be"
            " positive, delta in (0, 1), sample rate in (0, 1], steps at least 1"
        )

    def spends(noise: float, interval: float = INTERVAL) -> float:
        mechanism = Mechanism("dp-sgd", UNIT_RECORD, RELATION_ADD_REMOVE, noise, 1.0, sample_rate, steps, delta)
        return spent_epsilon([mechanism], delta, interval=interval)

    # Search with coarse accounting, which is fast and only ever too pessimistic, then finish with the ledger's.
    coarse = 10 * INTERVAL
    low, high = 1 / _STRIDE, 1.0
    while spends(high, coarse) > epsilon:
        low, high = high, 2 * high
        if high > _LARGEST:
            raise ConfigError(
                f"epsilon {epsilon:g} at delta {delta:g}, {steps} steps: no noise multiplier to {_LARGEST:g} suffices",
                hint="raise epsilon, take fewer steps or a lower sample rate",
            )
    while high > _SMALLEST and spends(low, coarse) <= epsilon:
        low, high = low / _STRIDE, low  # small strides: pricing tiny noise is what takes long
    while high - low > _TOLERANCE / 2:
        middle = (low + high) / 2
        low, high = (low, middle) if spends(middle, coarse) <= epsilon else (middle, high)
    found = math.ceil(high / _TOLERANCE) * _TOLERANCE
    while spends(found) > epsilon:
        found += _TOLERANCE
    while found > 2 * _TOLERANCE and spends(found - _TOLERANCE) <= epsilon:
        found -= _TOLERANCE
    return round(found, 6)
