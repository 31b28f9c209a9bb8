"""A batch's metadata for the Triton kernels: one int32 block of fixed size, written on the host, copied once.

The launch grid and every address depend on the block's capacity only, so that a CUDA graph captured once serves
any mix of adapters: what is live is read on the device. Triton itself is not needed here.

Layout: live rows, live tiles; token of each row; slot of each row; first row, count of rows and slot of each
tile. Rows are the adapted tokens sorted by slot; a tile is a run of rows of one slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedllm.kernels import tuning
from fedllm.kernels.segments import Segments
from fedllm.kernels.stack import LoraStack

HEADER = 2
TILE_FIELDS = 3
MAX_PROJECTIONS = 3
"""A fused ``qkv``; the kernels take one pointer to B for each."""
_INTERPRETED_PROCESSORS = 8


@dataclass(frozen=True)
class Plan:
    """What the kernels need of a batch; made once a step.

    Parameters
    ----------
    meta_I : Tensor
        The int32 block on the device.
    max_rows, max_tiles : int
        Its capacity.
    rows, tiles : int
        Size of the launch grid: what is live, or in a captured graph the capacity.
    block_rows : int
        Rows of a tile.
    way : {"decode", "prefill"}
        Which kernels.
    processors : int
        Multiprocessors of the device.
    """

    meta_I: Tensor  # noqa: N815
    max_rows: int
    max_tiles: int
    rows: int
    tiles: int
    block_rows: int
    way: tuning.Way
    processors: int


class PlanBuffers:
    """The block on the host and on the device, refilled every step.

    Parameters
    ----------
    max_tokens : int
        Most adapted tokens of a batch.
    max_segments : int
        Most slots that one batch uses.
    device : str or torch.device
        Where the activations are.
    """

    def __init__(self, max_tokens: int, max_segments: int, *, device: str | torch.device) -> None:
        self.max_tokens = max_tokens
        self.max_segments = max_segments
        self.max_tiles = max_tokens // min(tuning.PREFILL_BLOCK_ROWS) + max_segments
        size = HEADER + 2 * max_tokens + TILE_FIELDS * self.max_tiles
        self._device = torch.device(device)
        cuda = self._device.type == "cuda"
        self._host_I = torch.zeros(size, dtype=torch.int32, pin_memory=cuda)
        self.meta_I = torch.zeros(size, dtype=torch.int32, device=self._device)
        self._copied = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]
        self._processors = processors(self._device)

    def plan(self, segments: Segments, *, way: tuning.Way | None = None, fixed: bool = False) -> Plan:
        """Write a batch into the block and return its plan.

        Parameters
        ----------
        segments : Segments
            Slot of each token.
        way : {"decode", "prefill"}, optional
            Which kernels; by default `tuning.choose_way`'s. A row's bits do not depend on the rest of its batch
            as long as the way is ``"decode"``.
        fixed : bool
            For capture in a CUDA graph: choose everything, the size of the grid included, by the capacity. Later
            calls with the same `way` and `fixed` then change what the captured launches compute.

        Raises
        ------
        ValueError
            If the batch exceeds the capacity.
        """
        rows, live = segments.adapted, len(segments.slots)
        if rows > self.max_tokens or live > self.max_segments:
            raise ValueError(
                f"{rows} adapted tokens of {live} slots found, up to {self.max_tokens} of {self.max_segments} allowed"
            )
        shape = (self.max_tokens, self.max_segments) if fixed else (rows, live)
        way, size = way or tuning.choose_way(*shape), tuning.block_rows(*shape)
        tiles = self._write(segments, size)
        return Plan(
            self.meta_I,
            self.max_tokens,
            self.max_tiles,
            self.max_tokens if fixed else rows,
            self.max_tiles if fixed else tiles,
            size,
            way,
            self._processors,
        )

    def _write(self, segments: Segments, size: int) -> int:
        tiles_3M = _tiles(segments, size)
        rows, tiles = segments.adapted, int(tiles_3M.shape[1])
        if self._copied is not None:
            self._copied.synchronize()  # the last copy may still be reading the host's block
        block = self._host_I.numpy()
        block[0], block[1] = rows, tiles
        start = HEADER
        for values in (segments.order, segments.token_slots[segments.order]):
            block[start : start + rows] = values
            start += self.max_tokens
        for field in tiles_3M:
            block[start : start + tiles] = field
            start += self.max_tiles
        self.meta_I.copy_(self._host_I, non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self.meta_I.device))
        return tiles


def plan(segments: Segments, *, device: str | torch.device) -> Plan:
    """Return a plan with buffers of its own, just large enough."""
    return PlanBuffers(segments.adapted, len(segments.slots), device=device).plan(segments)


def check_shapes(y_TO: Tensor, x_TD: Tensor, stack: LoraStack) -> None:
    """Refuse what the kernels would read or write out of place.

    Raises
    ------
    ValueError
        If a shape, a dtype or a memory layout is not the one that the kernels address.
    """
    width_in, widths = stack.a_SPRD.shape[3], stack.widths
    if x_TD.shape[1] != width_in or y_TO.shape != (x_TD.shape[0], sum(widths)):
        raise ValueError(
            f"x {tuple(x_TD.shape)} and y {tuple(y_TO.shape)} found, the stack maps {width_in} to {sum(widths)}"
        )
    if not (y_TO.dtype == x_TD.dtype == stack.a_SPRD.dtype):
        raise ValueError(f"dtypes {x_TD.dtype}, {y_TO.dtype} and {stack.a_SPRD.dtype} found, one is allowed")
    if y_TO.stride(1) != 1 or x_TD.stride(1) != 1:
        raise ValueError("x and y must have contiguous rows")
    if len(widths) > MAX_PROJECTIONS:
        raise ValueError(f"{len(widths)} projections found, up to {MAX_PROJECTIONS} are computed together")


def workspace(rows: int, stack: LoraStack, parts: int) -> Tensor:
    """Return unset memory for partial sums, float32 of shape ``(rows, projections, parts, max_rank)``.

    Taken from torch's allocator at every call: it knows which memory belongs to which captured graph.
    """
    shape = (rows, len(stack.b_PSRO), parts, stack.max_rank)
    return torch.empty(shape, dtype=torch.float32, device=stack.a_SPRD.device)


def constants(stack: LoraStack, block_rank: int) -> dict[str, int | bool]:
    """Return the compile-time arguments that every launch over a stack has, Triton's own options among them."""
    return {
        "PROJECTIONS": len(stack.b_PSRO),
        "MAX_RANK": stack.max_rank,
        "BLOCK_RANK": block_rank,
        "num_warps": tuning.WARPS,
        "enable_fp_fusion": True,  # Triton's default is about to change
    }


