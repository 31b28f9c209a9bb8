"""Paged decode in Triton against the specification; see ``conftest.py`` for where this runs."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fedllm.kernels import triton_attention
from fedllm.kernels.attention import DecodeShape, new_decoder, paged_decode, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SIZE = 16
LENGTHS = (1, 16, 17, 130)


@dataclass
class Scene:
    """A cache with NaN wherever no sequence's token is, and queries with gaps between rows."""

    q: Tensor
    keys: Tensor
    values: Tensor
    blocks: Tensor
    contexts: Tensor


def scene(
    lengths: tuple[int, ...], heads: int, kv_heads: int, dim: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Scene:
    """Return random sequences in shuffled blocks; tables end in blocks full of NaN."""
    gen = torch.Generator().manual_seed(seed)
    width = max(lengths) // SIZE + 2
    count = len(lengths) * width
    cache = torch.full((2, count, SIZE, kv_heads, dim), float("nan"), dtype=dtype)
    blocks = torch.randperm(count, generator=gen).view(len(lengths), width)
    for row, length in enumerate(lengths):
        at = torch.arange(length)
        cache[:, blocks[row, at // SIZE], at % SIZE] = torch.randn(2, length, kv_heads, dim, generator=gen).to(dtype)
    fused = torch.randn(len(lengths), heads + 2 * kv_heads, dim, generator=gen).to(dtype).to(DEVICE)
    keys, values = cache.to(DEVICE)
    contexts = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    return Scene(fused[:, :heads], keys, values, blocks.to(DEVICE), contexts)


def both(it: Scene, *, splits: int, window: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the kernel's result and the specification's."""
    args = (it.q, it.keys, it.values, it.blocks, it.contexts)
    return triton_attention.paged_decode(*args, splits=splits, window=window), reference(*args, window=window)


def error(got: Tensor, want: Tensor) -> float:
    """Return the largest difference; NaN if there is one."""
    return float((got.float() - want.float()).abs().max())


@pytest.fixture(autouse=True)
def unset_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the kernels allocate is NaN until they write it."""
    empty = torch.empty

    def poisoned(*shape: int, **options: object) -> Tensor:
        return empty(*shape, **options).fill_(float("nan"))

    monkeypatch.setattr(triton_attention.torch, "empty", poisoned)


@pytest.mark.parametrize(
    ("dim", "dtype"),
    [*((dim, torch.float32) for dim in (64, 80, 96, 128)), (80, torch.float16), (80, torch.bfloat16)],
    ids=str,
)
def test_matches_the_specification(dim: int, dtype: torch.dtype) -> None:
    """Any head width and dtype, contexts around block borders, cut in more parts than some have tokens."""
    got, want = both(scene(LENGTHS, 4, 2, dim, dtype), splits=2)
    assert error(got, want) <= TOLERANCE[dtype]


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 2), (3, 3), (20, 1)])
def test_any_grouping_of_heads(heads: int, kv_heads: int) -> None:
    """One query head per key-value head, several, and more than a tile of rows."""
    got, want = both(scene((1, 70), heads, kv_heads, 64), splits=2)
    assert error(got, want) <= TOLERANCE[torch.float32]


def test_every_length() -> None:
    """Contexts of 1 to 130 tokens in one batch, at every place in a block."""
    got, want = both(scene(tuple(range(1, 131, 3)), 2, 1, 16), splits=1)
    assert error(got, want) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize(("window", "splits"), [(1, 1), (16, 3), (20, 1), (70, 2), (200, 2)])
def test_a_window_hides_what_lies_before_it(window: int, splits: int) -> None:
    """Only the last tokens are seen; a window above the context changes nothing."""
    it = scene(LENGTHS, 4, 1, 16)
    got, want = both(it, splits=splits, window=window)
    assert error(got, want) <= TOLERANCE[torch.float32]
    if window < 130:
        assert error(want, reference(it.q, it.keys, it.values, it.blocks, it.contexts)) > 0.1


@pytest.mark.parametrize("splits", [1, 3])
def test_a_poisoned_token_spoils_its_own_sequence_only(splits: int) -> None:
    """NaN within a context reaches every head of that sequence's group, and is not hidden by the other parts."""
    it = scene((130, 130), 4, 2, 16)
    it.keys[it.blocks[0, 1], 3, 1] = float("nan")
    got, want = both(it, splits=splits)
    assert bool(torch.isnan(got[0, 2:]).all())
    assert bool(torch.isfinite(got[0, :2]).all())
    assert error(got[1:], want[1:]) <= TOLERANCE[torch.float32]


def test_large_scores_do_not_overflow() -> None:
    """Scores of thousands: exponentials are taken below the largest one, in every part and between parts."""
    it = scene((130, 17), 2, 1, 16)
    it.q.mul_(1000.0)
    got, want = both(it, splits=3)
    assert error(got, want) <= 2e-3  # a score of thousands is itself off by 1e-4


def test_one_plan_serves_other_contexts() -> None:
    """Tables and contexts may change under a plan, as in a captured graph, and tables may be wider than needed."""
    first, second = scene((130, 5, 64), 4, 2, 16, seed=1), scene((3, 120, 40), 4, 2, 16, seed=2)
    shape = DecodeShape(4, 2, 16, SIZE, (None,), torch.float32, DEVICE)
    blocks = torch.zeros(3, 40, dtype=torch.int64, device=DEVICE)
    contexts = torch.ones(3, dtype=torch.int32, device=DEVICE)
    plan = new_decoder(shape, kind="triton").fixed(3, 40).plan(blocks, contexts)
    assert plan.splits > 1
    for it in (first, second):
        blocks[:, : it.blocks.shape[1]] = it.blocks
        contexts.copy_(it.contexts)
        want = reference(it.q, it.keys, it.values, it.blocks, it.contexts)
        assert error(paged_decode(it.q, it.keys, it.values, plan), want) <= TOLERANCE[torch.float32]


def test_unequal_layouts_are_refused() -> None:
    """One set of strides addresses keys and values."""
    it = scene((5,), 2, 1, 16)
    with pytest.raises(ValueError, match="equal strides"):
        triton_attention.paged_decode(
            it.q, it.keys, it.values.transpose(0, 1).contiguous().transpose(0, 1), it.blocks, it.contexts, splits=1
        )
