"""The noise that spends a given budget, solved with the ledger's own accountant, and how much signal it leaves."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from fedllm.errors import ConfigError
from fedllm.messages.mechanism import DP_SGD, RELATION_ADD_REMOVE, UNIT_RECORD, AdaptiveClip, Mechanism
from fedllm.privacy.accountant import INTERVAL, rdp_epsilon
from fedllm.privacy.accountant import epsilon as spent_epsilon

_GRID = 1000
"""Noise multipliers are found to 1 / 1000, and counted in it here."""
_SMALLEST, _LARGEST = 100, 4096 * _GRID
_CLOSE = 1e-9
_GUESSES = 8
_Price = Callable[[int], float]


def solve(template: Mechanism, *, epsilon: float, delta: float, rounds: int, unit: str = UNIT_RECORD) -> float:
    """Return the smallest noise multiplier (to 0.001) with which `rounds` rounds spend at most `epsilon`.

    The value returned was priced with the ledger's own accounting: the ledger never charges more than `epsilon` for it.
    Renyi accounting guides the search, coarse PLD accounting finds the value, the ledger's own confirms it.

    Parameters
    ----------
    template : Mechanism
        One round; its noise multiplier does not matter. Rounds of ``dp-ftrl`` are all of its one stream.
    epsilon, delta : float
        The whole budget.
    rounds : int
    unit : str
        Of the account; see `fedllm.privacy.accountant`.

    Returns
    -------
    float
        From 0.1 to 4096.

    Raises
    ------
    ConfigError
        If the numbers are out of range, nothing bounds what the mechanism costs the unit, no noise multiplier up to
        4096 is enough, or the count of adaptive clipping would take the whole budget.
    """
    if not (epsilon > 0 and 0 < delta < 1 and rounds >= 1):
        raise ConfigError(
            f"epsilon {epsilon:g}, delta {delta:g}, rounds {rounds}: epsilon must be positive, delta in (0, 1), rounds"
            " at least 1"
        )
    # The count's noise is inside the multiplier: it changes no price, only which multipliers there are.
    plain = dataclasses.replace(template, adaptive=None)

    interval = min(max(INTERVAL, epsilon / 2000), 50 * INTERVAL)

    def history(noise: int) -> list[Mechanism]:
        return [dataclasses.replace(plain, noise_multiplier=noise / _GRID)] * rounds

    def renyi(noise: int) -> float:
        return rdp_epsilon(history(noise), delta, unit=unit)

    def coarse(noise: int) -> float:
        return spent_epsilon(history(noise), delta, unit=unit, interval=interval)

    def ledger(noise: int) -> float:
        return spent_epsilon(history(noise), delta, unit=unit)

    most = renyi(_LARGEST)
    if math.isinf(most):
        raise ConfigError(
            f"mechanism {template.kind!r}: nothing bounds what it costs per {unit}, whatever the noise",
            hint="records and persons are protected by dp-sgd, dp-ftrl and skellam, owners by skellam",
        )
    if most > epsilon and coarse(_LARGEST) > epsilon:
        raise ConfigError(
            f"epsilon {epsilon:g} at delta {delta:g}, {rounds} rounds of {template.steps} steps: no noise multiplier"
            f" to {_LARGEST // _GRID} suffices",
            hint="raise epsilon, take fewer steps or a lower sample rate",
        )
    found = _confirmed(_least(coarse, renyi, epsilon), coarse, ledger, epsilon) / _GRID
    _check_count(template.adaptive, found)
    return found


def noise_multiplier(*, epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    """Return the smallest noise multiplier (to 0.001) whose `steps` sampled steps of DP-SGD spend at most `epsilon`.

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
        As of `solve`.
    """
    if not (epsilon > 0 and 0 < delta < 1 and 0 < sample_rate <= 1 and steps >= 1):
        raise ConfigError(
            f"epsilon {epsilon:g}, delta {delta:g}, sample rate {sample_rate:g}, steps {steps}: epsilon must be"
            " positive, delta in (0, 1), sample rate in (0, 1], steps at least 1"
        )
    template = Mechanism(DP_SGD, UNIT_RECORD, RELATION_ADD_REMOVE, 1.0, 1.0, sample_rate, steps, delta)
    return solve(template, epsilon=epsilon, delta=delta, rounds=1)


def signal_to_noise(mechanism: Mechanism, *, dimension: int, records: int) -> float:
    """Return how much signal one release has at most for its noise, as predicted: L2 norm over L2 norm.

    The signal is the sum of the units expected in a release, each at its clip norm and all in one direction; real
    gradients agree less. Clip norms cancel.

    Parameters
    ----------
    mechanism : Mechanism
    dimension : int
        Entries of the noisy vector; of ``skellam`` the mechanism's own number counts.
    records : int
        Units of one owner; of ``skellam`` the owners in the sum.

    Returns
    -------
    float
        ``inf`` without noise.
    """
    if not (dimension >= 1 and records >= 1):
        raise ValueError(f"dimension {dimension}, records {records}: both at least 1")
    if not mechanism.covered:
        return math.inf
    if mechanism.shares is not None:
        return 1 / mechanism.noise_over_signal(records)
    if mechanism.stream is not None:
        from fedllm.privacy.correlated import step_noise  # only streams need its matrices

        units, noise = records / mechanism.stream.separation, mechanism.noise_multiplier * step_noise(mechanism.stream)
    else:
        units, noise = mechanism.sample_rate * records, mechanism.gradient_noise
    return units / (noise * math.sqrt(dimension))


def _confirmed(found: int, coarse: _Price, ledger: _Price, epsilon: float) -> int:
    """Return the least noise by the ledger's price, near that by the coarse one."""
    while ledger(found) > epsilon:
        found += 1
    # One step lower the coarse price is above the ledger's by about as much as here: where that decides, look.
    while found > _SMALLEST and coarse(found - 1) - epsilon <= 2 * (coarse(found) - ledger(found)) + _CLOSE:
        if ledger(found - 1) > epsilon:
            break
        found -= 1
    return found


