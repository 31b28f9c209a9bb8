"""Who decodes, how contexts are cut, what FlashInfer is told, and whether the kernels compile for a GPU."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's usual name

from fedllm.errors import ConfigError
from fedllm.kernels import attention, flashinfer_attention
from fedllm.kernels.attention import DecodeShape, choose_splits, new_decoder, paged_decode, reference

CPU = torch.device("cpu")


def shape(**changes: object) -> DecodeShape:
    """Return a small shape on the CPU."""
    fields = {"heads": 4, "kv_heads": 2, "head_dim": 64, "block_tokens": 4, "windows": (None, 6)}
    return DecodeShape(**{**fields, "dtype": torch.bfloat16, "device": CPU, **changes})


def test_the_specification_is_torch_attention() -> None:
    """The naive loop equals torch's attention of the last query over the gathered context, a window as a slice."""
    gen = torch.Generator().manual_seed(1)
    keys, values = torch.randn(2, 12, 4, 2, 8, generator=gen, dtype=torch.float64)
    q = torch.randn(3, 4, 8, generator=gen, dtype=torch.float64)
    blocks = torch.randperm(12, generator=gen).view(3, 4)
    contexts = torch.tensor([1, 9, 16], dtype=torch.int32)
    for window in (None, 6):
        got = reference(q, keys, values, blocks, contexts, window=window)
        for row, context in enumerate(contexts.tolist()):
            seen = slice(max(0, context - (window or context)), context)
            k, v = (cache[blocks[row]].reshape(16, 2, 8)[seen].transpose(0, 1) for cache in (keys, values))
            want = F.scaled_dot_product_attention(q[row][:, None], k, v, enable_gqa=True)[:, 0]
            assert torch.allclose(got[row], want, atol=1e-12)


@pytest.mark.parametrize(
    ("programs", "longest", "splits"), [(8, 8192, 33), (8, 256, 2), (8, 100, 1), (512, 8192, 1), (1, 10**6, 64)]
)
def test_contexts_are_cut_to_fill_the_device(programs: int, longest: int, splits: int) -> None:
    """Two programs on each of 132 multiprocessors, but no part shorter than pays, and no more than 64."""
    assert choose_splits(programs, longest, 132) == splits


def test_the_device_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU decodes in torch; a GPU in Triton, or FlashInfer where it is installed and has the shape."""
    cuda = torch.device("cuda")
    monkeypatch.setattr(attention, "find_spec", lambda _: None)
    assert attention.choose_kind(shape()) == "torch"
    assert attention.choose_kind(shape(device=cuda)) == "triton"
    monkeypatch.setattr(attention, "find_spec", lambda _: object())
    assert attention.choose_kind(shape(device=cuda)) == "flashinfer"
    assert attention.choose_kind(shape(device=cuda, head_dim=80)) == "triton"
    assert attention.choose_kind(shape(device=cuda, dtype=torch.float32)) == "triton"
    with pytest.raises(ConfigError, match="'magic' is not known"):
        new_decoder(shape(), kind="magic")


class Wrapper:
    """FlashInfer's wrapper as its documentation has it, with the specification inside."""

    def __init__(self, workspace, kv_layout="NHD", use_cuda_graph=False, use_tensor_cores=False, **buffers) -> None:
        assert (workspace.dtype, kv_layout, use_tensor_cores) == (torch.uint8, "NHD", False)
        assert not workspace.any()
        assert use_cuda_graph == bool(buffers)
        self.sizes = {name: len(buffer) for name, buffer in buffers.items()}
        assert all(buffer.dtype == torch.int32 for buffer in buffers.values())

    def plan(  # noqa: D102
        self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, *,
        window_left=-1, q_data_type="float16", kv_data_type=None,
    ) -> None:  # fmt: skip
        assert (num_qo_heads, num_kv_heads, head_dim, page_size) == (4, 2, 64, 4)
        assert q_data_type == kv_data_type == torch.bfloat16
        assert indptr.dtype == indices.dtype == last_page_len.dtype == torch.int32
        if self.sizes:
            assert self.sizes["paged_kv_last_page_len_buffer"] == len(last_page_len)
            assert self.sizes["paged_kv_indptr_buffer"] == len(indptr)
            assert self.sizes["paged_kv_indices_buffer"] >= len(indices)
        self.planned = (indptr.tolist(), indices, last_page_len.tolist(), window_left)

    def run(self, q, paged_kv_cache):  # noqa: D102
        keys, values = paged_kv_cache
        indptr, indices, last, left = self.planned
        rows = []
        for row in range(len(last)):
            pages = indices[indptr[row] : indptr[row + 1]][None]
            context = torch.tensor([(pages.shape[1] - 1) * 4 + last[row]])
            window = None if left < 0 else left + 1
            rows.append(reference(q[row : row + 1], keys, values, pages, context, window=window))
        return torch.cat(rows)


