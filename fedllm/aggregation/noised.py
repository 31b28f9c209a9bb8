"""What is in the masked sum of a round whose noise is added in the ring: noised integers, and who is in it.

::

    clipped and noised update in grid steps (d entries, signed, modulo 2^bits) | owners | weight

Nothing else may travel: every number that an update decides, the share of clipped entries too, would be a release
outside the noise. Wrapping around modulo 2^bits is post-processing of the noised integers, so that a noise larger
than the ring spoils the sum and never the privacy; `headroom` makes that as good as impossible.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fedllm.aggregation.fixedpoint import Limbs
from fedllm.aggregation.vector import WEIGHT_UNIT, UpdateSum, check_owners, check_total
from fedllm.errors import ConfigError, IntegrityError
from fedllm.messages.mechanism import Mechanism

NOISE_WIDTH = 12.0
"""Standard deviations of noise that the ring has room for: beyond lie fewer than one in 10^32 Gaussian draws."""


def needed_bits(owners: int, clip_steps: int, noise_std: float) -> int:
    """Return the least B with room for the sum of `owners` clipped updates and its noise, signed, in Z_2^B."""
    return (owners * clip_steps + round(NOISE_WIDTH * noise_std)).bit_length() + 1


@dataclass(frozen=True)
class NoisedVector:
    """Codec of the update sum under noise shares.

    Attributes
    ----------
    ring_bits : int
    owners : int
        Size of the cohort.
    layout_size : int
        Entries of the flat update.
    clip_steps : int
        L2 norm, in grid steps, that no owner's update passes.
    clip_norm : float
        The same in the update's own units.
    noise_std : float
        Standard deviation, in grid steps, of the noise in the sum of the whole cohort.
    """

    ring_bits: int
    owners: int
    layout_size: int
    clip_steps: int
    clip_norm: float
    noise_std: float

    def __post_init__(self) -> None:
        """Refuse a ring that could overflow."""
        needed = needed_bits(self.owners, self.clip_steps, self.noise_std)
        if needed > self.ring_bits:
            raise ConfigError(
                f"{self.owners} owners of {self.clip_steps} grid steps with noise of {self.noise_std:.3g} need a ring"
                f" of {needed} bits, the plan has {self.ring_bits}",
                hint="take a wider ring, fewer value bits or less noise",
            )

    @classmethod
    def of(cls, mechanism: Mechanism, *, ring_bits: int, owners: int, layout_size: int) -> NoisedVector:
        """Return the codec of a round whose owners add noise shares.

        Raises
        ------
        ConfigError
            If the mechanism is for updates of another length, or the ring is too small.
        """
        if mechanism.shares is None or mechanism.shares.dimension != layout_size:
            raise ConfigError(f"mechanism {mechanism.kind!r} has no noise shares for updates of {layout_size} entries")
        return cls(
            ring_bits, owners, layout_size, mechanism.shares.clip_steps, mechanism.clip_norm, mechanism.sum_std(owners)
        )

    @cached_property
    def _limbs(self) -> Limbs:
        return Limbs(self.ring_bits, self.owners, (("owners", 1), ("weight", 31)))

    @property
    def entries(self) -> int:
        """Ring entries of the whole vector."""
        return self.layout_size + self._limbs.entries

    def encode(self, steps: NDArray[np.int64]) -> NDArray[np.uint32]:
        """Return one owner's vector, shape ``(entries,)``.

        Parameters
        ----------
        steps : NDArray[int64]
            The noised update in grid steps, shape ``(layout_size,)``.

        Raises
        ------
        ConfigError
            If it has another shape.
        """
        if steps.shape != (self.layout_size,):
            raise ConfigError(f"noised update of shape {steps.shape}, ({self.layout_size},) expected")
        vector = np.empty(self.entries, dtype=np.uint32)
        vector[: self.layout_size] = (steps & ((1 << self.ring_bits) - 1)).astype(np.uint32)
        vector[self.layout_size :] = self._limbs.encode({"owners": 1, "weight": round(1 / WEIGHT_UNIT)})
        return vector

    def decode(self, total: NDArray[np.uint32], survivors: int) -> UpdateSum:
        """Return the sum of the survivors' noised updates; every owner weighs 1.

        Raises
        ------
        IntegrityError
            If the owners' count differs from `survivors` or an entry is impossible: masks did not cancel.
        """
        check_total(total, self.entries)
        sums = self._limbs.decode(total[self.layout_size :], survivors)
        check_owners(sums["owners"], survivors)
        half = 1 << (self.ring_bits - 1)
        steps = (total[: self.layout_size].astype(np.int64) + half) % (2 * half) - half
        most = survivors * self.clip_steps + NOISE_WIDTH * self.noise_std
        if steps.size and int(np.abs(steps).max()) > most:
            raise IntegrityError(
                f"a summed entry is beyond what {survivors} clipped updates and their noise add up to",
                hint="an owner masked another plan or sent garbage; abort the round and retry",
            )
        return UpdateSum(
            update=steps.astype(np.float64) * (self.clip_norm / self.clip_steps),
            weight=sums["weight"] * WEIGHT_UNIT,
            owners=survivors,
            records=None,
            train_loss=None,
            saturated=None,
        )
