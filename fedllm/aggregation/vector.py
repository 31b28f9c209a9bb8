"""What is in each masked sum: the update with its weight, and the scores of an evaluation.

::

    update sum      w·update (d entries) | owners | weight | saturated | records | train_loss
    evaluation sum  owners | records | candidate_loss | head_loss | delta | delta_sq | regressed

``owners`` is the constant 1 of every owner: its sum must equal the number of survivors, or masks did not cancel.
Every other number is a whole number of small units, spread over as many ring entries as it needs
(`fedllm.aggregation.fixedpoint.Limbs`), so that its sum is exact. Under differential privacy ``records`` and
``train_loss`` are absent: each would be a release of private data that epsilon does not cover. The weight is a
public constant there, and the saturated share is computed from the noised update, hence post-processing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fedllm.adapter import F32
from fedllm.aggregation.fixedpoint import FixedPoint, Limbs, check_capacity
from fedllm.errors import ConfigError, IntegrityError, NonFiniteUpdate
from fedllm.messages.plan import Ring
from fedllm.rng import Rng, uniform_floats

WEIGHT_UNIT = 2.0**-30
SATURATION_UNIT = 2.0**-16
LOSS_UNIT = 2.0**-20
LOSS_LIMIT = 32.0
"""Mean token losses are clipped to ``[0, LOSS_LIMIT)``; uniform guessing over 2^32 tokens is 22."""
REGRESSED_BY = 0.01
"""An owner's candidate counts as regressed when its loss is more than this above the head's."""
_LOSS_BITS = 25
_RECORD_BITS = 32
_SCORE_RING_BITS = 32


@dataclass(frozen=True)
class UpdateTail:
    """What travels beside an update when no differential privacy is claimed.

    Attributes
    ----------
    records : int
        Training records of this owner.
    train_loss : float
        Mean token loss of the last local steps.
    """

    records: int
    train_loss: float


@dataclass(frozen=True)
class UpdateSum:
    """The opened update sum.

    Attributes
    ----------
    update : NDArray[float64]
        Sum of weight times update, shape ``(layout_size,)``.
    weight : float
        Sum of weights; ``update / weight`` is the weighted mean.
    owners : int
    records : int or None
        None under differential privacy.
    train_loss : float or None
        Mean over owners; None under differential privacy.
    saturated : float or None
        Mean over owners of the share of entries that the clip range cut; None where noise is added in the ring.
    """

    update: NDArray[np.float64]
    weight: float
    owners: int
    records: int | None
    train_loss: float | None
    saturated: float | None

    @property
    def mean(self) -> F32:
        """The weighted mean update, float32."""
        return (self.update / self.weight).astype(np.float32)


@dataclass(frozen=True)
class UpdateVector:
    """Codec of the update sum.

    Attributes
    ----------
    ring : Ring
    owners : int
        Size of the cohort: what the ring must have room for.
    layout_size : int
        Entries of the flat update.
    covered : bool
        Whether the round is covered by differential privacy.
    """

    ring: Ring
    owners: int
    layout_size: int
    covered: bool

    def __post_init__(self) -> None:
        """Refuse a ring that could overflow, by `ConfigError`."""
        check_capacity(self.owners, self.ring.value_bits, self.ring.bits)

    @cached_property
    def fixed_point(self) -> FixedPoint:
        """The grid of the update's entries."""
        return FixedPoint(self.ring.value_bits, self.ring.clip_range)

    @cached_property
    def _limbs(self) -> Limbs:
        public = (("owners", 1), ("weight", 31), ("saturated", 17))
        private = (("records", _RECORD_BITS), ("train_loss", _LOSS_BITS))
        return Limbs(self.ring.bits, self.owners, public if self.covered else public + private)

    @property
    def entries(self) -> int:
        """Ring entries of the whole vector."""
        return self.layout_size + self._limbs.entries

    def encode(self, update: F32, weight: float, tail: UpdateTail, rng: Rng) -> NDArray[np.uint32]:
        """Return one owner's vector, shape ``(entries,)``.

        The update is scaled by `weight` before it is quantised, so that the sum needs no private weights.

        Parameters
        ----------
        update : F32
            Shape ``(layout_size,)``, finite.
        weight : float
            In (0, 1].
        tail : UpdateTail
            Ignored when the round is covered by differential privacy.
        rng : Rng
            For stochastic rounding.

        Raises
        ------
        NonFiniteUpdate, ConfigError
        """
        if update.shape != (self.layout_size,):
            raise ConfigError(f"update of shape {update.shape}, ({self.layout_size},) expected")
        if not 0 < weight <= 1:
            raise ConfigError("an update's weight must lie in (0, 1]")
        # The very weight that is sent, so that sum over sum of weights is the exact weighted mean.
        weight_units = max(1, round(weight / WEIGHT_UNIT))
        vector = np.empty(self.entries, dtype=np.uint32)
        body = vector[: self.layout_size]
        clipped = self.fixed_point.encode_into(body, update, rng, weight=weight_units * WEIGHT_UNIT)
        numbers = {
            "owners": 1,
            "weight": weight_units,
            "saturated": round(clipped / self.layout_size / SATURATION_UNIT),
        }
        if not self.covered:
            numbers["records"] = tail.records
            numbers["train_loss"] = _loss_units(tail.train_loss, rng)
        vector[self.layout_size :] = self._limbs.encode(numbers)
        return vector

    def decode(self, total: NDArray[np.uint32], survivors: int) -> UpdateSum:
        """Return the sum of the survivors' updates and numbers.

        Raises
        ------
        IntegrityError
            If the owners' count differs from `survivors` or an entry is impossible: masks did not cancel.
        """
        check_total(total, self.entries)
        sums = self._limbs.decode(total[self.layout_size :], survivors)
        check_owners(sums["owners"], survivors)
        return UpdateSum(
            update=self.fixed_point.decode_sum(total[: self.layout_size], survivors),
            weight=sums["weight"] * WEIGHT_UNIT,
            owners=survivors,
            records=sums.get("records"),
            train_loss=None if self.covered else sums["train_loss"] * LOSS_UNIT / survivors,
            saturated=sums["saturated"] * SATURATION_UNIT / survivors,
        )


