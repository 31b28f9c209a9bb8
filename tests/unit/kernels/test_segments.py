"""Segment metadata."""

from __future__ import annotations

import pytest

from fedllm.kernels.segments import build_segments


def test_groups_by_slot_and_skips_base() -> None:
    """Tokens are sorted by slot, in batch order within a slot; base tokens are left out."""
    seg = build_segments([2, -1, 0, 2, 0])
    assert seg.slots == (0, 2)
    assert seg.starts == (0, 2, 4)
    assert seg.order.tolist() == [2, 4, 0, 3]
    assert (seg.tokens, seg.adapted, seg.ordered) == (5, 4, False)


@pytest.mark.parametrize("slots", [[], [-1, -1]])
def test_nothing_adapted(slots: list[int]) -> None:
    """An empty or all-base batch has no segment."""
    seg = build_segments(slots)
    assert seg.slots == ()
    assert seg.adapted == 0


def test_negative_slots_are_refused() -> None:
    """Only -1 stands for the base: any other negative index would silently select a wrong row."""
    with pytest.raises(ValueError, match="-2"):
        build_segments([0, -2])
