"""Block sizes and split-K of the Triton kernels: figures as data, and the rules that choose among them.

Pure functions of shapes, without torch. The figures come from counting bytes and programs; no GPU has measured
them yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Way = Literal["decode", "prefill"]

DECODE_ROWS = 16
"""Up to this many adapted rows, each is a program of its own whatever its neighbours."""
DECODE_ROWS_PER_SEGMENT = 4
"""Beyond that: more rows per adapter than this fill enough of a 16-row tile to share one read of its factors."""
DECODE_BLOCK_IN = 256
"""Columns of A that a program loads at once: 512 bytes of bfloat16 a row, one row a warp."""
DECODE_PARTS = 16
"""Most partial sums a row keeps; the expansion reads them all again in every tile of outputs."""
DECODE_BLOCK_OUT = 128
PREFILL_BLOCK_ROWS = (16, 32, 64)
PREFILL_BLOCK_IN = 64
PREFILL_BLOCK_OUT = 128
PREFILL_SPLITS = 8
PREFILL_SPLIT_MIN_IN = 512
"""A split sums at least this many columns, or its start costs more than its work."""
RANK_BLOCKS = (16, 32)
"""Ranks computed at once: a tensor core's smallest tile, or two of them for stacks of larger adapters."""
PROGRAMS_PER_PROCESSOR = 4
"""Programs in flight that hide a multiprocessor's memory latency."""
WARPS = 4


@dataclass(frozen=True)
class DecodeTuning:
    """How the decode kernels cut one layer group.

    Parameters
    ----------
    part : int
        Input columns summed into one partial sum, a multiple of `block_in`. A function of the layer alone: which
        sums are made, and in which order they are added, must not depend on a row's batch mates.
    parts : int
        Partial sums of one row.
    splits : int
        Programs that share a row's parts.
    block_in, block_rank, block_out : int
        Columns, ranks and outputs that a program holds at once.
    """

    part: int
    parts: int
    splits: int
    block_in: int
    block_rank: int
    block_out: int


@dataclass(frozen=True)
class PrefillTuning:
    """How the prefill kernels cut one layer group.

    Parameters
    ----------
    splits : int
        Programs that share a tile's input columns; as many partial sums.
    split_in : int
        Columns of one split, a multiple of `block_in`.
    block_in, block_rank, block_out : int
        Columns, ranks and outputs that a program holds at once.
    """

    splits: int
    split_in: int
    block_in: int
    block_rank: int
    block_out: int


def choose_way(rows: int, segments: int) -> Way:
    """Return which kernels compute a batch of `rows` adapted tokens of `segments` adapters."""
    few = rows <= DECODE_ROWS or rows <= DECODE_ROWS_PER_SEGMENT * segments
    return "decode" if few else "prefill"


def block_rows(rows: int, segments: int) -> int:
    """Return the rows of a prefill tile: the largest that an average segment fills."""
    mean = rows / max(1, segments)
    return max((size for size in PREFILL_BLOCK_ROWS if size <= mean), default=PREFILL_BLOCK_ROWS[0])


def decode(width_in: int, max_rank: int, rows: int, projections: int, *, processors: int) -> DecodeTuning:
    """Cut a layer group for `rows` rows, each with an adapter of its own.

    Parameters
    ----------
    width_in : int
        Input columns of the group.
    max_rank : int
        Largest rank that the stack holds.
    rows : int
        Live rows, or the most that a captured graph serves.
    projections : int
        Projections of the group.
    processors : int
        Multiprocessors of the device.
    """
    blocks = _cdiv(width_in, DECODE_BLOCK_IN)
    part = DECODE_BLOCK_IN * _cdiv(blocks, DECODE_PARTS)
    parts = _cdiv(width_in, part)
    wanted = _cdiv(PROGRAMS_PER_PROCESSOR * processors, max(1, rows * projections))
    splits = _cdiv(parts, _cdiv(parts, min(wanted, parts)))  # none is left without a part
    return DecodeTuning(part, parts, splits, DECODE_BLOCK_IN, _block_rank(max_rank), DECODE_BLOCK_OUT)


def prefill(width_in: int, max_rank: int, tiles: int, projections: int, *, processors: int) -> PrefillTuning:
    """Cut a layer group for `tiles` tiles of rows; the other parameters are `decode`'s."""
    wanted = PROGRAMS_PER_PROCESSOR * processors // max(1, tiles * projections)
    splits = max(1, min(wanted, PREFILL_SPLITS, width_in // PREFILL_SPLIT_MIN_IN))
    blocks = _cdiv(width_in, PREFILL_BLOCK_IN)
    split_in = PREFILL_BLOCK_IN * _cdiv(blocks, splits)
    return PrefillTuning(
        _cdiv(width_in, split_in), split_in, PREFILL_BLOCK_IN, _block_rank(max_rank), PREFILL_BLOCK_OUT
    )


def _block_rank(max_rank: int) -> int:
    return RANK_BLOCKS[0] if max_rank <= RANK_BLOCKS[0] else RANK_BLOCKS[-1]


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
