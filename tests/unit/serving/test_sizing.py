"""What fits into a GPU, counted without one, and which captured graph serves which batch."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from unit.serving.tiny_families import CASES, HandDriven, make_family

from fedllm.errors import ConfigError
from fedllm.serving.native.families import LlamaConfig, Rope
from fedllm.serving.native.graphs import DecodeBatch, DecodeGraphs, batch_sizes, decode_graphs
from fedllm.serving.native.limits import EngineLimits
from fedllm.serving.native.sizing import (
    activation_bytes,
    block_bytes,
    fit_to_device,
    plan_memory,
    slot_bytes,
    weight_bytes,
)

LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope=Rope(500000.0),
    max_position_embeddings=131072,
)
LIMITS = EngineLimits(
    slots=32, max_rank=16, block_tokens=16, max_running=64, max_step_tokens=512, max_model_tokens=8192
)
GIB = 2**30


def test_llama_3_8b_is_as_large_as_published() -> None:
    """8.03 billion parameters; 128 KiB of cache a token in bfloat16; 84 MB of adapters a layer for 32 of rank 16."""
    assert weight_bytes(LLAMA_8B, 2) == 2 * 8_030_261_248
    assert block_bytes(LLAMA_8B, 16, 2) == 16 * 128 * 1024
    assert slot_bytes(LLAMA_8B, 16, 2) * 32 == 2_684_354_560  # 83.9 MB a layer


@pytest.mark.parametrize("case", ["llama-biases", "qwen2-tied", "qwen3", "mistral"])
def test_counted_bytes_are_those_of_the_tensors(tmp_path: Path, case: str) -> None:
    """Every family's weights, stacks and cache take exactly what is counted from its config."""
    make_family(tmp_path, case)
    model = HandDriven(tmp_path).model
    weights = model.weights
    head = [] if model.config.tied else [weights.head.weight]
    tensors = {id(t): t for t in (weights.embedding, weights.norm, *head)}
    for layer in weights.layers:
        parts = [layer.input_norm, layer.post_norm, layer.qk_norm_NH]
        parts += [t for linear in layer.linears.values() for t in (linear.weight, linear.bias)]
        tensors |= {id(t): t for t in parts if t is not None}
    assert sum(t.numel() for t in tensors.values()) * 4 == weight_bytes(model.config, 4)
    stacks = [stack for layer in model.lora for stack in layer.values()]
    factors = sum(s.a_SPRD.numel() + sum(b.numel() for b in s.b_PSRO) for s in stacks)
    assert factors * 4 == 2 * slot_bytes(model.config, 4, 4)
    assert model.cache.numel() * 4 == 161 * block_bytes(model.config, 4, 4)


def test_what_is_left_is_for_the_cache() -> None:
    """All parts and one scratch block stay within the share; one block more would not."""
    plan = plan_memory(LLAMA_8B, LIMITS, free_bytes=78 * GIB, element=2)
    used = plan.weights + plan.adapters + plan.activations + (plan.kv_blocks + 1) * plan.block
    assert used <= 0.9 * 78 * GIB < used + plan.block
    assert plan.kv_blocks > 20_000
    assert plan.activations == activation_bytes(LLAMA_8B, LIMITS, 2) < 4 * GIB


def test_a_gpu_s_free_memory_decides_and_a_cpu_s_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the number of cache blocks is changed, and only on a GPU."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (78 * GIB, 80 * GIB))
    assert fit_to_device(LLAMA_8B, LIMITS, element=2, device="cpu") is LIMITS
    fitted = fit_to_device(LLAMA_8B, LIMITS, element=2, device="cuda:0")
    assert fitted.kv_blocks == plan_memory(LLAMA_8B, LIMITS, free_bytes=78 * GIB, element=2).kv_blocks
    assert replace(fitted, kv_blocks=LIMITS.kv_blocks) == LIMITS


@given(
    free=st.integers(1 * GIB, 120 * GIB),
    slots=st.integers(1, 512),
    tokens=st.integers(16, 200_000),
    step=st.integers(64, 4096),
)
def test_a_plan_fits_or_its_advice_does(free: int, slots: int, tokens: int, step: int) -> None:
    """Either one request fits at least, or following the hint makes it fit, where the hint gives a number."""
    sizes = replace(LIMITS, slots=slots, max_model_tokens=tokens, max_step_tokens=step)
    for _ in range(2):
        try:
            plan = plan_memory(LLAMA_8B, sizes, free_bytes=free, element=2)
        except ConfigError as error:
            assert error.hint
            found = re.search(r"set (slots|max_model_tokens) to (\d+)", error.hint)
            if not found:
                return
            sizes = replace(sizes, **{found[1]: int(found[2])})
        else:
            assert plan.kv_blocks * 16 >= min(sizes.max_model_tokens, LLAMA_8B.max_position_embeddings)
            return
    pytest.fail(f"{sizes} does not fit either")


