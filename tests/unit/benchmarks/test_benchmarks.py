"""The gates can fail, and the documents have the fields that readers rely on."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest
import torch

from benchmarks import dp_step, secagg, serving
from benchmarks.__main__ import one
from benchmarks.document import NOT_MEASURED, GateFailed
from benchmarks.serving_peft import Peft
from fedllm.adapter import AdapterSpec, AdapterState
from fedllm.client import dpsgd
from fedllm.client.model import LoraModel
from fedllm.rng import SeededRng
from fedllm.serving.engine import TokenScore
from fedllm.serving.native.engine import NativeEngine
from fedllm.serving.native.loader import load_weights, read_config

SMALL = ["--owners", "5", "--dim", "300", "--json"]


def document(capsys: pytest.CaptureFixture[str]) -> dict:
    """Return the one document on standard output."""
    return json.loads(capsys.readouterr().out)


def test_secagg_prints_one_document_with_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    """Both protocols run to the end with a dropout, are exact, and the ratios are of the printed figures."""
    assert secagg.main([*SMALL, "--dropouts", "1"]) == 0
    found = document(capsys)
    assert found["exact"] is True
    for provider in ("fedllm", "flower"):
        fields = {"setup_cpu_s", "mask_cpu_s", "unmask_cpu_s", "upload_bytes", "peak_bytes"}
        assert fields <= set(found["providers"][provider])
    ours, theirs = found["providers"]["fedllm"], found["providers"]["flower"]
    assert found["upload_ratio"] == pytest.approx(ours["upload_bytes"] / theirs["upload_bytes"], rel=1e-3)
    assert ours["upload_bytes"] > 3 * 300
    assert {"mask_cpu_s"} <= set(found["floor"])
    assert {"mask_over_floor", "mask_speedup", "unmask_speedup"} <= set(found)


def test_too_many_dropouts_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Below the threshold there is no sum to time."""
    assert secagg.main([*SMALL, "--dropouts", "2"]) == NOT_MEASURED
    found = document(capsys)
    assert "4 are needed" in found["error"]
    assert "providers" not in found


@pytest.mark.parametrize("name", ["fedllm", "flower"])
def test_one_wrong_entry_fails_the_secagg_gate(name: str) -> None:
    """An entry that differs by one is caught in either protocol; no time is reported then."""
    provider = secagg.make_providers(5, 50, 1)[name]
    reveal = provider.open

    def off_by_one() -> None:
        reveal()
        opened = provider._total if name == "fedllm" else provider._opened[1]
        opened[7] += 1

    provider.open = off_by_one
    with pytest.raises(GateFailed, match=f"{name}: 1 "):
        secagg.play({name: provider}, secagg.make_updates(5, 50), 1)


@pytest.fixture(scope="module")
def tiny(tiny_base) -> LoraModel:
    """Return the tiny model in float32 with an adapter that has gradients in both factors."""
    model = LoraModel(tiny_base, dp_step.BASE)
    model._causal.float()
    spec = AdapterSpec(dp_step.BASE, 4, 8, {"q_proj": (64, 64), "v_proj": (32, 64)}, (0, 1))
    state = AdapterState.initial(spec, SeededRng("start"))
    draw = np.random.default_rng(1)
    layout = spec.layout(("B",))
    model.load_state(state.replace(layout.unflatten(draw.normal(0, 0.05, layout.size).astype(np.float32))))
    return model


def test_dp_gate_passes_on_padded_records(tiny: LoraModel) -> None:
    """Records of different lengths, batched and padded, have the gradients that they have alone."""
    parameters = tiny.parameters(("A", "B"))
    assert dp_step.gate(tiny, parameters, dp_step.make_examples(384, (20, 11, 5))) < dp_step.MAX_REL_ERROR


@pytest.mark.parametrize(
    "wrong",
    [lambda g: g[::-1], lambda g: 0 * g + g.mean(0), lambda g: 1.01 * g, lambda g: g * np.nan],
    ids=["rows swapped", "mean of the batch", "one per cent off", "nan"],
)
def test_dp_gate_fails_on_wrong_gradients(tiny: LoraModel, monkeypatch: pytest.MonkeyPatch, wrong) -> None:
    """Four ways to be wrong; NaN is one that a plain comparison with max() would let through."""
    right = dpsgd.record_gradients
    monkeypatch.setattr(dpsgd, "record_gradients", lambda *arguments: wrong(right(*arguments)))
    with pytest.raises(GateFailed, match="off its own autograd"):
        dp_step.gate(tiny, tiny.parameters(("A", "B")), dp_step.make_examples(384, (20, 11, 5)))