def _check_count(adaptive: AdaptiveClip | None, found: float) -> None:
    if adaptive is not None and 2 * adaptive.count_noise <= found:
        raise ConfigError(
            f"adaptive clipping with count noise {adaptive.count_noise:g}: a noise multiplier of {found:g} is needed,"
            " and less than twice the count noise allowed",
            hint=f"raise the count noise well above {found / 2:g}: the more, the less of it the gradients bear",
        )


def _least(price: _Price, model: _Price, epsilon: float) -> int:
    """Return the least noise whose price is at most `epsilon`; price and model fall with noise.

    The price is dear; the model, which runs above it, costs little and gives the first two guesses. From there on the
    last two prices are extended as a power law, and where that takes long the bracket is halved.
    """
    low, high = _SMALLEST - 1, _LARGEST
    guess = _bisect(model, epsilon, low, high)
    known: list[tuple[int, float]] = []
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        known.append((guess, price(guess)))
        low, high = (low, guess) if known[-1][1] <= epsilon else (guess, high)
        guess = _between(low, high)
        if known[-1][1] > 0 and len(known) == 1:
            guess = _bisect(model, epsilon * model(known[0][0]) / known[0][1], low, high)
        elif len(known) < _GUESSES and known[-1][1] != known[-2][1] and min(known[-1][1], known[-2][1]) > 0:
            (one, at_one), (two, at_two) = known[-2:]
            power = math.log(two / one) / math.log(at_two / at_one)
            guess = math.ceil(two * (epsilon / at_two) ** power)
    return high


def _bisect(price: _Price, epsilon: float, low: int, high: int) -> int:
    """Return the least noise above `low` whose price is at most `epsilon`, `high` if none below it is."""
    while high - low > 1:
        middle = _between(low, high)
        low, high = (low, middle) if price(middle) <= epsilon else (middle, high)
    return high


def _between(low: int, high: int) -> int:
    return max(low + 1, math.isqrt(low * high))
