"""What a round does for privacy, as plain numbers: kinds of mechanism, units, neighbouring relations.

A `Mechanism` is data. `fedllm.privacy` prices it, `fedllm.client` runs it, the ledger remembers it; a kind that is
not known here cannot be built, so that nothing is ever charged, or trained, that nobody can price.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NONE = "none"
DP_SGD = "dp-sgd"
DP_FTRL = "dp-ftrl"
SKELLAM = "skellam"
KINDS = (NONE, DP_SGD, DP_FTRL, SKELLAM)

UNIT_RECORD = "record"
"""One training record, or all records of one person where the owner groups them."""
UNIT_PERSON = "person"
"""All records of one person; no plan names it: an owner counts so when it groups its records by a column."""
UNIT_OWNER = "owner"
"""Everything that one owner holds."""
RELATION_ADD_REMOVE = "add-or-remove-one"
"""Neighbouring data sets differ by adding or removing one unit."""
RELATION_ZERO_OUT = "zero-out-one"
"""Neighbours differ in one owner's update being replaced by zero; that the owner takes part is public."""
_LEAST_BAND, _MOST_BAND = 1, 256
_LEAST_COUNT_NOISE, _MOST_COUNT_NOISE = 4.0, 2.0**22
_MOST_STREAM_STEPS = 1_000_000


@dataclass(frozen=True)
class AdaptiveClip:
    """Clip norm that follows a quantile of the gradients' norms (Andrew et al. 2021, arXiv 1905.03871).

    Each step also releases how many units' gradients were short enough, with noise of its own; the gradients' noise
    is raised so that both together cost what `Mechanism.noise_multiplier` says.

    Attributes
    ----------
    quantile : float
        Share of gradients that the norm aims to leave as they are, in (0, 1).
    rate : float
        The norm moves by a factor of ``exp(-rate * (share - quantile))`` a step.
    count_noise : float
        Noise standard deviation of the count, in units: 4 to 2^22 (integer noise on a coarser grid costs more than the
        Gaussian that is priced: 0.02 at 1, under 1e-9 at 4), and above half the noise multiplier.
    """

    quantile: float
    rate: float
    count_noise: float

    def __post_init__(self) -> None:
        """Refuse numbers that name no quantile or no noise."""
        if not (
            0 < self.quantile < 1 and 0 < self.rate <= 1 and _LEAST_COUNT_NOISE <= self.count_noise <= _MOST_COUNT_NOISE
        ):
            raise ValueError("adaptive clipping: quantile in (0, 1), rate in (0, 1], count noise 4 to 2^22")


@dataclass(frozen=True)
class NoiseShares:
    """How the noise of a sum is divided among the owners whose updates are in it.

    Attributes
    ----------
    honest : int
        Shares that the noise multiplier counts: the fewest honest owners of any sum that is opened, which is the
        least number of survivors less the owners that may collude with the coordinator.
    dimension : int
        Entries of the update.
    clip_steps : int
        The clip norm in grid steps: the L2 norm, in integers, that no owner's update passes.
    """

    honest: int
    dimension: int
    clip_steps: int

    def __post_init__(self) -> None:
        """Refuse shares that add up to nothing."""
        if min(self.honest, self.dimension, self.clip_steps) < 1:
            raise ValueError("noise shares: honest owners, dimension and clip steps must be positive")


