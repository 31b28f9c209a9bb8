"""Which token of a batch uses which adapter slot: computed once a step, shared by every layer.

Vocabulary (Punica, arXiv 2310.18547; S-LoRA, arXiv 2311.03285): a *segment* is the run of tokens, after a
stable sort by slot, that use one slot. Slot ``-1`` is the base model and never gets a segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BASE_SLOT = -1


@dataclass(frozen=True)
class Segments:
    """Tokens of one batch grouped by adapter slot.

    Parameters
    ----------
    token_slots : NDArray[np.int64]
        Shape ``(T,)``; slot of each token, ``-1`` for the base model.
    order : NDArray[np.int64]
        Shape ``(L,)``; indices of the `L` tokens that use an adapter, sorted by slot, ties in batch order.
    slots : tuple of int
        Live slots, ascending.
    starts : tuple of int
        ``len(slots) + 1`` offsets into `order`; segment `i` is ``order[starts[i]:starts[i + 1]]``.
    """

    token_slots: NDArray[np.int64]
    order: NDArray[np.int64]
    slots: tuple[int, ...]
    starts: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Number of tokens in the batch."""
        return int(self.token_slots.shape[0])

    @property
    def adapted(self) -> int:
        """Number of tokens that use an adapter."""
        return self.starts[-1]

    @property
    def ordered(self) -> bool:
        """Whether the sort moved nothing: every token is adapted and slots already ascend."""
        return self.adapted == self.tokens and bool(np.all(self.token_slots[1:] >= self.token_slots[:-1]))


def build_segments(token_slots: Sequence[int] | NDArray[np.int64]) -> Segments:
    """Group a batch's tokens by slot.

    Parameters
    ----------
    token_slots : sequence of int
        Slot of each token; ``-1`` is the base model.

    Raises
    ------
    ValueError
        If a slot is below ``-1``.
    """
    slots_T = np.asarray(token_slots, dtype=np.int64)
    if slots_T.size and int(slots_T.min()) < BASE_SLOT:
        raise ValueError(f"slot {int(slots_T.min())} found, slots count from 0 and {BASE_SLOT} is the base")
    order = np.argsort(slots_T, kind="stable")
    order = order[int(np.count_nonzero(slots_T == BASE_SLOT)) :]
    live, counts = np.unique(slots_T[order], return_counts=True)
    starts = (0, *(int(n) for n in np.cumsum(counts)))
    return Segments(slots_T, order, tuple(int(s) for s in live), starts)
