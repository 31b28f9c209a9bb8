"""Epsilon of a history of mechanisms, in the unit of the account.

The ledger of record is kept in PLD accounting (Koskela et al. 2020; Doroshenko et al. 2022, arXiv 2207.04380),
which composes different Gaussian mechanisms tightly; dp-accounting discretises pessimistically, so the value is an
upper bound. A history with Skellam noise in it is priced by Renyi accounting as a whole (`fedllm.privacy.curves`), and
so are histories beyond any useful budget, whose distributions would fill the memory: also upper bounds.

What a mechanism costs one unit of the account:

========  =======================================  ============================
kind      record, person                           owner
========  =======================================  ============================
dp-sgd    a sampled Gaussian, once a step          infinite: nothing bounds it
dp-ftrl   one Gaussian a stream                    infinite
skellam   sensitivity twice the clip norm          sensitivity the clip norm
none      infinite                                 infinite
========  =======================================  ============================

Of two rounds of one stream nothing more is charged for the second, as long as the stream, its noise and its clip norm
are the same; with any other number it counts as another stream. That no more steps are taken than a stream has is for
the ledger to see to. Adaptive clipping needs no charge of its own: its count is inside the noise multiplier.

How far integer noise is from what is priced. Whole sums plus a continuous Gaussian, rounded, cost no more than the
Gaussian itself. Our noise is a discrete Gaussian instead, of s >= 2^20 grid steps (`fedllm.privacy.noise`). At x = t s
the probabilities of the two have the ratio ``1 + (t^2 - 1) / (24 s^2)``, up to terms in s^-4: within 2^-37 of one out
to nine standard deviations, beyond which lies a mass below 2^-61. Over d entries and T steps this adds at most
``2^-36 d T`` to epsilon and ``(1 + e^epsilon) 2^-61 d T`` to delta: for d = 30,720, T = 8 and epsilon 8 that is 3.6e-6
and 3.2e-10. Renyi curves at whole orders have no such term: there the two agree exactly.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedllm.messages.mechanism import NONE, UNIT_OWNER, UNIT_PERSON, UNIT_RECORD, Mechanism, Stream
from fedllm.privacy.curves import ORDERS, Gaussian, Release, Skellam, renyi, to_epsilon
from fedllm.privacy.mechanism import load_dp_accounting

INTERVAL = 1e-4
"""Width of the discretised privacy losses that the ledger counts with."""
_UNITS = (UNIT_RECORD, UNIT_PERSON, UNIT_OWNER)
_ROUGH = 100.0
"""Above this the Renyi bound is good enough: a distribution of such losses would fill the memory."""
_FINEST = 1e-5
"""Of epsilon: losses are never discretised more finely."""
_COARSEST = 1 / 400
"""Of epsilon: nor, for the number of different Gaussians, more coarsely."""
_DISTINCT = 4
"""Different Gaussians from which on losses are discretised more coarsely, so that a price takes seconds."""
_MOST_NOISE = 1e6  # what has more is priced as if it had this: the library squares it
_FEW = 8  # releases composed by squaring rather than by one large transform
_PREFIXES = 400
_Charge = tuple[Release, int]
_Account = tuple[_Charge, ...]
_pricing = threading.Lock()  # many owners of one simulation ask for the same price at once: it is worked out once


def epsilon(
    history: Sequence[Mechanism], delta: float, *, unit: str = UNIT_RECORD, interval: float = INTERVAL
) -> float:
    """Return the epsilon that all of `history` together spends at `delta`.

    Parameters
    ----------
    history : Sequence[Mechanism]
        Every mechanism ever run on one data set, in any order.
    delta : float
        In (0, 1). The deltas that the mechanisms name are not added up: one delta covers the composition.
    unit : str
        Of the account: ``record``, ``person`` or ``owner``.
    interval : float
        Width of discretised privacy losses; a wider one is faster and gives a larger (still valid) epsilon. Widened
        by itself where the history has many different mechanisms.

    Returns
    -------
    float
        0 for an empty history, ``inf`` if nothing bounds what any of its rounds cost the unit.
    """
    _check(delta, unit)
    account = _account(_charges(history, unit))
    with _pricing:
        return _epsilon(account, delta, interval)


def rdp_epsilon(history: Sequence[Mechanism], delta: float, *, unit: str = UNIT_RECORD) -> float:
    """Return an upper bound of `epsilon` by Renyi accounting: some percent above it, in milliseconds.

    Holds for integer noise as it is drawn, with no term for its distance from a continuous one.

    Parameters
    ----------
    history, delta, unit
        As of `epsilon`.
    """
    _check(delta, unit)
    return to_epsilon(_curve(_account(_charges(history, unit))), delta)


def burn_down(history: Sequence[Mechanism], delta: float, *, unit: str = UNIT_RECORD) -> list[float]:
    """Return epsilon after each mechanism of `history`: what was spent by then.

    The last value is `epsilon` of the whole. Each other one is the least of three upper bounds of its prefix: Renyi
    accounting; PLD accounting, composed on from prefix to prefix, with losses discretised a thousandth of the whole's
    Renyi bound wide; and the value after it, as a part of a history costs no more than the whole. Of more than 400
    mechanisms every second (third, ...) is priced and the others take the price of the next one. Nothing is
    interpolated: no value is below what its prefix cost.

    Parameters
    ----------
    history, delta, unit
        As of `epsilon`.

    Returns
    -------
    list[float]
        As long as `history`, rising.
    """
    _check(delta, unit)
    if not history:
        return []
    stride = -(-len(history) // _PREFIXES)
    charges = list(_charges(history, unit))
    groups = [_account(charges[at : at + stride]) for at in range(0, len(charges), stride)]
    bounds = [to_epsilon(curve, delta) for curve in accumulate(_curve(group) for group in groups)]
    losses: _Losses | None = _Losses(max(INTERVAL, *(bound / 1000 for bound in bounds if bound <= _ROUGH), 0.0))
    spent: list[float] = []
    for group, bound in zip(groups, bounds, strict=True):
        gaussians = _gaussians(group) if bound <= _ROUGH else None
        if losses is None or gaussians is None:
            losses = None  # from here on by Renyi accounting alone
            spent += [bound] * stride
        else:
            losses.compose(gaussians)
            spent += [min(bound, losses.epsilon(delta))] * stride
    spent = [*spent[: len(history) - 1], epsilon(history, delta, unit=unit)]
    return list(accumulate(reversed(spent), min))[::-1]


def _check(delta: float, unit: str) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta {delta}: between 0 and 1 needed")
    if unit not in _UNITS:
        raise ValueError(f"unit {unit!r}: {', '.join(_UNITS)} allowed")


def _charges(history: Iterable[Mechanism], unit: str) -> Iterator[_Charge | None]:
    """Yield for each mechanism what it releases and how often, None if that is charged already."""
    begun: set[tuple[Stream, float, float]] = set()
    for mechanism in history:
        if (shares := mechanism.shares) is not None:
            deviation = mechanism.noise_multiplier * shares.clip_steps
            # Of a record or person no more is known than that it moves the update within its clip ball.
            moved = shares.clip_steps if unit == UNIT_OWNER else 2 * shares.clip_steps
            yield Skellam(deviation * deviation, float(moved), shares.dimension), 1
        elif mechanism.kind == NONE or unit == UNIT_OWNER:
            yield Gaussian(0.0), 1
        elif (stream := mechanism.stream) is not None:
            numbers = (stream, mechanism.noise_multiplier, mechanism.clip_norm)
            yield None if numbers in begun else (Gaussian(mechanism.noise_multiplier), 1)
            begun.add(numbers)
        else:
            yield Gaussian(mechanism.noise_multiplier, mechanism.sample_rate), mechanism.steps


def _account(charges: Iterable[_Charge | None]) -> _Account:
    """Return the charges in an order of their own, equal releases added up."""
    counts: Counter[Release] = Counter()
    for charge in charges:
        if charge is not None:
            counts[charge[0]] += charge[1]
    return tuple(sorted(counts.items(), key=lambda item: (type(item[0]).__name__, item[0])))


def _curve(account: _Account) -> NDArray[np.float64]:
    curve = np.zeros_like(ORDERS)
    for release, count in account:
        curve += count * renyi(release)
    return curve


@lru_cache(maxsize=1024)
def _epsilon(account: _Account, delta: float, interval: float) -> float:
    bound = to_epsilon(_curve(account), delta)
    gaussians = _gaussians(account) if 0 < bound <= _ROUGH else None
    if gaussians is None:
        return bound
    many = min(interval * len(gaussians) / _DISTINCT, bound * _COARSEST)
    losses = _Losses(max(interval, many, bound * _FINEST))
    losses.compose(gaussians)
    # Every composition cuts off a mass of 1e-15: the library finds nothing below a delta like that.
    return min(bound, losses.epsilon(delta))


def _gaussians(account: _Account) -> list[tuple[Gaussian, int]] | None:
    """Return an account of Gaussians alone, None for any other; those without sampling compose to one, exactly."""
    precision, sampled = 0.0, []
    for release, count in account:
        if isinstance(release, Skellam):
            return None
        if release.sample_rate == 1:
            precision += count / release.noise_multiplier / release.noise_multiplier
        else:
            sampled.append((release, count))
    return [*sampled, (Gaussian(precision**-0.5), 1)] if precision else sampled


class _Losses:
    """A privacy loss distribution that grows by composition (dp-accounting, connect the dots)."""

    def __init__(self, interval: float) -> None:
        load_dp_accounting()
        from dp_accounting.pld import privacy_loss_distribution

        self._library: Any = privacy_loss_distribution
        self._interval = interval
        self._all: Any = None
        self._made: dict[tuple[Gaussian, int], Any] = {}

    def compose(self, charges: Iterable[tuple[Gaussian, int]]) -> None:
        for charge in charges:
            if charge not in self._made:
                self._made[charge] = self._make(*charge)
            self._all = self._made[charge] if self._all is None else self._all.compose(self._made[charge])

    def epsilon(self, delta: float) -> float:
        return 0.0 if self._all is None else float(self._all.get_epsilon_for_delta(delta))

    def _make(self, release: Gaussian, count: int) -> Any:
        deviation, rate = min(release.noise_multiplier, _MOST_NOISE), release.sample_rate
        if rate == 1:
            deviation, count = deviation / math.sqrt(count), 1
        once = self._library.from_gaussian_mechanism(
            deviation, value_discretization_interval=self._interval, sampling_prob=rate
        )
        if count > _FEW:
            return once.self_compose(count)
        every = once
        for bit in f"{count:b}"[1:]:
            every = every.compose(every)
            every = every.compose(once) if bit == "1" else every
        return every
