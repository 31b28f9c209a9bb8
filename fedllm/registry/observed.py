"""What endpoints report of a version: counts over a window of time, by version and alias. Plain data.

A report says how many requests a version answered and how; it holds no text, no key and no tenant's name. Endpoints
make it, the coordinator keeps the sums; nothing in it is signed, so it is shown as what an endpoint said, and moves
no alias.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from fedllm.ids import Digest

TTFT_BOUNDS_S = (
    *(0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75),
    *(1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 60.0),
)
"""Upper bounds of the histogram of seconds to the first token; one more bucket is open above."""
MAX_OBSERVATIONS = 1024
"""Most observations of one report."""

_STRICT: Mapping[str, Any] = {"extra": "forbid", "strict": True, "allow_inf_nan": False}


@dataclass(frozen=True)
class Observation:
    """What one endpoint saw of one version under one alias.

    Attributes
    ----------
    version : Digest
    alias : str
        ``tenant/name`` that was asked for.
    start, end : float
        The window, in seconds since the Unix epoch.
    requests : int
        Ended requests that were bound to the version, whatever their status.
    errors_4xx, errors_5xx : int
        Those of them that ended so; a client that left (499) is among the former.
    ttft : tuple of int
        Requests by seconds to their first token: one count for each of `TTFT_BOUNDS_S`, and one above.
    prompt_tokens, completion_tokens : int
    up, down : int
        Ratings. A rating that was changed is taken back where it was counted: one of the two may be negative, their
        sum never is.
    """

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT

    version: Digest
    alias: str
    start: float
    end: float
    requests: int
    errors_4xx: int
    errors_5xx: int
    ttft: tuple[int, ...]
    prompt_tokens: int
    completion_tokens: int
    up: int
    down: int

    def plus(self, other: Observation) -> Observation:
        """Return the sum of two observations of one version under one alias, over both windows."""
        return Observation(
            version=self.version,
            alias=self.alias,
            start=min(self.start, other.start),
            end=max(self.end, other.end),
            ttft=tuple(a + b for a, b in zip(self.ttft, other.ttft, strict=True)),
            **{name: getattr(self, name) + getattr(other, name) for name in COUNTS},
        )


COUNTS = ("requests", "errors_4xx", "errors_5xx", "prompt_tokens", "completion_tokens", "up", "down")
"""Fields of an `Observation` that are added up, but for the histogram."""


@dataclass(frozen=True)
class Report:
    """One window of one endpoint, as it is posted: taken in once, however often it arrives.

    Attributes
    ----------
    endpoint : str
        The endpoint's name.
    run : str
        Of one process of it: a process that starts again counts its reports from 1 again.
    sequence : int
        Grows with every report of a run.
    observations : tuple of Observation
        One for each version and alias.
    """

    __pydantic_config__: ClassVar[Mapping[str, Any]] = _STRICT

    endpoint: str
    run: str
    sequence: int
    observations: tuple[Observation, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the body of ``POST /v1/observations``."""
        return asdict(self)


def ttft_bucket(seconds: float) -> int:
    """Return the index of the bucket that counts a time to first token."""
    return bisect.bisect_left(TTFT_BOUNDS_S, seconds)


def ttft_quantile(ttft: tuple[int, ...], share: float) -> float | None:
    """Return the time in seconds that `share` of the counted requests did not pass, None if none was counted.

    Linear within its bucket, so it is off by no more than that bucket is wide; above the last bound it is that bound.
    """
    wanted, below = share * sum(ttft), 0
    if wanted <= 0:
        return None
    lower = 0.0
    for count, upper in zip(ttft, TTFT_BOUNDS_S, strict=False):
        if count and below + count >= wanted:
            return lower + (upper - lower) * (wanted - below) / count
        below, lower = below + count, upper
    return TTFT_BOUNDS_S[-1]
