"""Every `lora_apply` against the naive specification."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernels_mixes import MIXES, TOLERANCE, filled_stack, mix, scene
from fedllm import kernels
from fedllm.kernels import cpu, reference
from fedllm.kernels.segments import build_segments

RANKS = (1, 2, 3, 4, 5, 1, 2, 3)
SHAPES = [(1, 64, (64,)), (7, 65, (33, 9, 9)), (16, 48, (31,)), (17, 48, (31, 5)), (131, 40, (24, 8, 8))]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("popularity", MIXES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(dtype, popularity, shape) -> None:
    """Any mix of adapters and base, any odd shape, equals the token-by-token specification."""
    tokens, width, outs = shape
    batch = scene(mix(popularity, tokens, 8), filled_stack(RANKS, 5, width, outs, dtype))
    got = batch.y_TO.clone()
    kernels.lora_apply(got, batch.x_TD, batch.stack, batch.segments)
    assert batch.error(got) <= TOLERANCE[dtype]


@pytest.mark.parametrize("tokens", [5, 40])
def test_base_rows_are_not_even_touched(tokens: int) -> None:
    """A base row keeps its exact bits, a NaN, an infinity and a negative zero included."""
    stack = filled_stack((1, 2, 3, 1), 3, 16, (12,), torch.float32)
    slots = [-1 if t % 2 else t % 4 for t in range(tokens)]
    y = torch.zeros(tokens, 12)
    y[1] = float("nan")
    y[3, 0], y[3, 1] = float("inf"), -0.0
    before = y.clone()
    kernels.lora_apply(y, torch.ones(tokens, 16), stack, build_segments(slots))
    odd = torch.arange(1, tokens, 2)
    assert torch.equal(y[odd].view(torch.int32), before[odd].view(torch.int32))
    assert bool(torch.isfinite(y[::2]).all())


def test_a_poisoned_neighbour_does_not_leak() -> None:
    """One token's NaN input reaches no other token's row, in either way of computing."""
    stack = filled_stack((1, 2, 3, 1), 3, 16, (12,), torch.float32)
    for tokens in (4, 40):
        x = torch.ones(tokens, 16)
        x[0] = float("nan")
        y = torch.zeros(tokens, 12)
        kernels.lora_apply(y, x, stack, build_segments([t % 4 for t in range(tokens)]))
        assert bool(torch.isnan(y[0]).all())
        assert bool(torch.isfinite(y[1:]).all())


def test_an_overflowing_adapter_does_not_reach_its_neighbour() -> None:
    """A hostile adapter that overflows on everyone's tokens spoils only the rows that asked for it."""
    stack = filled_stack((1, 2), 2, 16, (12,), torch.float32)
    kernels.write_slot(stack, 0, [(torch.full((1, 16), 3e38), torch.full((12, 1), 3e38))], 1, 1.0)
    for tokens in (2, 40):
        y = torch.zeros(tokens, 12)
        kernels.lora_apply(y, torch.ones(tokens, 16), stack, build_segments([t % 2 for t in range(tokens)]))
        assert bool(torch.isfinite(y[1::2]).all())
        assert not bool(torch.isfinite(y[0::2]).any())


def test_rewriting_a_slot_leaves_nothing_behind() -> None:
    """A smaller adapter written over a bigger one is exactly that smaller adapter."""
    stack = filled_stack((1, 2, 3), 4, 8, (6,), torch.float32)
    a, b = torch.randn(1, 8), torch.randn(6, 1)
    kernels.write_slot(stack, 2, [(a, b)], 1, 2.0)
    x = torch.randn(3, 8)
    y = torch.zeros(3, 6)
    kernels.lora_apply(y, x, stack, build_segments([2, 2, 1]))
    assert torch.allclose(y[:2], 2.0 * (x[:2] @ a.T) @ b.T, atol=1e-5)
    kernels.write_slot(stack, 2, [], 0, 0.0)
    assert not stack.a_SPRD[2].any()
    assert not stack.b_PSRO[0][2].any()


def test_rank_above_the_stack_is_refused() -> None:
    """A slot never takes an adapter that is wider than its storage."""
    stack = kernels.new_stack(1, 2, 8, (6,), dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="rank 3 found, the stack holds up to 2"):
        kernels.write_slot(stack, 0, [(torch.zeros(3, 8), torch.zeros(6, 3))], 3, 1.0)


@pytest.mark.parametrize(
    ("slots", "padded"),
    [
        ([0, 1, 2], True),
        ([2, 0, 1, 0], True),
        ([0, -1, 1], True),
        ([0, 1] * 20, False),
        ([1, 1, 1], False),
        ([0, 7], False),
        ([0] * 9 + [1], True),
        ([0] * 9 + [3], False),
    ],
)
def test_both_ways_are_exercised(slots: list[int], padded: bool) -> None:
    """Few tokens of near slots go one way; many tokens, one slot or far slots the other; both are right."""
    segments = build_segments(slots)
    chosen = cpu.plan(segments, device="cpu")
    assert (chosen.padding is not None) == padded
    stack = filled_stack((1, 2, 3, 1, 2, 3, 1, 2), 3, 16, (12, 4), torch.float64)
    x = torch.randn(len(slots), 16, dtype=torch.float64)
    want, got = torch.zeros(2, len(slots), 16, dtype=torch.float64)
    reference.lora_apply(want, x, stack, segments)
    kernels.lora_apply(got, x, stack, chosen)
    assert torch.allclose(want, got, atol=1e-12)