@pytest.mark.parametrize("captured", [False, True])
def test_flashinfer_is_told_the_pages_of_each_context(monkeypatch: pytest.MonkeyPatch, captured: bool) -> None:
    """Its ragged form of the tables, lengths of last pages and inclusive windows give the specification's result."""
    fake = types.ModuleType("flashinfer")
    fake.BatchDecodeWithPagedKVCacheWrapper = Wrapper
    monkeypatch.setitem(sys.modules, "flashinfer", fake)
    monkeypatch.setattr(flashinfer_attention, "WORKSPACE_BYTES", 16)
    gen = torch.Generator().manual_seed(2)
    keys, values = torch.randn(2, 15, 4, 2, 64, generator=gen).to(torch.bfloat16)
    q = torch.randn(3, 4, 64, generator=gen).to(torch.bfloat16)
    blocks = torch.randperm(15, generator=gen).view(3, 5)
    decoder = new_decoder(shape(), kind="flashinfer")
    if captured:
        decoder = decoder.fixed(3, 5)
    for contexts in ([1, 8, 20], [13, 4, 5]):
        plan = decoder.plan(blocks, torch.tensor(contexts, dtype=torch.int32))
        for window in (None, 6):
            want = reference(q, keys, values, blocks, torch.tensor(contexts), window=window)
            assert torch.equal(paged_decode(q, keys, values, plan, window=window), want)


COMPILE = """
import re, torch
from types import SimpleNamespace
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from fedllm.kernels import triton_attention
target = GPUTarget("cuda", 90, 32)
driver.set_active(SimpleNamespace(
    get_current_device=lambda: 0, get_current_stream=lambda _: 0, get_current_target=lambda: target))
launch, ptx = JITFunction.run, {}
def compile_only(kernel, *args, warmup, **kwargs):
    ptx[kernel.__name__] = launch(kernel, *args, warmup=True, **kwargs).asm["ptx"]
JITFunction.run = compile_only
keys, values = torch.zeros(2, 4, 16, 8, 80, dtype=torch.bfloat16)
q = torch.zeros(2, 48, 80, dtype=torch.bfloat16)[:, :32]
table, contexts = torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, dtype=torch.int32)
triton_attention.paged_decode(q, keys, values, table, contexts, splits=3, window=5)
codes = {"tensor core": r"\\bw?g?mma\\.", "atomic": r"\\b(atom|red)\\."}
codes = {"async copy of 16 bytes": r"cp\\.async\\.cg\\..*0x10"} | codes
print({name: [code for code, pattern in codes.items() if re.search(pattern, text)] for name, text in ptx.items()})
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_the_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """As launched, down to Hopper's machine code: wide copies ahead of tensor cores, no atomics; no GPU is needed."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE],
        env=env | {"TRITON_CACHE_DIR": str(tmp_path)},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert ast.literal_eval(done.stdout) == {"_attend": ["async copy of 16 bytes", "tensor core"], "_combine": []}