def output_tiles(widths: Sequence[int], block_out: int) -> dict[str, tuple[int, ...]]:
    """Return how one launch covers the outputs of all projections, as compile-time arguments.

    Parameters
    ----------
    widths : Sequence[int]
        Outputs of each projection.
    block_out : int
        Outputs of a tile; no tile has outputs of two projections.

    Returns
    -------
    dict
        ``WIDTHS``; ``STARTS``, each projection's first column in y; ``FIRST_TILES``, its first tile, and last the
        number of all tiles.
    """
    return {
        "WIDTHS": tuple(widths),
        "STARTS": tuple(accumulate(widths[:-1], initial=0)),
        "FIRST_TILES": tuple(accumulate((-(-width // block_out) for width in widths), initial=0)),
    }


@lru_cache
def processors(device: torch.device) -> int:
    """Return the device's multiprocessors; a small number where Triton is interpreted."""
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _tiles(segments: Segments, size: int) -> NDArray[np.int64]:
    """Return first row, count and slot of each tile of up to `size` rows, shape ``(3, tiles)``."""
    starts_G = np.array(segments.starts[:-1], dtype=np.int64)
    counts_G = np.diff(segments.starts)
    tiles_G = -(-counts_G // size)
    owner_M = np.repeat(np.arange(len(segments.slots)), tiles_G)
    nth_M = np.arange(owner_M.size) - np.repeat(np.cumsum(tiles_G) - tiles_G, tiles_G)
    first_M = starts_G[owner_M] + nth_M * size
    count_M = np.minimum(size, counts_G[owner_M] - nth_M * size)
    return np.stack([first_M, count_M, np.array(segments.slots, dtype=np.int64)[owner_M]])
