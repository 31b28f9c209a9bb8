"""Correlated noise for streams without sampling: DP-FTRL with the banded square root as its noise matrix.

What is released, step by step, is ``r = C G + Z``. Row t of G is the sum of the clipped gradients of step t, Z is
integer Gaussian noise, and C is lower-triangular, banded and Toeplitz: its coefficients are the first `band` of the
square root of the prefix-sum matrix (Kalinin, Lampert 2024, arXiv 2405.13763; without a band: Fichtenberger,
Henzinger, Upadhyay 2022, arXiv 2202.11205). It is one Gaussian mechanism on ``C G``, also where gradients depend on
what was released before, because C is lower-triangular (Denisov et al. 2022, arXiv 2202.08312, theorem 2.1). Hence
it is charged once, as one Gaussian of the stream's noise multiplier.

The gradient estimates ``C^-1 r = G + C^-1 Z`` are post-processing. Their noise is larger in one step than
independent noise would be and largely cancels over many: training sees sums of steps, and sums are what is accurate.
All of this rests on one rule: **a row is released at most once**. `CorrelatedSum` counts rows upwards only;
`fedllm.client.dpftrl` makes the count survive crashes.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedllm.errors import IntegrityError, PolicyRefused
from fedllm.messages.mechanism import Stream
from fedllm.privacy.noise import GaussianGrid
from fedllm.rng import Rng

F64 = NDArray[np.float64]


def coefficients(band: int) -> F64:
    """Return ``c_k = binom(2k, k) / 4^k`` for k below `band`, the first column of C; positive and decreasing.

    They are the Taylor coefficients of ``(1 - x)^(-1/2)``; the prefix-sum matrix is that of ``1 / (1 - x)``.
    """
    k = np.arange(1, band)
    return np.concatenate([[1.0], np.cumprod((2 * k - 1) / (2 * k))])


def _reach(stream: Stream) -> list[int]:
    """Return how many rows of C G each use of one unit touches, for a unit that is used as early as possible."""
    return [min(stream.band, stream.steps - first) for first in range(0, stream.steps, stream.separation)]


def sensitivity(stream: Stream) -> float:
    """Return the largest L2 norm of ``C G`` that one unit makes, with each of its gradients of norm 1 at most.

    A unit that is used at steps ``t_1 < t_2 < ...`` with gradients ``g_1, g_2, ...`` adds ``C[:, t_i] g_i`` for each i.
    Column ``t_i`` is zero but for rows ``t_i`` to ``t_i + band - 1``, and the next use is no sooner than
    ``t_i + separation``, which is no less than ``t_i + band``: no two columns share a row. The squared norm is the sum
    of ``|C[:, t_i]|^2 |g_i|^2``, whatever the directions of the gradients, and largest for ``|g_i| = 1``.

    Column t holds the first ``min(band, steps - t)`` coefficients: the last ones are cut off by the end of the
    stream, which only shortens them. As ``t_i >= (i - 1) separation``, each column is at most as long as that of a
    unit used at steps 0, separation, 2 separation, ...; there are `participations` of these, and their norm is
    what is returned. It is exact (such a unit may exist), at most ``sqrt(participations) |c|``, and equal to that
    where no column is cut off. It agrees with theorem 2 of Kalinin and Lampert 2024, which also allows overlaps.
    """
    energy = np.cumsum(coefficients(stream.band) ** 2)
    return math.sqrt(sum(energy[rows - 1] for rows in _reach(stream)))


def step_noise(stream: Stream) -> float:
    """Return the noise of one step's gradient estimate: standard deviation over noise multiplier times clip norm.

    Of the last step, which has the most; sensitivity is counted in.
    """
    return sensitivity(stream) * float(np.linalg.norm(_inverse(stream)))


def prefix_error(stream: Stream) -> float:
    """Return the root mean square, over all steps, of the noise in the sum of the steps so far.

    In units of the clip norm for a noise multiplier of 1, with sensitivity counted in: two streams can be compared
    by it at the same epsilon. `independent` gives the stream to compare with.
    """
    return sensitivity(stream) * math.sqrt(_prefix_variances(stream).mean())


def max_error(stream: Stream) -> float:
    """Return the noise in the sum of all steps, which has the most; units as in `prefix_error`.

    With no band and a single use it is ``sum(c_k^2)`` for k below `steps`. These are Landau's constants,
    ``(ln(steps) + 0.5772 + ln(16)) / pi`` to within ``1 / (4 pi steps)``.
    """
    return sensitivity(stream) * math.sqrt(_prefix_variances(stream)[-1])


def independent(stream: Stream) -> Stream:
    """Return the stream with noise of every step drawn independently: what correlation is compared with."""
    return dataclasses.replace(stream, band=1)


def _inverse(stream: Stream) -> F64:
    """Return the first column of ``C^-1``, ``(steps,)``."""
    back = coefficients(stream.band)[:0:-1]
    column = np.zeros(stream.steps)
    column[0] = 1.0
    for t in range(1, stream.steps):
        reach = min(t, stream.band - 1)
        column[t] = -(back[back.size - reach :] @ column[t - reach : t])
    return column


def _prefix_variances(stream: Stream) -> F64:
    # A C^-1 is Toeplitz with the running sums of C^-1 as its coefficients
    variances: F64 = np.cumsum(np.cumsum(_inverse(stream)) ** 2)
    return variances


class CorrelatedSum:
    """The mechanism step by step: clipped gradient sums in, gradient estimates out.

    Gradients are clipped to ``C (1 - 2^-10)`` as in `GaussianGrid`. Every row is rounded to the noise grid of step g.
    Two neighbouring streams differ in the rows that one unit touches, at most R of them, and rounding moves the
    difference by at most g in each entry of those: with sensitivity s they differ by at most
    ``s C (1 - 2^-10) + g sqrt(R d)``, which is below ``s C`` as long as ``g sqrt(R d) < 2^-10 s C``. Other numbers are
    refused, so that the sensitivity accounted is the sensitivity there is.

    Parameters
    ----------
    stream : Stream
    noise_multiplier : float
        Noise standard deviation over sensitivity, of the whole stream.
    clip_norm : float
        C, the L2 bound of one unit's gradient in one step.
    dimension : int
        d, entries of a gradient.

    Attributes
    ----------
    taken : int
        Steps whose rows were released or given up; they never come again.

    Raises
    ------
    ConfigError
        If rounding could use up more than the slack, see above.
    """

    def __init__(self, stream: Stream, *, noise_multiplier: float, clip_norm: float, dimension: int) -> None:
        self.taken = 0
        bound = sensitivity(stream) * clip_norm
        self._grid = GaussianGrid(noise_multiplier * bound)
        self._grid.check(dimension * sum(_reach(stream)), bound)
        self._stream = stream
        self._dimension = dimension
        self._facts: dict[str, Any] = {
            **dataclasses.asdict(stream), "noise_multiplier": float(noise_multiplier), "clip_norm": float(clip_norm),
            "dimension": dimension,
        }  # fmt: skip
        self._weights = [float(c) for c in coefficients(stream.band)[1:]]
        self._gradients: deque[F64] = deque(maxlen=stream.band - 1)  # the latest first, as in the sums below
        self._estimates: deque[F64] = deque(maxlen=stream.band - 1)

    def __repr__(self) -> str:
        return f"CorrelatedSum({self._stream.name!r}, step {self.taken} of {self._stream.steps}, gradients redacted)"

    def check_room(self, steps: int) -> None:
        """Raise `PolicyRefused` if the stream has fewer than `steps` left."""
        if self.taken + steps > self._stream.steps:
            raise PolicyRefused(
                f"stream {self._stream.name!r}: {steps} more steps after {self.taken}, {self._stream.steps} in all"
                " allowed",
                hint="plan a stream of another name; it is charged anew",
            )

    def step(self, total: F64, rng: Rng) -> F64:
        """Release the next row, and return what it says of its gradient sum.

        Parameters
        ----------
        total : F64
            Sum of the clipped gradients of this step's units, shape ``(dimension,)``; zeros for no units.
        rng : Rng
            `OsRng`, except in tests.

        Returns
        -------
        F64
            ``total`` with noise, shape ``(dimension,)``.

        Raises
        ------
        PolicyRefused
            If the stream has ended.
        NonFiniteUpdate
            If `total` is not finite, or too large for the grid.
        """
        self.check_room(1)
        if total.shape != (self._dimension,):
            raise ValueError(f"gradient sum of shape {total.shape}, ({self._dimension},) needed")
        row = total.astype(np.float64)  # a copy: the caller's array may be used again
        gradient = row.copy()
        for weight, earlier in zip(self._weights, self._gradients, strict=False):
            row += weight * earlier
        estimate = self._grid.add_noise(row, rng)
        for weight, earlier in zip(self._weights, self._estimates, strict=False):
            estimate -= weight * earlier
        self._advance(gradient, estimate)
        return estimate.copy()

    def skip_to(self, step: int) -> None:
        """Give up all rows before `step`; nothing is done if they are taken already.

        Their gradients count as zero from here on, released or not. That only takes rows out of the columns that
        `sensitivity` bounds, and entries of earlier gradients that are still within the band stay as they are.

        Raises
        ------
        PolicyRefused
            If the stream is not that long.
        """
        lost = step - self.taken
        self.check_room(max(lost, 0))
        for _ in range(min(lost, self._stream.band - 1)):
            self._advance(np.zeros(self._dimension), np.zeros(self._dimension))
        self.taken = max(self.taken, step)

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Return the state, for storage on the owner's own disk: it holds gradient sums **without noise**."""
        facts = json.dumps({**self._facts, "taken": self.taken}).encode()
        return {
            "facts": np.frombuffer(facts, dtype=np.uint8),
            "gradients": np.array(self._gradients, dtype=np.float64).reshape(-1, self._dimension),
            "estimates": np.array(self._estimates, dtype=np.float64).reshape(-1, self._dimension),
        }

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, NDArray[Any]],
        stream: Stream,
        *,
        noise_multiplier: float,
        clip_norm: float,
        dimension: int,
    ) -> CorrelatedSum:
        """Return the machine whose state `to_arrays` gave.

        Raises
        ------
        PolicyRefused
            If the stream was begun with other numbers: rows of two sensitivities have no common price.
        IntegrityError
            If the arrays are no state.
        """
        machine = cls(stream, noise_multiplier=noise_multiplier, clip_norm=clip_norm, dimension=dimension)
        try:
            facts = json.loads(arrays["facts"].tobytes())
            taken = facts.pop("taken")
            gradients, estimates = list(arrays["gradients"]), list(arrays["estimates"])
            kept = min(taken, stream.band - 1)
            sound = 0 <= taken <= facts["steps"] and isinstance(taken, int)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
            sound, facts = False, {}
        if not sound:
            raise IntegrityError(f"stored state of stream {stream.name!r} has another form")
        if facts != machine._facts:
            changed = sorted(k for k in {*facts, *machine._facts} if facts.get(k) != machine._facts.get(k))
            raise PolicyRefused(
                f"stream {stream.name!r} was begun with another {', '.join(changed)}",
                hint="a stream keeps its numbers to its end; plan a stream of another name, it is charged anew",
            )
        rows = [*gradients, *estimates]
        if len(gradients) != kept or len(estimates) != kept or any(row.shape != (dimension,) for row in rows):
            raise IntegrityError(f"stored state of stream {stream.name!r} has another form")
        for gradient, estimate in zip(reversed(gradients), reversed(estimates), strict=True):
            machine._advance(gradient.astype(np.float64), estimate.astype(np.float64))
        machine.taken = taken
        return machine

    def _advance(self, gradient: F64, estimate: F64) -> None:
        self._gradients.appendleft(gradient)
        self._estimates.appendleft(estimate)
        self.taken += 1
