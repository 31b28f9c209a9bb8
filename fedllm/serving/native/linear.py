"""A base model's frozen linear layer, its weight laid out once for the device that multiplies by it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_EXPECTED_ROWS = 32
"""What oneDNN may lay a weight out for: a decode batch. The layout serves every other number of rows as well."""


@dataclass(frozen=True)
class Linear:
    """``x W^T + b`` without gradients; made by `new_linear`.

    Parameters
    ----------
    weight : Tensor
        ``(in, out)``, strided as its device likes it; or ``(out, in)`` in oneDNN's own blocks.
    bias : Tensor or None
        Shape ``(out,)``.
    """

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x_TD: Tensor) -> Tensor:
        """Return ``(T, out)`` in the dtype of the input, whose shape is ``(T, in)``."""
        if self.weight.is_mkldnn:
            product: Tensor = torch.ops.mkldnn._linear_pointwise(x_TD, self.weight, self.bias, "none", [], "")
            return product
        if self.bias is None:
            return torch.mm(x_TD, self.weight)
        return torch.addmm(self.bias, x_TD, self.weight)


def new_linear(weight_OI: Tensor, bias_O: Tensor | None = None) -> Linear:
    """Lay a weight out for its device: on a GPU as it is, on a CPU in a copy.

    On a CPU, oneDNN would put the weight into its blocks again at every call: for the few rows of a decode step that
    costs as much as the product. PyTorch has no public call for it outside of a compiled graph; where these operators
    are missing (Apple's processors, say) the weight is transposed, which is the best layout for a plain product.

    Parameters
    ----------
    weight_OI : Tensor
        Shape ``(out, in)``, as checkpoints have it.
    bias_O : Tensor, optional
        Shape ``(out,)``.
    """
    if packs(weight_OI.device, weight_OI.dtype):
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI.contiguous(), _EXPECTED_ROWS)
        return Linear(packed, bias_O)
    return Linear(weight_OI.T if weight_OI.is_cuda else weight_OI.T.contiguous(), bias_O)


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether oneDNN can hold weights of this dtype in its own blocks here."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if not (hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32
