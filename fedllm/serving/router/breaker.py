"""When to leave a failing replica alone, and when to try it again. Pure: clock and randomness are passed in.

Closed, every request may pass. After `threshold` failures in a row it is open, and nothing passes for a pause that
doubles with every opening, jittered so that routers do not come back together. Then it is half-open: one request
passes as a trial, and its end decides.
"""

from __future__ import annotations

from fedllm.clock import Clock
from fedllm.rng import Rng

THRESHOLD = 3
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0


class Breaker:
    """The circuit of one replica.

    Parameters
    ----------
    clock : Clock
    rng : Rng
        For the jitter: a pause lies between half of its length and its whole length.
    threshold : int
        Consecutive failures that open the circuit.
    first_pause_s, longest_pause_s : float
        Seconds of the first pause, and of the longest.
    """

    def __init__(
        self,
        clock: Clock,
        rng: Rng,
        *,
        threshold: int = THRESHOLD,
        first_pause_s: float = FIRST_PAUSE_S,
        longest_pause_s: float = LONGEST_PAUSE_S,
    ) -> None:
        self._clock = clock
        self._rng = rng
        self._threshold = threshold
        self._first_pause_s = first_pause_s
        self._longest_pause_s = longest_pause_s
        self._failures = 0
        self._openings = 0
        self._open_until_s: float | None = None
        self._trial = False

    @property
    def state(self) -> str:
        """``closed``, ``open`` or ``half-open``."""
        if self._open_until_s is None:
            return "closed"
        return "open" if self._clock.monotonic() < self._open_until_s else "half-open"

    @property
    def passes(self) -> bool:
        """Whether a request may begin now."""
        state = self.state
        return state == "closed" or (state == "half-open" and not self._trial)

    @property
    def pause_left_s(self) -> float:
        """Seconds until something may pass; 0 if nothing stands against it but a trial."""
        return 0.0 if self._open_until_s is None else max(0.0, self._open_until_s - self._clock.monotonic())

    def begin(self) -> bool:
        """Note that a request begins; return whether it is the trial of a half-open circuit."""
        trial = self.state == "half-open"
        self._trial |= trial
        return trial

    def success(self) -> None:
        """Close the circuit: the replica answered."""
        self._failures = self._openings = 0
        self._open_until_s = None
        self._trial = False

    def failure(self) -> None:
        """Count a failure; it may open the circuit, and the failure of a trial does."""
        self._failures += 1
        if self._failures >= self._threshold or self.state == "half-open":
            self.trip()

    def trip(self) -> None:
        """Open the circuit at once; while it is open already, its pause stays as it is."""
        self._trial = False
        if self.state == "open":
            return
        # The exponent is bounded: a replica that is gone for a year must not make a number that is no float.
        pause_s = min(self._longest_pause_s, self._first_pause_s * 2.0 ** min(self._openings, 32))
        self._openings += 1
        uniform = int.from_bytes(self._rng.token(4), "little") / 2.0**32
        self._open_until_s = self._clock.monotonic() + pause_s * (0.5 + 0.5 * uniform)

    def abandon(self, *, trial: bool) -> None:
        """Note that a request ended without a word on the replica: its client left. Another may be the trial."""
        if trial:
            self._trial = False
