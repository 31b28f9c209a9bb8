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
from fedllm.rng import KEY_BYTES, Rng, WordStream

RING_BITS = (8, 16, 24, 32)
MIN_VALUE_BITS = 2
_BLOCK = 1 << 15
_UNIT = 2.0**-32


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
        Values beyond are clipped, and counted.
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
        """Return the values as integers in ``[0, 2 * levels]``, stochastically rounded; see `encode_into`."""
        encoded = np.empty(x.shape[0], dtype=np.uint32)
        self.encode_into(encoded, x, rng)
        return encoded

    def encode_into(self, out: NDArray[np.uint32], x: NDArray[np.floating], rng: Rng, *, weight: float = 1.0) -> int:
        """Write ``weight * x`` to `out` as integers in ``[0, 2 * levels]``; return how many entries were clipped.

        Stochastic rounding is ``floor(value + u)`` with u uniform on 2^32 steps of [0, 1): it rounds up with a
        probability equal to the fraction, so that the error of a mean shrinks with the number of owners instead of
        staying at the rounding bias. Values on the grid, zero above all, are kept exactly.

        Parameters
        ----------
        out : NDArray[uint32]
            Shape ``(d,)``.
        x : NDArray[floating]
            Shape ``(d,)``.
        rng : Rng
            Gives the 32-byte key of the AES-256-CTR stream that rounds this array.
        weight : float
            Positive.

        Raises
        ------
        NonFiniteUpdate
            If an entry is NaN or infinite; the message counts them and never shows a value.
        """
        stream = WordStream(rng.token(KEY_BYTES))  # ten times as fast as drawing every word from the OS
        buffer = bytearray(4 * _BLOCK)
        raw, draws = memoryview(buffer), np.frombuffer(buffer, dtype="<i4")
        wide, unit = np.empty(_BLOCK), np.empty(_BLOCK)
        top = np.uint32(2 * self.levels)
        clipped = 0
        for at in range(0, x.shape[0], _BLOCK):
            part = x[at : at + _BLOCK]
            value, u = wide[: part.size], unit[: part.size]
            clipped += self._scale(value, part, weight, at)
            stream.fill(raw[: 4 * part.size])
            # Signed words are uniform on [-1/2, 1/2): half a step and one conversion that every processor has.
            np.multiply(draws[: part.size], _UNIT, out=u)
            value += u
            lanes = out[at : at + part.size]
            # Positive from here on, so that the cast's truncation is the floor; 33 bits would not fit a signed word.
            np.copyto(lanes.view(np.int32) if self.value_bits < max(RING_BITS) else lanes, value, casting="unsafe")
            np.minimum(lanes, top, out=lanes)  # a product may land one unit in the last place beyond the grid
        return clipped

    def _scale(self, out: NDArray[np.float64], part: NDArray[np.floating], weight: float, at: int) -> int:
        """Write the block in steps, clipped, and moved by ``levels + 1/2``; return how many entries were clipped."""
        low, high = float(part.min()), float(part.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            _refuse_non_finite(part, at)
        out[:] = part
        clipped = 0
        if weight * high > self.clip_range or weight * low < -self.clip_range:
            out *= weight
            clipped = int(np.count_nonzero(np.abs(out) > self.clip_range))
            np.clip(out, -self.clip_range, self.clip_range, out=out)
            out /= self.step
        else:
            out *= weight / self.step
        out += self.levels + 0.5
        return clipped

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


def _refuse_non_finite(part: NDArray[np.floating], at: int) -> None:
    bad = int(part.size - np.count_nonzero(np.isfinite(part)))
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