@pytest.mark.parametrize(
    ("free", "changes", "hint"),
    [
        (24 * GIB, {"slots": 64}, r"set slots to \d+ or less"),
        (20 * GIB, {"slots": 1, "max_model_tokens": 131072, "max_step_tokens": 64}, r"max_model_tokens to \d+ or less"),
        (12 * GIB, {}, r"the base and one slot need .* GiB"),
    ],
)
def test_too_much_is_refused_with_what_would_fit(free: int, changes: dict[str, int], hint: str) -> None:
    """Needed, allowed and free bytes are named with their parts."""
    with pytest.raises(ConfigError, match=r"GiB are needed, .* free memory may be used: 14.96 GiB weights") as refused:
        plan_memory(LLAMA_8B, replace(LIMITS, **changes), free_bytes=free, element=2)
    assert re.search(hint, refused.value.hint or "")


@pytest.mark.parametrize(
    ("most", "sizes"), [(1, (1,)), (2, (1, 2)), (16, (1, 2, 4, 8, 16)), (20, (1, 2, 4, 8, 16, 20))]
)
def test_graphs_are_powers_of_two_and_the_largest_batch(most: int, sizes: tuple[int, ...]) -> None:
    """A batch is padded to less than twice its size."""
    assert batch_sizes(most) == sizes


def eager(run):
    """Stand in for capture on a machine without a GPU: replaying is running."""
    return run


@pytest.mark.parametrize("case", CASES)
def test_padded_steps_have_the_logits_of_plain_ones(tmp_path: Path, case: str) -> None:
    """Batches of 1, 3 and 5 on graphs of 1, 4 and 6: same logits, adapters beside base rows, no foreign block touched.

    Cache blocks of nobody are NaN, static tables keep what earlier steps left in them.
    """
    make_family(tmp_path, case)
    plain = HandDriven(tmp_path)
    fixed = HandDriven(tmp_path, attention="torch")
    torch.manual_seed(7)
    for index, stacks in enumerate(plain.model.lora):
        for group, stack in stacks.items():
            other = fixed.model.lora[index][group]
            for a, b in zip((stack.a_SPRD, *stack.b_PSRO), (other.a_SPRD, *other.b_PSRO), strict=True):
                b.copy_(a.normal_(0, 0.2))
            for owner in (stack, other):
                owner.ranks[:] = [4, 4]
    graphs = DecodeGraphs(fixed.model, sizes=(1, 4, 6), max_tokens=48, slots=2, capture=eager)
    assert [graphs.serves(n) for n in (0, 1, 6, 7)] == [False, True, True, False]
    fixed.model.cache.fill_(float("nan"))
    lengths = (33, 1, 16, 5, 20)
    plain.blocks(4)  # block 0, which fresh buffers name, is nobody's
    places = [plain.blocks(n + 5) for n in lengths]
    used = sorted(block for blocks in places for block in blocks)
    fixed.model.cache[:, :, used] = 0.0  # as the engine clears blocks that it hands out
    slots = (1, -1, 0, 1, -1)
    for n, blocks, slot in zip(lengths, places, slots, strict=True):
        for driven in (plain, fixed):
            driven.chunk(list(range(n)), 0, blocks, slot=slot)
    done = list(lengths)
    for rows in ((0, 1, 2, 3, 4), (2,), (1, 0, 4), (3, 2, 1, 4, 0)):
        batch = DecodeBatch(
            tokens=[40 + row for row in rows],
            positions=[done[row] for row in rows],
            slots=[slots[row] for row in rows],
            blocks=[places[row] for row in rows],
        )
        parts = [([40 + row], done[row], places[row]) for row in rows]
        want = plain.step(parts, slots=batch.slots)
        with torch.inference_mode():
            got = graphs.forward(batch)
        assert got.shape == want.shape
        assert torch.allclose(got, want, atol=2e-5 * float(want.abs().max()))
        for row in rows:
            done[row] += 1
    assert set(graphs._steps[4]._table[3:, 0]) == {fixed.model.scratch_block}
    untouched = sorted(set(range(160)) - set(used))
    assert bool(torch.isnan(fixed.model.cache[:, :, untouched]).all())


def test_a_cpu_captures_nothing(tmp_path: Path) -> None:
    """Graphs are a GPU's; the engine steps as before without."""
    make_family(tmp_path, "llama")
    assert decode_graphs(HandDriven(tmp_path, attention="torch").model, LIMITS) is None


def test_a_model_that_gathers_cannot_be_captured(tmp_path: Path) -> None:
    """Gathering depends on the batch's longest context, which changes from step to step."""
    make_family(tmp_path, "llama")
    with pytest.raises(ValueError, match="paged attention"):
        DecodeGraphs(HandDriven(tmp_path).model, sizes=(1,), max_tokens=16, slots=1, capture=eager)