@dataclass(frozen=True)
class OwnerScores:
    """One owner's scores of a candidate adapter against the head, on its own held-out records.

    Attributes
    ----------
    records : int
        Held-out records scored.
    candidate_loss, head_loss : float
        Mean token loss.
    """

    records: int
    candidate_loss: float
    head_loss: float


@dataclass(frozen=True)
class ScoreSum:
    """The opened evaluation sum; means are over owners, each counting once.

    Attributes
    ----------
    owners, records : int
    candidate_loss, head_loss : float
        Mean over owners.
    delta : float
        Mean over owners of candidate minus head; negative is better.
    delta_std : float
        Sample standard deviation (n - 1) of delta over owners; 0.0 for one owner.
    regressed : int
        Owners whose candidate is worse than the head by more than `REGRESSED_BY`.
    """

    owners: int
    records: int
    candidate_loss: float
    head_loss: float
    delta: float
    delta_std: float
    regressed: int


@dataclass(frozen=True)
class ScoreVector:
    """Codec of the evaluation sum, on Z_2^32.

    Attributes
    ----------
    owners : int
        Size of the cohort.
    """

    owners: int

    @property
    def ring(self) -> Ring:
        """The ring; value bits are those of one limb."""
        return Ring(_SCORE_RING_BITS, self._limbs.limb_bits, LOSS_LIMIT)

    @cached_property
    def _limbs(self) -> Limbs:
        fields = (
            ("owners", 1), ("records", _RECORD_BITS), ("candidate_loss", _LOSS_BITS), ("head_loss", _LOSS_BITS),
            ("delta", _LOSS_BITS + 1), ("delta_sq", 2 * _LOSS_BITS), ("regressed", 1),
        )  # fmt: skip
        return Limbs(_SCORE_RING_BITS, self.owners, fields)

    @property
    def entries(self) -> int:
        """Ring entries of the vector."""
        return self._limbs.entries

    def encode(self, scores: OwnerScores, rng: Rng) -> NDArray[np.uint32]:
        """Return one owner's vector, shape ``(entries,)``.

        Losses are stochastically rounded to 2^-20; delta and its square are computed from the rounded losses,
        so that the variance over owners is exact.

        Raises
        ------
        NonFiniteUpdate
            If a loss is NaN or infinite.
        ConfigError
            If the record count does not fit 32 bits.
        """
        candidate, head = _loss_units(scores.candidate_loss, rng), _loss_units(scores.head_loss, rng)
        delta = candidate - head
        return self._limbs.encode(
            {
                "owners": 1,
                "records": scores.records,
                "candidate_loss": candidate,
                "head_loss": head,
                "delta": delta + (1 << _LOSS_BITS),
                "delta_sq": delta * delta,
                "regressed": int(scores.candidate_loss - scores.head_loss > REGRESSED_BY),
            }
        )

    def decode(self, total: NDArray[np.uint32], survivors: int) -> ScoreSum:
        """Return means over the survivors; raise `IntegrityError` if masks did not cancel."""
        check_total(total, self.entries)
        sums = self._limbs.decode(total, survivors)
        check_owners(sums["owners"], survivors)
        delta = sums["delta"] - (survivors << _LOSS_BITS)
        spread = survivors * sums["delta_sq"] - delta * delta  # n(n-1) times the sample variance, in units²
        if spread < 0:
            raise IntegrityError("the summed squares of delta are smaller than the square of its sum allows")
        variance = spread / (survivors * (survivors - 1)) if survivors > 1 else 0.0
        return ScoreSum(
            owners=survivors,
            records=sums["records"],
            candidate_loss=sums["candidate_loss"] * LOSS_UNIT / survivors,
            head_loss=sums["head_loss"] * LOSS_UNIT / survivors,
            delta=delta * LOSS_UNIT / survivors,
            delta_std=math.sqrt(variance) * LOSS_UNIT,
            regressed=sums["regressed"],
        )


def _loss_units(loss: float, rng: Rng) -> int:
    if not math.isfinite(loss):
        raise NonFiniteUpdate("a loss is NaN or infinite; a finite mean token loss is needed")
    scaled = min(max(loss, 0.0), LOSS_LIMIT) / LOSS_UNIT
    units = math.floor(scaled)
    units += float(uniform_floats(rng, 1)[0]) < scaled - units
    return min(units, (1 << _LOSS_BITS) - 1)


def check_total(total: NDArray[np.uint32], entries: int) -> None:
    """Raise `IntegrityError` unless an opened sum has the length of its codec."""
    if total.shape != (entries,):
        raise IntegrityError(f"a sum of shape {total.shape}, ({entries},) expected")


def check_owners(found: int, survivors: int) -> None:
    """Raise `IntegrityError` unless the sum counts as many owners as survived."""
    if found != survivors:
        raise IntegrityError(
            f"the sum counts {found} owners, {survivors} survived: masks did not cancel",
            hint="an owner masked another plan or sent garbage; abort the round and retry",
        )
