"""The Triton prefill kernels against the specification; see ``conftest.py`` for where this runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.kernels.triton_scene import DEVICE, RANKS, bits, computed, mutated, poisoned_stack

from benchmarks.kernels_mixes import MIXES, TOLERANCE, mix, scene
from fedllm.kernels import PlanBuffers, build_segments, triton_prefill, tuning

pytestmark = pytest.mark.usefixtures("nan_workspace")


@pytest.mark.parametrize(
    ("popularity", "dtype"),
    [*((name, torch.float32) for name in MIXES), ("with_base", torch.float16), ("with_base", torch.bfloat16)],
    ids=str,
)
def test_matches_reference(dtype: torch.dtype, popularity: str) -> None:
    """Any mix of adapters, ranks and base, in any dtype, with NaN in all memory that no adapter owns."""
    batch = scene(mix(popularity, 37, len(RANKS)), poisoned_stack(dtype=dtype))
    assert batch.error(computed(batch, "prefill")) <= TOLERANCE[dtype]


@pytest.mark.parametrize("slots", [[4], [0, 4, -1, 2] * 5], ids=str)
def test_real_widths_and_all_ranks(slots: list[int]) -> None:
    """Hidden 576; outputs of two tiles, one and a bit, and a single column; ranks up to 64; one token."""
    batch = scene(slots, poisoned_stack((1, 3, 8, 16, 64), 64, 576, (192, 130, 1)))
    assert batch.error(computed(batch, "prefill")) <= TOLERANCE[torch.float32]


@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    """Whatever the widths, ranks and slots are."""
    size = st.integers(1, 70)
    ranks = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=4), "ranks")
    widths = data.draw(st.lists(size, min_size=1, max_size=3), "widths")
    stack = poisoned_stack(ranks, max(1, *ranks, 0), data.draw(st.integers(1, 300), "width_in"), widths)
    batch = scene(data.draw(st.lists(st.integers(-1, len(ranks) - 1), min_size=1, max_size=40), "slots"), stack)
    assert batch.error(computed(batch, "prefill")) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("processors", [1, 8])
def test_splits_are_added_in_order(processors: int) -> None:
    """With one split and with two the result is right, and two runs have the same bits."""
    batch = scene([0, 5, -1, 5, 1, 2, 3], poisoned_stack(width_in=1100, widths=(9,)))
    plan = replace(PlanBuffers(7, 6, device=DEVICE).plan(batch.segments, way="prefill"), processors=processors)
    assert tuning.prefill(1100, 48, plan.tiles, 1, processors=processors).splits == (2 if processors == 8 else 1)
    got = computed(batch, "prefill", plan)
    assert batch.error(got) <= TOLERANCE[torch.float32]
    assert torch.equal(bits(got), bits(computed(batch, "prefill", plan)))


def test_a_captured_launch_serves_any_later_batch() -> None:
    """One plan of fixed size; refilling the block changes what the same launches compute."""
    stack = poisoned_stack()
    buffers = PlanBuffers(40, 6, device=DEVICE)
    captured = buffers.plan(build_segments([0]), way="prefill", fixed=True)
    for slots in ([5, 2] * 20, [-1, 3], [], [-1, -1]):
        batch = scene(slots, stack)
        buffers.plan(batch.segments, way="prefill", fixed=True)
        assert batch.error(computed(batch, "prefill", captured)) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("slots", [[], [-1, -1], [4, 4]], ids=["empty", "all base", "rank 0"])
def test_nothing_to_add_changes_nothing(slots: list[int]) -> None:
    """No adapted row: no bit of the output changes, a negative zero included."""
    batch = scene(slots, poisoned_stack(), poison=False)
    batch.y_TO[:, :3] = -0.0
    assert torch.equal(bits(computed(batch, "prefill")), bits(batch.y_TO))


def test_a_poisoned_neighbour_does_not_leak() -> None:
    """One token's NaN reaches no other row, not even one of its own tile."""
    batch = scene([3, 3, 5], poisoned_stack())
    batch.x_TD[1] = float("nan")
    got = computed(batch, "prefill")
    assert bool(torch.isnan(got[1]).all())
    assert bool(torch.isfinite(got[[0, 2]]).all())


MUTANTS = {
    "a split is forgotten": ("for split in range(SPLITS)", "for split in range(SPLITS - 1)"),
    "every split sums the same columns": ("columns = split * SPLIT_IN + k", "columns = k"),
    "the largest rank is used": ("rank = tl.load(ranks_ptr + slot)", "rank = MAX_RANK"),
    "only the first ranks are used": ("for r in range(0, rank, BLOCK_RANK)", "for r in range(0, 1, BLOCK_RANK)"),
    "rows are not scattered": ("y_rows = y_ptr + tokens * y_stride", "y_rows = y_ptr + rows * y_stride"),
    "rows are not gathered": ("x_rows = x_ptr + tokens[:, None]", "x_rows = x_ptr + rows[:, None]"),
    "a tile's end is not masked": ("live = nth < tl.load(work + max_tiles)", "live = nth < 2"),
    "dead tiles are computed": ("if tile >= tl.load(meta_ptr + 1):", "if tile > tl.load(meta_ptr + 1):"),
    "projections overlap": ("y_rows + STARTS[p]", "y_rows"),
    "the base output is dropped": ("(y + total)", "total"),
}


@pytest.mark.parametrize("name", ["nothing is wrong", *MUTANTS])
def test_these_checks_find_a_broken_kernel(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of ten mistakes is seen by the comparison that the tests above make."""
    old, new = MUTANTS.get(name, ("@triton.jit", "@triton.jit"))
    monkeypatch.setattr(tuning, "PREFILL_SPLIT_MIN_IN", 64)
    batch = scene([0, 5, -1, 0], poisoned_stack(width_in=150, widths=(9, 17)))
    buffers = PlanBuffers(4, 3, device=DEVICE)
    buffers._host_I[-buffers.max_tiles * 2 :] = 1  # the tile that is not live would compute one row
    plan = replace(buffers.plan(batch.segments, way="prefill", fixed=True), processors=8)
    got = batch.y_TO.clone()
    mutated(triton_prefill, old, new, tmp_path).apply(got, batch.x_TD, batch.stack, plan)
    assert (batch.error(got) <= TOLERANCE[torch.float32]) == (name not in MUTANTS)
