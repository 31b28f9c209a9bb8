"""Paged decode by FlashInfer (Ye et al., arXiv 2501.01005), where it is installed.

Its wrappers plan a step on the host and hold what they planned; a wrapper for a captured graph writes into buffers
that stay where they are.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fedllm.kernels.attention import DecodePlan, Decoder, DecodeShape

WORKSPACE_BYTES = 128 << 20
"""What FlashInfer's documentation recommends; shared by all wrappers, which run one after the other."""
_HEAD_DIMS = (64, 128, 256)
_TENSOR_CORE_GROUP = 4
"""From this many query heads per key-value head on, its tensor-core kernel is the faster one."""


def serves(shape: DecodeShape) -> bool:
    """Whether FlashInfer has kernels for a shape."""
    return shape.head_dim in _HEAD_DIMS and shape.dtype in (torch.float16, torch.bfloat16)


class FlashInferDecoder:
    """Plans steps with one wrapper per window.

    Parameters
    ----------
    shape : DecodeShape
    batch, width : int, optional
        Sequences and table width of a captured graph; free unless given.
    workspace : Tensor, optional
        Scratch memory of another decoder, to share.
    """

    def __init__(
        self, shape: DecodeShape, *, batch: int | None = None, width: int = 0, workspace: Tensor | None = None
    ) -> None:
        if workspace is None:
            workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=shape.device)
        self._shape = shape
        self._workspace = workspace
        options: dict[str, Any] = {"use_tensor_cores": shape.heads // shape.kv_heads >= _TENSOR_CORE_GROUP}
        wrapper = import_module("flashinfer").BatchDecodeWithPagedKVCacheWrapper
        self._wrappers = {}
        for window in shape.windows:
            if batch is not None:
                sizes = {"indptr": batch + 1, "indices": batch * width, "last_page_len": batch}
                buffers = {
                    f"paged_kv_{name}_buffer": torch.zeros(size, dtype=torch.int32, device=shape.device)
                    for name, size in sizes.items()
                }
                options |= {"use_cuda_graph": True, **buffers}
            self._wrappers[window] = wrapper(workspace, "NHD", **options)

    def plan(self, blocks_BN: Tensor, contexts_B: Tensor) -> DecodePlan:
        """Plan a step; copies the contexts to the host."""
        shape, size = self._shape, self._shape.block_tokens
        pages_B = (contexts_B + size - 1) // size
        used_BN = torch.arange(blocks_BN.shape[1], device=blocks_BN.device) < pages_B[:, None]
        indptr = torch.zeros(len(pages_B) + 1, dtype=torch.int32, device=pages_B.device)
        indptr[1:] = pages_B.cumsum(0)
        indices = blocks_BN[used_BN].to(torch.int32)
        last = (contexts_B - (pages_B - 1) * size).to(torch.int32)
        for window, wrapper in self._wrappers.items():
            wrapper.plan(
                indptr,
                indices,
                last,
                shape.heads,
                shape.kv_heads,
                shape.head_dim,
                size,
                window_left=-1 if window is None else window - 1,
                q_data_type=shape.dtype,
                kv_data_type=shape.dtype,
            )
        return DecodePlan("flashinfer", blocks_BN, contexts_B, wrappers=self._wrappers)

    def fixed(self, batch: int, width: int) -> Decoder:
        """Return a decoder for graphs of one batch size."""
        return FlashInferDecoder(self._shape, batch=batch, width=width, workspace=self._workspace)
