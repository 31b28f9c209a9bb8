"""How many requests one replica takes at once: a limit that follows an objective of time to first token. Pure.

Additive increase, multiplicative decrease (Chiu and Jain 1989), as TCP and adaptive concurrency limits have it. Times
are collected in windows. If a window's 90th percentile is within the objective and the limit was reached, one more is
let in; if it is above, the limit is halved. Requests that began before the last change say nothing of the limit that
holds now, and are left out.

Only streams have a time to first token: where nobody streams, the limit moves only when the replica itself refuses.
"""

from __future__ import annotations

import math

WINDOW = 16
"""Times in a window: the least whose 90th percentile is not simply its largest."""
QUANTILE = 0.9


class AdaptiveLimit:
    """A limit of requests in flight at one replica.

    Parameters
    ----------
    objective_s : float
        Seconds to the first token that the 90th percentile is held to.
    most : int
        The limit is never above; it begins here, for without times there is no reason for a lower one.
    window : int
        Times that make up one window.
    """

    def __init__(self, objective_s: float, most: int, *, window: int = WINDOW) -> None:
        self.value = most
        self._objective_s = objective_s
        self._most = most
        self._window = window
        self._times: list[float] = []
        self._reached = False
        self._changed_s = -math.inf

    def began(self, in_flight: int) -> None:
        """Note how many are in flight, the one that begins included."""
        self._reached |= in_flight >= self.value

    def observe(self, ttft_s: float, *, began_s: float, now_s: float) -> None:
        """Take in one time to first token.

        Parameters
        ----------
        ttft_s : float
            Seconds from the request's start at the replica.
        began_s, now_s : float
            On one monotonic clock.
        """
        if began_s < self._changed_s:
            return
        self._times.append(ttft_s)
        if len(self._times) < self._window:
            return
        p90_s = sorted(self._times)[math.ceil(QUANTILE * len(self._times)) - 1]
        if p90_s > self._objective_s:
            self._change(self.value // 2, now_s)
        elif self._reached:
            self._change(self.value + 1, now_s)
        self._times.clear()
        self._reached = False

    def refused(self, *, began_s: float, now_s: float) -> None:
        """Halve the limit: the replica itself said that it has too much to do."""
        if began_s >= self._changed_s:
            self._change(self.value // 2, now_s)
            self._times.clear()

    def _change(self, value: int, now_s: float) -> None:
        bounded = max(1, min(self._most, value))
        if bounded != self.value:
            self.value, self._changed_s = bounded, now_s
