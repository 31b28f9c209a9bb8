"""One-run privacy auditing: the attack's scores, the guesses, and the epsilon that so many right guesses refute.

Steinke, Nasr and Jagielski 2023 (arXiv 2305.08846): each of m canaries is in the training data with probability one
half, independently; an attacker sees what training released and guesses for r of them. Under (epsilon, delta)
differential privacy the number of right guesses is bounded in distribution; the smallest epsilon for which the
number found is not too unlikely is a lower bound on the true one.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Bits = NDArray[np.bool_]

LEAST_SPREAD = 1e-6
"""Noise of an attack on a release without noise: small enough for least squares, large enough to divide by."""
_PRIOR_PRECISION = 4.0  # a fair coin's variance is 1/4
_HALVINGS = 30


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Return how likely `correct` or more right guesses are, at most, if (`epsilon`, `delta`) holds.

    Corollary 5.4 and appendix D of arXiv 2305.08846. With V ~ Binomial(r, e^epsilon / (1 + e^epsilon)), the number of
    right guesses of randomised response::

        P[V >= v] + 2 m delta max_{1 <= i <= v} P[v - i <= V < v] / i

    The neighbouring relation is adding or removing one canary.

    Parameters
    ----------
    canaries : int
        m, each of them in the data with probability 1/2.
    guesses : int
        r, fixed before the release was seen; the attacker chooses for which.
    correct : int
        v of the r.
    epsilon, delta : float

    Raises
    ------
    ValueError
        If not 0 <= correct <= guesses <= canaries, epsilon is negative or delta not in [0, 1].
    """
    if not 0 <= correct <= guesses <= canaries or guesses == 0:
        raise ValueError(f"{correct} of {guesses} guesses on {canaries} canaries: correct <= guesses <= canaries")
    if not (epsilon >= 0 and 0 <= delta <= 1):
        raise ValueError(f"epsilon {epsilon}, delta {delta}: epsilon >= 0 and delta in [0, 1] needed")
    if correct == 0:
        return 1.0
    pmf = _binomial(guesses, epsilon)
    below = np.cumsum(pmf[correct - 1 :: -1])
    steepest = float(np.max(below / np.arange(1, correct + 1)))
    return min(1.0, float(pmf[correct:].sum()) + 2 * canaries * delta * steepest)


def _binomial(trials: int, epsilon: float) -> F64:
    """Return the probabilities of 0 to `trials` right guesses, each right with probability 1 / (1 + e^-epsilon)."""
    k = np.arange(1, trials + 1)
    choose = np.concatenate([[0.0], np.cumsum(np.log((trials + 1 - k) / k))])
    right = -math.log1p(math.exp(-epsilon))
    hits = np.arange(trials + 1)
    return np.asarray(np.exp(choose + hits * right + (trials - hits) * (right - epsilon)))


def epsilon_lower_bound(canaries: int, guesses: int, correct: int, delta: float, *, confidence: float = 0.95) -> float:
    """Return the largest epsilon that this many right guesses refute at `confidence`; 0 if they refute none.

    A mechanism that is (epsilon, delta)-DP gets a bound above its epsilon with probability at most 1 - `confidence`.
    """
    level = 1 - confidence
    low, high = 0.0, 1.0
    while p_value(canaries, guesses, correct, high, delta) < level:
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        refuted = p_value(canaries, guesses, correct, middle, delta) < level
        low, high = (middle, high) if refuted else (low, middle)
    return low


def count_correct(scores: F64, included: Bits, guesses: int) -> int:
    """Return how many guesses are right: "in" for the highest half of `guesses` scores, "out" for the lowest.

    Parameters
    ----------
    scores : F64
        Shape ``(canaries,)``; higher for canaries that seem to be in.
    included : Bits
        The truth.
    guesses : int
        Even.
    """
    if guesses % 2 or not 2 <= guesses <= scores.size:
        raise ValueError(f"{guesses} guesses on {scores.size} canaries: an even number, at most one a canary")
    order = np.argsort(scores, kind="stable")
    half = guesses // 2
    return int(included[order[-half:]].sum() + (~included[order[:half]]).sum())


class Attack:
    """Linear least-squares estimate of who is in, from noisy sums of known gradients (LMMSE).

    A step releases ``y = sum_i s_i b_i g_i + N(0, spread^2 I)`` where b_i is one if canary i is in the data and s_i if
    Poisson sampling drew it. Among estimators that are linear in the releases this one has the least mean squared
    error. All products are taken between canaries (m x m), never between parameters.

    Parameters
    ----------
    canaries : int
    spread : float
        Standard deviation of the release's noise, which the attacker knows; 0 makes it least squares.
    sample_rate : float
        Poisson probability q; a draw's variance counts as noise that has the gradients' covariance.
    """

    def __init__(self, canaries: int, spread: float, sample_rate: float) -> None:
        self._variance = max(spread, LEAST_SPREAD) ** 2
        self._rate = sample_rate
        self._information = np.zeros((canaries, canaries))
        self._evidence = np.zeros(canaries)

    def observe(self, gradients: F32, released: F64) -> None:
        """Take in one step.

        Parameters
        ----------
        gradients : F32
            Clipped, shape ``(canaries, dimension)``.
        released : F64
            The noisy sum, shape ``(dimension,)``.
        """
        rate = self._rate
        gram = (gradients @ gradients.T).astype(np.float64)
        matched = (gradients @ released.astype(np.float32)).astype(np.float64) - rate / 2 * gram.sum(axis=1)
        drawn = rate * (1 - rate) / 2
        if drawn == 0:
            self._information += gram / self._variance
            self._evidence += matched / self._variance
            return
        noise = drawn * gram
        noise[np.diag_indices_from(noise)] += self._variance
        solved = np.linalg.solve(noise, np.column_stack([gram, matched]))
        self._information += rate**2 * solved[:, :-1]
        self._evidence += rate * solved[:, -1]

    def scores(self) -> F64:
        """Return the estimate of each b_i - 1/2, shape ``(canaries,)``."""
        precision = self._information.copy()
        precision[np.diag_indices_from(precision)] += _PRIOR_PRECISION
        return np.asarray(np.linalg.solve(precision, self._evidence))
