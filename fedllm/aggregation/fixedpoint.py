"""Fixed point on the ring Z_2^B: stochastic rounding, and whole numbers spread over ring entries.

Sums are exact by construction: `check_capacity` refuses, before a round starts, every choice of owners, value
bits and ring in which a sum could wrap around.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedllm.errors import ConfigError, IntegrityError, NonFiniteUpdate
from fedllm.rng import KEY_BYTES, Rng, uniform_u32

RING_BITS = (8, 16, 24, 32)
MIN_VALUE_BITS = 2
_CHUNK = 1 << 15
_WORDS = 2.0**32


def required_bits(owners: int, value_bits: int) -> int:
    """Return the least B such that `owners` values of `value_bits` bits never wrap around in Z_2^B."""
    return (owners * ((1 << value_bits) - 1)).bit_length()


def check_capacity(owners: int, value_bits: int, ring_bits: int) -> None:
    """Return if the sum of `owners` values of `value_bits` bits fits a ring of `ring_bits` bits.

    Raises
    ------
    ConfigError
        If ``owners * (2**value_bits - 1) >= 2**ring_bits``, or the ring is not 8, 16, 24 or 32 bits.
    """
    if ring_bits not in RING_BITS:
        raise ConfigError(f"ring of {ring_bits} bits: {', '.join(map(str, RING_BITS))} allowed")
    needed = required_bits(owners, value_bits)
    if owners < 1 or needed > ring_bits:
        raise ConfigError(
            f"{owners} owners with {value_bits}-bit values need a ring of {needed} bits, the plan has {ring_bits}",
            hint="take a wider ring, fewer value bits or a smaller cohort",
        )


@dataclass(frozen=True)
class FixedPoint:
    """A symmetric grid of ``2 * levels + 1`` values on ``[-clip_range, clip_range]``, zero among them.

    Attributes
    ----------
    value_bits : int
        Bits of one encoded value, 2 to 32.
    clip_range : float
        Values beyond are clipped and counted by `saturation`.
    """

    value_bits: int
    clip_range: float

    def __post_init__(self) -> None:
        """Refuse a grid without a step."""
        if not MIN_VALUE_BITS <= self.value_bits <= max(RING_BITS):
            raise ConfigError(f"value_bits {self.value_bits}: {MIN_VALUE_BITS} to {max(RING_BITS)} allowed")
        if not (math.isfinite(self.clip_range) and self.clip_range > 0):
            raise ConfigError(f"clip_range {self.clip_range}: a positive number is needed")

    @property
    def levels(self) -> int:
        """Steps between zero and `clip_range`; an encoded value lies in ``[0, 2 * levels]``."""
        return (1 << (self.value_bits - 1)) - 1

    @property
    def step(self) -> float:
        """Distance of two neighbouring values; the rounding error of one entry is below it."""
        return self.clip_range / self.levels

    def encode(self, x: NDArray[np.floating], rng: Rng) -> NDArray[np.uint32]:
        """Return the values as integers in ``[0, 2 * levels]``, stochastically rounded.

        Rounds up with a probability equal to the fraction (to 2^-32), so that the error of a mean shrinks
        with the number of owners instead of staying at the rounding bias. Values on the grid, zero above all,
        are kept exactly.

        Parameters
        ----------
        x : NDArray[floating]
            Shape ``(d,)``.
        rng : Rng
            Gives the 32-byte key of the AES-256-CTR stream that rounds this array.

        Raises
        ------
        NonFiniteUpdate
            If an entry is NaN or infinite; the message counts them and never shows a value.
        """
        encoded = np.empty(x.shape[0], dtype=np.uint32)
        key = rng.token(KEY_BYTES)  # a keystream is ten times as fast as drawing every word from the OS
        for at in range(0, x.shape[0], _CHUNK):
            part = x[at : at + _CHUNK].astype(np.float64)
            _check_finite(part, at)
            scaled = np.clip(part, -self.clip_range, self.clip_range) / self.step
            low = np.floor(scaled)
            low += uniform_u32(key, part.size, offset=at) < (scaled - low) * _WORDS
            # The division may land one unit in the last place beyond the grid.
            np.clip(low + self.levels, 0, 2 * self.levels, out=low)
            encoded[at : at + _CHUNK] = low.astype(np.uint32)
        return encoded

    def saturation(self, x: NDArray[np.floating]) -> float:
        """Return the fraction of entries that `encode` clips; 0.0 of an empty array."""
        return float(np.count_nonzero(np.abs(x) > self.clip_range)) / x.size if x.size else 0.0

    def decode_sum(self, total: NDArray[np.uint32], owners: int) -> NDArray[np.float64]:
        """Return the sum over `owners` of the encoded values, float64.

        Raises
        ------
        IntegrityError
            If an entry is larger than `owners` encoded values can add up to: masks that did not cancel.
        """
        if total.size and int(total.max()) > owners * 2 * self.levels:
            raise IntegrityError(
                f"a summed entry is beyond what {owners} owners of {self.value_bits}-bit values can add up to",
                hint="an owner masked another plan or sent garbage; abort the round and retry",
            )
        return (total.astype(np.float64) - float(owners * self.levels)) * self.step


def _check_finite(part: NDArray[np.float64], at: int) -> None:
    bad = int(part.size - np.count_nonzero(np.isfinite(part)))
    if bad:
        raise NonFiniteUpdate(
            f"{bad} of {part.size} entries from {at} on are NaN or infinite; finite values are needed",
            hint="lower the learning rate, or look for an empty or malformed batch",
        )


@dataclass(frozen=True)
class Limbs:
    """Named whole numbers as ring entries, several entries (limbs, low first) for one number.

    A limb has ``ring_bits - bit_length(owners)`` bits, so that `owners` limbs never wrap around; the sum of a
    number is ``sum(limb_sum[k] << (k * limb_bits))``, exact.

    Attributes
    ----------
    ring_bits, owners : int
    bits : tuple[tuple[str, int], ...]
        Name and width of each number, in the order of the entries.
    """

    ring_bits: int
    owners: int
    bits: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        """Refuse a ring in which not even one bit can be summed."""
        check_capacity(self.owners, 1, self.ring_bits)
        if self.limb_bits < 1:
            raise ConfigError(f"ring of {self.ring_bits} bits has no room for the sum of {self.owners} owners")

    @property
    def limb_bits(self) -> int:
        """Bits of one owner's limb."""
        return self.ring_bits - self.owners.bit_length()

    @property
    def entries(self) -> int:
        """Ring entries of all numbers."""
        return sum(self._limbs(width) for _, width in self.bits)

    def _limbs(self, width: int) -> int:
        return -(-width // self.limb_bits)

    def encode(self, numbers: Mapping[str, int]) -> NDArray[np.uint32]:
        """Return one owner's numbers as entries; every number must fit its width (`ConfigError`)."""
        entries: list[int] = []
        for name, width in self.bits:
            number = numbers[name]
            if not 0 <= number < 1 << width:
                raise ConfigError(f"{name} does not fit the {width} bits that its sum has room for")
            mask = (1 << self.limb_bits) - 1
            entries += [number >> (k * self.limb_bits) & mask for k in range(self._limbs(width))]
        return np.array(entries, dtype=np.uint32)

    def decode(self, total: NDArray[np.uint32], survivors: int) -> dict[str, int]:
        """Return the exact sums; raise `IntegrityError` if one is more than `survivors` owners can reach."""
        sums: dict[str, int] = {}
        at = 0
        for name, width in self.bits:
            count = self._limbs(width)
            sums[name] = sum(int(limb) << (k * self.limb_bits) for k, limb in enumerate(total[at : at + count]))
            at += count
            if sums[name] > survivors * ((1 << width) - 1):
                raise IntegrityError(f"summed {name} is beyond what {survivors} owners can add up to")
        return sums
