"""The Triton kernels' metadata, and the choice of kernels by device."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedllm import kernels
from fedllm.kernels import PlanBuffers, build_segments, cpu, triton_plan


@given(slots=st.lists(st.integers(-1, 9), max_size=80), spare=st.integers(0, 5))
def test_the_block_names_every_adapted_token_once(slots: list[int], spare: int) -> None:
    """Rows list the adapted tokens by slot; tiles cut them, never across two slots, none empty or too large."""
    segments = build_segments(slots)
    buffers = PlanBuffers(segments.adapted + spare, len(segments.slots) + spare, device="cpu")
    plan = buffers.plan(segments)
    block = plan.meta_I.numpy()
    assert tuple(block[:2]) == (plan.rows, plan.tiles)
    tokens = block[2 : 2 + plan.rows]
    row_slots = block[2 + plan.max_rows :][: plan.rows]
    assert sorted(tokens) == [i for i, slot in enumerate(slots) if slot >= 0]
    assert [slots[t] for t in tokens] == list(row_slots) == sorted(row_slots)
    tiles_3M = block[2 + 2 * plan.max_rows :].reshape(3, -1)[:, : plan.tiles]
    covered = []
    for first, count, slot in tiles_3M.T:
        assert 1 <= count <= plan.block_rows
        assert set(row_slots[first : first + count]) == {slot}
        covered += range(first, first + count)
    assert covered == list(range(plan.rows))


def test_the_largest_batch_fits() -> None:
    """A segment of one row and one of the rest need as many tiles as the capacity foresees."""
    buffers = PlanBuffers(34, 3, device="cpu")
    plan = buffers.plan(build_segments([0, 1] + [2] * 32))
    assert plan.tiles <= plan.max_tiles


@pytest.mark.parametrize("slots", [[0] * 5, [0, 1, 2]], ids=["tokens", "slots"])
def test_a_batch_beyond_the_capacity_is_refused(slots: list[int]) -> None:
    """More tokens or more slots than the block has room for; base tokens take none."""
    buffers = PlanBuffers(4, 2, device="cpu")
    buffers.plan(build_segments([0, 1, 1, 1] + [-1] * 9))
    with pytest.raises(ValueError, match="up to 4 of 2 allowed"):
        buffers.plan(build_segments(slots))


def test_a_fixed_plan_does_not_depend_on_the_batch() -> None:
    """What a captured graph bakes in, the same for an empty batch and a full one; the block stays where it is."""
    buffers = PlanBuffers(40, 4, device="cpu")
    plans = [buffers.plan(build_segments(slots), fixed=True) for slots in ([], [0], [3, 2] * 20)]
    shapes = {(p.rows, p.tiles, p.block_rows, p.way, p.meta_I.data_ptr()) for p in plans}
    assert len(shapes) == 1


def test_the_device_chooses_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU gets the plan of plain torch, CUDA gets Triton's."""
    segments = build_segments([0, 1])
    assert isinstance(kernels.plan_lora(segments, device="cpu"), cpu.Plan)
    monkeypatch.setattr(triton_plan, "PlanBuffers", lambda *_, device: PlanBuffers(2, 2, device="cpu"))
    assert isinstance(kernels.plan_lora(segments, device="cuda:0"), triton_plan.Plan)


def test_ranks_on_the_device_follow_the_slots() -> None:
    """The tensor that kernels read equals the list, after a slot is written and emptied."""
    stack = kernels.new_stack(3, 4, 8, (6,), dtype=torch.float32, device="cpu")
    kernels.write_slot(stack, 1, [(torch.ones(3, 8), torch.ones(6, 3))], 3, 1.0)
    kernels.write_slot(stack, 2, [(torch.ones(2, 8), torch.ones(6, 2))], 2, 1.0)
    kernels.write_slot(stack, 2, [], 0, 0.0)
    assert stack.ranks_S.tolist() == stack.ranks == [0, 3, 0]
    assert stack.ranks_S.numpy().dtype == np.int32


@given(widths=st.lists(st.integers(1, 300), min_size=1, max_size=4), block=st.sampled_from([16, 32, 64]))
def test_a_launch_covers_every_output_of_every_projection_once(widths: list[int], block: int) -> None:
    """Tiles of a projection begin where those of the one before end, and none has outputs of two."""
    tiles = triton_plan.output_tiles(widths, block)
    covered = []
    for number, width in enumerate(widths):
        count = tiles["FIRST_TILES"][number + 1] - tiles["FIRST_TILES"][number]
        columns = [tiles["STARTS"][number] + c for c in range(count * block) if c < width]
        assert (count - 1) * block < width <= count * block
        covered += columns
    assert covered == list(range(sum(widths)))
    assert tiles["WIDTHS"] == tuple(widths)


def test_tiles_of_the_usual_projections_are_known() -> None:
    """Queries, keys and values of SmolLM2 at 64 outputs a tile."""
    known = {"WIDTHS": (576, 192, 192), "STARTS": (0, 576, 768), "FIRST_TILES": (0, 9, 12, 15)}
    assert triton_plan.output_tiles((576, 192, 192), 64) == known
