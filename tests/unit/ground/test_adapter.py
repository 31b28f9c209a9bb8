"""Adapters as plain data: order, digests, PEFT files, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fedllm.adapter import AdapterSpec, AdapterState, from_peft, to_peft
from fedllm.errors import AdapterInvalid
from fedllm.ids import sha256
from fedllm.rng import SeededRng

SPEC = AdapterSpec(sha256(b"base"), 4, 8, {"q_proj": (64, 64), "v_proj": (32, 64), "up_proj": (128, 64)}, (1, 3))


def state(seed: int = 0) -> AdapterState:
    """Return a state whose B is not zero."""
    start = AdapterState.initial(SPEC, SeededRng(seed))
    flat = start.flat + np.linspace(-1, 1, start.flat.size, dtype=np.float32)
    return AdapterState(SPEC, SPEC.layout().unflatten(flat))


def test_initial_adapter_is_the_base() -> None:
    """B is zero and A uniform in ±1/sqrt(in), PEFT's default start."""
    start = AdapterState.initial(SPEC, SeededRng(7))
    for name, factor in start.factors.items():
        if name.endswith("lora_B"):
            assert not factor.any()
        else:
            assert np.abs(factor).max() <= 1 / np.sqrt(factor.shape[1])
            assert factor.std() > 0


def test_peft_files_round_trip_and_name_every_factor() -> None:
    """What is written reads back to the same digest, with PEFT's key names."""
    files = to_peft(state(), base_name="smollm2")
    assert from_peft(files, base=SPEC.base).digest == state().digest
    config = json.loads(files["adapter_config.json"])
    assert (config["r"], config["lora_alpha"], config["layers_to_transform"]) == (4, 8, [1, 3])
    assert b"base_model.model.model.layers.3.mlp.up_proj.lora_B.weight" in files["adapter_model.safetensors"]


def test_files_are_deterministic() -> None:
    """Equal states give equal bytes: a version's digest depends on nothing else."""
    assert to_peft(state(), base_name="x") == to_peft(state(), base_name="x")


def test_flat_bytes_bind_the_spec() -> None:
    """The same numbers under another rank layout are another adapter."""
    other = AdapterSpec(sha256(b"other base"), 4, 8, dict(SPEC.modules), SPEC.layers)
    assert AdapterState.from_bytes(SPEC, state().to_bytes()).digest == state().digest
    assert AdapterState.from_bytes(other, state().to_bytes()).digest != state().digest


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_adapters_cannot_exist(value: float) -> None:
    """NaN and infinity are refused where a state is made."""
    flat = state().flat.copy()
    flat[5] = value
    with pytest.raises(AdapterInvalid, match="NaN or infinity"):
        AdapterState(SPEC, SPEC.layout().unflatten(flat))


def test_wrong_size_missing_and_extra_factors_are_named() -> None:
    """Every way to be incomplete is an error that names the factor."""
    good = dict(state().factors)
    with pytest.raises(AdapterInvalid, match="bytes"):
        AdapterState.from_bytes(SPEC, state().to_bytes()[:-4])
    missing = {k: v for k, v in good.items() if "layers.3" not in k}
    with pytest.raises(AdapterInvalid, match=r"layers\.3.*missing"):
        AdapterState(SPEC, missing)
    with pytest.raises(AdapterInvalid, match="not in the spec"):
        AdapterState(SPEC, {**good, "model.layers.9.mlp.up_proj.lora_A": np.zeros((4, 64), np.float32)})


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("adapter_config.json", b"{"),
        ("adapter_config.json", b'{"r": 4}'),
        ("adapter_model.safetensors", b"not a file"),
    ],
)
def test_malformed_peft_files_are_refused(name: str, data: bytes) -> None:
    """A torn download is an AdapterInvalid, not a stack trace."""
    with pytest.raises(AdapterInvalid, match="malformed"):
        from_peft({**to_peft(state(), base_name="x"), name: data}, base=SPEC.base)


def test_features_the_engine_does_not_serve_are_refused() -> None:
    """RsLoRA would change the scale silently, so it is refused by name."""
    files = to_peft(state(), base_name="x")
    config = json.loads(files["adapter_config.json"])
    config["use_rslora"] = True
    with pytest.raises(AdapterInvalid, match="rsLoRA"):
        from_peft({**files, "adapter_config.json": json.dumps(config).encode()}, base=SPEC.base)


def test_impossible_specs_are_refused() -> None:
    """Unknown modules, rank 0 and unordered layers never become a spec."""
    for kwargs in ({"modules": {"lm_head": (8, 8)}}, {"rank": 0}, {"layers": (3, 1)}, {"layers": ()}):
        fields = {"base": SPEC.base, "rank": 4, "alpha": 8, "modules": {"q_proj": (8, 8)}, "layers": (1,), **kwargs}
        with pytest.raises(AdapterInvalid):
            AdapterSpec(**fields)  # type: ignore[arg-type]
