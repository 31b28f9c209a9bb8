"""The hotswap benchmark's gate can fail, and its forced tokens are certain."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import hotswap
from benchmarks.document import GateFailed
from benchmarks.hotswap_model import ForcingAdapters, make_tiny_base
from fedllm.ids import sha256

CLEAN = {
    "failed": 0, "mixed_version": 0, "refused": 0, "slots_leaked": 0, "requests_leaked": 0, "blocks_leaked": 0,
    "stall_steps_p99": 0.9,
}  # fmt: skip


def test_a_few_swaps_of_the_tiny_model_print_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    """Three swaps under eight streams, then 40 adapters through six slots: nothing failed, mixed or leaked."""
    assert hotswap.main(["--tiny", "--quick", "--swaps", "3", "--adapters", "40", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gate"] is True
    assert found["swaps"] == 3
    assert found["requests"] > 8
    assert {name: found[name] for name in CLEAN if name != "stall_steps_p99"} == {
        name: 0 for name in CLEAN if name != "stall_steps_p99"
    }
    assert 0 < found["flip_to_first_token_s_p50"] < found["publish_to_first_token_s_p99"]
    tiers = found["tiers"]
    assert tiers["slot_hits"] + tiers["memory_hits"] + tiers["fetched"] == pytest.approx(1, abs=1e-3)
    assert tiers["failed"] == 0
    assert tiers["from_disk"] + tiers["from_registry"] > tiers["slots"]


@pytest.mark.parametrize("name", CLEAN)
def test_the_gate_names_what_failed(name: str) -> None:
    """One failed stream, mixed answer, leaked slot or long stall is enough."""
    hotswap.gate(CLEAN, hotswap.Tally())
    with pytest.raises(GateFailed, match=f"{name} is 2"):
        hotswap.gate({**CLEAN, name: 2}, hotswap.Tally())


def test_each_forced_token_is_its_own(tmp_path) -> None:
    """Chosen tokens are distinct, and the adapters differ in one factor only."""
    make_tiny_base(tmp_path)
    adapters = ForcingAdapters(tmp_path, sha256(b"base"), 4)
    tokens = adapters.tokens(30)
    assert len(set(tokens)) == 30
    first, second = (adapters.make(token) for token in tokens[:2])
    differing = [name for name in first.factors if not np.array_equal(first.factors[name], second.factors[name])]
    assert differing == ["model.layers.1.mlp.down_proj.lora_B"]
