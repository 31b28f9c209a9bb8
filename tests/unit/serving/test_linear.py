"""The base model's linear layers against a plain product, in every layout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's usual name
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedllm.serving.native import linear
from fedllm.serving.native.linear import new_linear, packs

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 70),
    width_in=st.integers(1, 90),
    width_out=st.integers(1, 90),
    biased=st.booleans(),
    dtype=st.sampled_from(sorted(TOLERANCE, key=str)),
)
def test_a_layer_is_the_plain_product(
    rows: int, width_in: int, width_out: int, biased: bool, dtype: torch.dtype
) -> None:
    """Any number of rows, odd widths, with a bias and without."""
    weight, x = draw(width_out, width_in, seed=1, dtype=dtype), draw(rows, width_in, seed=2, dtype=dtype)
    bias = draw(width_out, seed=3, dtype=dtype) if biased else None
    wanted = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    with torch.inference_mode():
        found = new_linear(weight, bias)(x)
    assert found.dtype == dtype
    scale = x.double().norm(dim=1).max() * weight.double().norm(dim=1).max() + 1
    assert (found.double() - wanted).abs().max() <= TOLERANCE[dtype] * scale


def test_without_onednn_the_product_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout of processors that oneDNN does not serve, beside the one of this machine."""
    weight, bias, x = draw(33, 20, seed=1), draw(33, seed=2), draw(5, 20, seed=3)
    native = new_linear(weight, bias)
    monkeypatch.setattr(linear, "packs", lambda device, dtype: False)
    plain = new_linear(weight, bias)
    assert not plain.weight.is_mkldnn
    torch.testing.assert_close(plain(x), native(x))
    torch.testing.assert_close(new_linear(weight)(x), F.linear(x, weight))


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """An overflow in one row of a batch stays there."""
    layer, x = new_linear(draw(24, 16, seed=1)), draw(4, 16, seed=2)
    spoiled = x.clone()
    spoiled[1] = float("nan")
    keep = [0, 2, 3]
    assert torch.equal(layer(spoiled)[keep], layer(x)[keep])


def test_only_a_cpu_s_own_dtypes_are_packed() -> None:
    """Half precision and other devices keep strided weights."""
    assert not packs(CPU, torch.float16)
    assert not packs(torch.device("meta"), torch.float32)
    assert packs(CPU, torch.float32) == torch.backends.mkldnn.is_available()
