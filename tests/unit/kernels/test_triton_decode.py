"""The Triton decode kernels against the specification; see ``conftest.py`` for where this runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.kernels.triton_scene import DEVICE, RANKS, bits, computed, mutated, poisoned_stack

from benchmarks.kernels_mixes import MIXES, TOLERANCE, mix, scene
from fedllm import kernels
from fedllm.kernels import PlanBuffers, build_segments, triton_decode, triton_plan, tuning, write_slot

pytestmark = pytest.mark.usefixtures("nan_workspace")


@pytest.mark.parametrize(
    ("popularity", "dtype"),
    [*((name, torch.float32) for name in MIXES), ("with_base", torch.float16), ("with_base", torch.bfloat16)],
    ids=str,
)
def test_matches_reference(dtype: torch.dtype, popularity: str) -> None:
    """Any mix of adapters, ranks and base, in any dtype, with NaN in all memory that no adapter owns."""
    batch = scene(mix(popularity, 6, len(RANKS)), poisoned_stack(dtype=dtype))
    assert batch.error(computed(batch, "decode")) <= TOLERANCE[dtype]


@pytest.mark.parametrize("slots", [[4], [0, 4, -1, 2]], ids=str)
def test_real_widths_and_all_ranks(slots: list[int]) -> None:
    """Hidden 576, three parts; outputs of two tiles, one and a bit, and a single column; ranks up to 64."""
    batch = scene(slots, poisoned_stack((1, 3, 8, 16, 64), 64, 576, (192, 130, 1)))
    assert batch.error(computed(batch, "decode")) <= TOLERANCE[torch.float32]


@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    """Whatever the widths, ranks and slots are."""
    size = st.integers(1, 70)
    ranks = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=4), "ranks")
    widths = data.draw(st.lists(size, min_size=1, max_size=3), "widths")
    stack = poisoned_stack(ranks, max(1, *ranks, 0), data.draw(st.integers(1, 300), "width_in"), widths)
    batch = scene(data.draw(st.lists(st.integers(-1, len(ranks) - 1), min_size=1, max_size=4), "slots"), stack)
    assert batch.error(computed(batch, "decode")) <= TOLERANCE[torch.float32]


def test_two_runs_have_the_same_bits() -> None:
    """Nothing is added in an order that time decides."""
    batch = scene([5, 0, 5, -1, 3], poisoned_stack(width_in=300))
    assert torch.equal(bits(computed(batch, "decode")), bits(computed(batch, "decode")))


def test_a_row_does_not_depend_on_its_batch() -> None:
    """Alone, in another order, or next to other rows and so with other splits: the same bits."""
    batch = scene([5, 0, 2, -1, 5, 3], poisoned_stack(width_in=300))
    got = computed(batch, "decode")
    assert torch.equal(bits(computed(batch.rows([4]), "decode")), bits(got[4:5]))
    assert torch.equal(bits(computed(batch.rows([4, 2, 0]), "decode")), bits(got[[4, 2, 0]]))


def test_any_split_has_the_same_bits() -> None:
    """Splits only share the parts out; what is summed, and in which order, stays."""
    batch = scene([3, 5], poisoned_stack(width_in=1100, widths=(9,)))
    plan = PlanBuffers(2, 6, device=DEVICE).plan(batch.segments, way="decode")
    outputs, splits = [], set()
    for processors in (1, 2, 10_000):
        outputs.append(computed(batch, "decode", replace(plan, processors=processors)))
        splits.add(tuning.decode(1100, 48, 2, 1, processors=processors).splits)
    assert splits == {2, 3, 5}
    assert all(torch.equal(bits(outputs[0]), bits(other)) for other in outputs[1:])


def test_a_captured_launch_serves_any_later_batch() -> None:
    """One plan of fixed size; refilling the block, or a slot, changes what the same launches compute."""
    stack = poisoned_stack()
    buffers = PlanBuffers(4, 6, device=DEVICE)
    captured = buffers.plan(build_segments([0]), way="decode", fixed=True)
    for slots in ([5, 2, 0, 2], [-1, 3], [], [-1, -1]):
        batch = scene(slots, stack)
        buffers.plan(batch.segments, way="decode", fixed=True)
        assert batch.error(computed(batch, "decode", captured)) <= TOLERANCE[torch.float32]
    write_slot(stack, 2, [(torch.ones(1, 70), torch.ones(o, 1)) for o in stack.widths], 1, 1.0)
    assert batch.error(computed(batch, "decode", captured)) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("slots", [[], [-1, -1], [4, 4]], ids=["empty", "all base", "rank 0"])
def test_nothing_to_add_changes_nothing(slots: list[int]) -> None:
    """No adapted row: no bit of the output changes, a negative zero included."""
    batch = scene(slots, poisoned_stack(), poison=False)
    batch.y_TO[:, :3] = -0.0
    assert torch.equal(bits(computed(batch, "decode")), bits(batch.y_TO))


def test_a_poisoned_neighbour_does_not_leak() -> None:
    """One token's NaN reaches no other row, not even one of the same adapter."""
    batch = scene([3, 3, 5], poisoned_stack())
    clean = computed(batch, "decode")
    batch.x_TD[1] = float("nan")
    got = computed(batch, "decode")
    assert torch.equal(bits(got[[0, 2]]), bits(clean[[0, 2]]))
    assert bool(torch.isnan(got[1]).all())