def test_dp_steps_all_run(tiny: LoraModel) -> None:
    """Each provider's step moves the parameters and leaves no hook behind."""
    parameters = tiny.parameters(("A", "B"))
    for step in dp_step.STEPS.values():
        before = [p.detach().clone() for p in parameters]
        step(tiny, parameters, dp_step.make_examples(384, [12] * 4))
        assert all(not torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
        assert not any(hasattr(p, "grad_sample") and p.grad_sample is not None for p in parameters)


def test_serving_compare_sees_each_kind_of_error() -> None:
    """A first logit, a later score, a token that is not the best, and NaN: each counts; no error counts nothing."""
    gen = torch.Generator().manual_seed(2)
    want = torch.randn(3, 50, generator=gen)
    best = want.argmax(-1).tolist()
    right = [TokenScore(0.0, float(want[i].log_softmax(-1)[t])) for i, t in enumerate(best)]
    assert serving.compare(want, want[0], best, right) < 1e-6
    first = want[0].clone()
    first[17] += 0.5
    assert serving.compare(want, first, best, right) > 0.1
    later = [*right[:2], TokenScore(0.0, right[2].logprob - 0.5)]
    assert serving.compare(want, want[0], best, later) > 0.1
    worst = [*best[:2], int(want[2].argmin())]
    assert serving.compare(want, want[0], worst, right) > 0.1
    assert np.isnan(serving.compare(want, first * float("nan"), best, right))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("mistake", [None, "adapters swapped", "adapters ignored"])
def test_serving_gate_passes_the_engine_and_fails_a_wrong_one(tiny_base, mistake: str | None) -> None:
    """The real engine on a tiny model equals PEFT in a mixed batch; with a mistake about adapters it does not."""

    async def body() -> float:
        config = read_config(tiny_base)
        weights = load_weights(tiny_base, config, dtype=torch.float32, device="cpu")
        sizes = {"slots": serving.LIMITS.slots, "max_rank": serving.RANK, "blocks": serving.LIMITS.kv_blocks}
        model = serving.RecordingModel(config, weights, block_tokens=serving.LIMITS.block_tokens, **sizes)
        engine = NativeEngine(model, base=serving.BASE, limits=serving.LIMITS, rng=SeededRng(1))
        try:
            adapters = serving.make_adapters(config)
            for state in adapters:
                await engine.load(state.digest, state)
            judge = Peft(tiny_base, torch.float32)
            judge.add_adapters(adapters)
            versions = [state.digest for state in adapters]
            if mistake == "adapters swapped":
                versions[0], versions[1] = versions[1], versions[0]
            elif mistake == "adapters ignored":
                versions = [serving.BASE] * len(versions)
            return await serving.gate(engine, model, judge, versions, "float32")
        finally:
            await engine.close()

    if mistake is None:
        assert asyncio.run(body()) < serving.TOLERANCE["float32"]
    else:
        with pytest.raises(GateFailed, match="off PEFT's"):
            asyncio.run(body())


def test_a_missing_model_is_said_and_not_measured(tmp_path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the base model there is a document with the reason, no figures, and a status that is not success."""
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path))
    for module in (serving, dp_step):
        assert module.main(["--quick", "--json"]) == NOT_MEASURED
        found = document(capsys)
        assert "fedllm model pull" in found["error"]
        assert "providers" not in found
        assert str(tmp_path) not in json.dumps(found)


def test_a_benchmark_that_dies_fails_the_whole_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process without a document is a failed gate, not a passed one."""
    status, found = one("no_such_benchmark", [])
    assert status != 0
    assert found["gate"] is False


def test_growth_is_of_exact_sums_and_follows_the_neighbours(capsys: pytest.CaptureFixture[str]) -> None:
    """Three sizes, the last above the complete graph; masks follow k, the coordinator's memory does not follow n."""
    assert secagg.main(["--growth", "--quick", "--dim", "2000", "--json"]) == 0
    found = document(capsys)
    assert found["exact"] is True
    small, middle, large = found["growth"]
    assert [row["owners"] for row in found["growth"]] == [8, 32, 160]
    assert (small["neighbours"], middle["neighbours"]) == (7, 31)
    assert large["neighbours"] < 159
    assert large["coordinator_peak_bytes"] < 8 * small["coordinator_peak_bytes"]