@dataclass(frozen=True)
class Stream:
    """A training stream of correlated noise that goes on over many rounds and is charged once.

    Attributes
    ----------
    name : str
        Of the stream: rounds with the same name are the same stream.
    steps : int
        Noisy steps that the whole stream has at most.
    band : int
        Steps over which noise is correlated (coefficients of the Toeplitz matrix C).
    separation : int
        Steps between two uses of one unit, at least; no less than `band`.
    """

    name: str
    steps: int
    band: int
    separation: int

    def __post_init__(self) -> None:
        """Refuse streams whose sensitivity is not known."""
        if not self.name or len(self.name) > 200 or not self.name.isprintable():
            raise ValueError("a stream has a printable name of up to 200 characters")
        if not (_LEAST_BAND <= self.band <= _MOST_BAND and self.band <= self.separation):
            raise ValueError(f"stream: band 1 to {_MOST_BAND}, separation no less than band")
        if not 1 <= self.steps <= _MOST_STREAM_STEPS:
            raise ValueError(f"stream: 1 to {_MOST_STREAM_STEPS} steps")

    @property
    def participations(self) -> int:
        """Most steps in which one unit is used."""
        return -(-self.steps // self.separation)


@dataclass(frozen=True)
class Mechanism:
    """The privacy mechanism of one round on one owner's data, as plain numbers.

    Attributes
    ----------
    kind : str
        ``dp-sgd``: Poisson-sampled Gaussian in the silo (Abadi et al. 2016). ``dp-ftrl``: correlated noise in the
        silo, no sampling (Choquette-Choo et al. 2023). ``skellam``: every owner adds a share of the sum's noise in
        the ring (Agarwal et al. 2021). ``none``: nothing.
    unit, relation : str
        Privacy unit and neighbouring relation; printed beside every epsilon.
    noise_multiplier : float
        Noise standard deviation over sensitivity: of one step (``dp-sgd``), of the whole stream (``dp-ftrl``), of a
        sum with no more than the honest owners counted on (``skellam``).
    clip_norm : float
        L2 bound of one unit's gradient, or of one owner's update. The first of a round, if `adaptive`.
    sample_rate : float
        Poisson probability of each unit in each step; 1 for all but ``dp-sgd``.
    steps : int
        Noisy releases in this round: steps, or 1 for ``skellam``.
    delta : float
    adaptive : AdaptiveClip or None
        With ``dp-sgd`` only.
    shares : NoiseShares or None
        With ``skellam``, and only there.
    stream : Stream or None
        With ``dp-ftrl``, and only there.
    """

    kind: str
    unit: str
    relation: str
    noise_multiplier: float
    clip_norm: float
    sample_rate: float
    steps: int
    delta: float
    adaptive: AdaptiveClip | None = None
    shares: NoiseShares | None = None
    stream: Stream | None = None

    def __post_init__(self) -> None:
        """Refuse numbers for which no guarantee could be computed."""
        if self.kind not in KINDS:
            raise ValueError(f"mechanism {self.kind!r}: {', '.join(KINDS)} allowed")
        owned = {DP_SGD: self.adaptive, SKELLAM: self.shares, DP_FTRL: self.stream}
        strange = [kind for kind, part in owned.items() if part is not None and kind != self.kind]
        if strange:
            raise ValueError(f"mechanism {self.kind!r} has numbers of {strange[0]!r}")
        if self.kind == NONE:
            return
        place = (UNIT_OWNER, RELATION_ZERO_OUT) if self.kind == SKELLAM else (UNIT_RECORD, RELATION_ADD_REMOVE)
        if (self.unit, self.relation) != place:
            raise ValueError(f"unit {self.unit!r} under {self.relation!r}: {self.kind} has unit {place[0]}, {place[1]}")
        positive = (self.noise_multiplier, self.clip_norm, float(self.steps))
        if not all(math.isfinite(x) and x > 0 for x in positive):
            raise ValueError("noise multiplier, clip norm and steps must be positive")
        if not (0 < self.sample_rate <= 1 and 0 < self.delta < 1):
            raise ValueError("sample rate must be in (0, 1], delta in (0, 1)")
        if self.kind != DP_SGD and self.sample_rate != 1:
            raise ValueError(f"{self.kind} samples nothing: sample rate 1 needed")
        self._check_parts()

    def _check_parts(self) -> None:
        if self.kind == SKELLAM and (self.shares is None or self.steps != 1):
            raise ValueError("skellam needs noise shares, and releases one sum in a round")
        if self.kind == DP_FTRL and (self.stream is None or self.steps > self.stream.steps):
            raise ValueError("dp-ftrl needs a stream of at least as many steps as the round has")
        if self.adaptive is not None and 2 * self.adaptive.count_noise <= self.noise_multiplier:
            raise ValueError("count noise must be above half the noise multiplier: nothing is left for the gradients")

    @classmethod
    def none(cls) -> Mechanism:
        """Return the mechanism that protects nothing and says so."""
        return cls(NONE, UNIT_RECORD, RELATION_ADD_REMOVE, 0.0, 0.0, 0.0, 0, 0.0)

    @property
    def covered(self) -> bool:
        """Whether it protects anything."""
        return self.kind != NONE

    @property
    def gradient_noise(self) -> float:
        """Noise multiplier of the gradients alone: above `noise_multiplier` if a count is released beside them.

        ``(z^-2 - (2 b)^-2)^(-1/2)`` with b the count's noise (Andrew et al. 2021, theorem 1).
        """
        if self.adaptive is None:
            return self.noise_multiplier
        return 1 / math.sqrt(self.noise_multiplier**-2 - (2 * self.adaptive.count_noise) ** -2)

    def realised(self, honest: int) -> Mechanism:
        """Return what a sum with `honest` honest shares in it cost: never more than with those counted on.

        Every share keeps its variance; more of them are more noise.
        """
        if self.shares is None:
            raise ValueError(f"{self.kind} has no noise shares")
        found = max(honest, self.shares.honest)
        return dataclasses.replace(
            self,
            noise_multiplier=self.noise_multiplier * math.sqrt(found / self.shares.honest),
            shares=dataclasses.replace(self.shares, honest=found),
        )

    def sum_std(self, owners: int) -> float:
        """Return the standard deviation, in grid steps, of an entry's noise in a sum of `owners` shares.

        Every share has variance ``(noise_multiplier * clip_steps)^2 / honest``.
        """
        if self.shares is None or owners < 1:
            raise ValueError(f"a sum of {owners} owners, {self.kind}: noise shares of at least 1 owner needed")
        return self.noise_multiplier * self.shares.clip_steps * math.sqrt(owners / self.shares.honest)

    def noise_over_signal(self, owners: int) -> float:
        """Return the L2 norm of the noise in a sum over the largest norm that `owners` clipped updates add up to."""
        if self.shares is None or owners < 1:
            raise ValueError(f"a sum of {owners} owners, {self.kind}: noise shares of at least 1 owner needed")
        return self.sum_std(owners) * math.sqrt(self.shares.dimension) / (owners * self.shares.clip_steps)

    def to_fields(self) -> dict[str, Any]:
        """Return plain names and values, for JSON; parts that are None are left out."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Mechanism:
        """Return the mechanism of `to_fields`; raise `TypeError` or `ValueError` if it is none."""
        parts: dict[str, Any] = dict(fields)
        for name, kind in (("adaptive", AdaptiveClip), ("shares", NoiseShares), ("stream", Stream)):
            if parts.get(name) is not None:
                parts[name] = kind(**parts[name])
        return cls(**parts)