def test_what_the_kernels_cannot_address_is_refused() -> None:
    """A wrong width, two dtypes, strided rows and four projections fail before a launch."""
    batch = scene([0, 1], poisoned_stack())
    plan = triton_plan.plan(batch.segments, device="cpu")
    with pytest.raises(ValueError, match="maps 70 to 139"):
        kernels.lora_apply(batch.y_TO, batch.x_TD[:, :69], batch.stack, plan)
    with pytest.raises(ValueError, match="dtypes"):
        kernels.lora_apply(batch.y_TO.half(), batch.x_TD, batch.stack, plan)
    with pytest.raises(ValueError, match="contiguous"):
        kernels.lora_apply(batch.y_TO, batch.x_TD.T.contiguous().T, batch.stack, plan)
    four = scene([0], poisoned_stack(widths=(1, 1, 1, 1)))
    with pytest.raises(ValueError, match="4 projections found, up to 3"):
        kernels.lora_apply(four.y_TO, four.x_TD, four.stack, triton_plan.plan(four.segments, device="cpu"))


MUTANTS = {
    "the last part is forgotten": ("PARTS_PER_SPLIT, PARTS)", "PARTS_PER_SPLIT, PARTS - 1)"),
    "the parts are not all added": ("(parts < PARTS)[:, None]", "(parts < 1)[:, None]"),
    "the largest rank is used": ("rank = tl.load(ranks_ptr + slot)", "rank = MAX_RANK"),
    "ranks are not masked": ("live = ranks < rank", "live = ranks < MAX_RANK"),
    "rows are not scattered": ("y_row = y_ptr + token * y_stride", "y_row = y_ptr + row * y_stride"),
    "rows are not gathered": ("x_row = x_ptr + token * x_stride", "x_row = x_ptr + row * x_stride"),
    "dead rows are computed": ("if row >= tl.load(meta_ptr):", "if row > tl.load(meta_ptr):"),
    "projections overlap": ("y_row + STARTS[p]", "y_row"),
    "one projection's A is used": ("(slot * PROJECTIONS + projection) * MAX_RANK", "(slot * PROJECTIONS) * MAX_RANK"),
    "outputs are not masked": ("inside = outputs < WIDTH", "inside = outputs < WIDTH + 1"),
    "the base output is dropped": ("(y + total)", "total"),
}


@pytest.mark.parametrize("name", ["nothing is wrong", *MUTANTS])
def test_these_checks_find_a_broken_kernel(name: str, tmp_path: Path) -> None:
    """Each of eleven mistakes is seen by the comparison that the tests above make."""
    old, new = MUTANTS.get(name, ("@triton.jit", "@triton.jit"))
    batch = scene([3, -1, 0], poisoned_stack(width_in=300))
    plan = PlanBuffers(3, 6, device=DEVICE).plan(batch.segments, way="decode", fixed=True)
    got = batch.y_TO.clone()
    mutated(triton_decode, old, new, tmp_path).apply(got, batch.x_TD, batch.stack, plan)
    assert (batch.error(got) <= TOLERANCE[torch.float32]) == (name not in MUTANTS)
