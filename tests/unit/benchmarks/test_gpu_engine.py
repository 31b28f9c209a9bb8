"""The benchmark of a GPU's decode step, as far as a machine without one goes."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import gpu_engine
from benchmarks.document import GATE_FAILED, NOT_MEASURED
from fedllm.serving.native import model as native


def test_tiny_passes_the_gate_and_measures_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Steps from static buffers agree with plain ones; no time of a CPU is reported as a GPU's."""
    assert gpu_engine.main(["--tiny", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gate"] is True
    assert found["max_rel_logit_error"] < 1e-5
    assert (found["step_ms"], found["gpu"]) == (None, None)
    assert gpu_engine.main(["--tiny"]) == 0
    assert "checks logits on a CPU" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures on a GPU")
def test_without_a_gpu_nothing_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """The document has a reason and no figures."""
    assert gpu_engine.main(["--quick", "--json"]) == NOT_MEASURED
    found = json.loads(capsys.readouterr().out)
    assert "no CUDA device is here" in found["error"]
    assert "step_ms" not in found


@pytest.mark.parametrize("mistake", ["context", "adapters"])
def test_the_gate_notices(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mistake: str) -> None:
    """Attention that forgets a token, and padded steps without their adapters, fail it."""
    if mistake == "context":
        real = native.paged_decode

        def forgetful(q, keys, values, plan, *, window=None):
            return real(q, keys, values, plan, window=16 if window is None else window)

        monkeypatch.setattr(native, "paged_decode", forgetful)
    else:
        monkeypatch.setattr(
            "fedllm.serving.native.graphs.plan_lora",
            lambda *_, **__: gpu_engine.cpu.plan(gpu_engine.build_segments([-1]), device="cpu"),
        )
    assert gpu_engine.main(["--tiny", "--json"]) == GATE_FAILED
    assert "of the largest off" in json.loads(capsys.readouterr().out)["error"]
