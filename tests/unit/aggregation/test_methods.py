"""LoRA methods and server rules: what is trained, what is sent, where the global adapter goes."""

from __future__ import annotations

import numpy as np
import pytest
from secagg_world import NAMES, SPEC, make_plan

from fedllm.adapter import AdapterSpec, AdapterState
from fedllm.aggregation.methods import METHODS, NOT_SUMS, get_method
from fedllm.aggregation.rules import FedAvg
from fedllm.errors import AdapterInvalid, ConfigError, PolicyRefused
from fedllm.ids import RoundNumber
from fedllm.messages.mechanism import Mechanism
from fedllm.rng import SeededRng

FACTORS = {"ffa": ("B",), "fedit": ("A", "B")}


def states(factors: tuple[str, ...], seed: int = 1) -> tuple[AdapterState, AdapterState]:
    """Return a head and a state that differs from it in the given factors."""
    head = AdapterState.initial(SPEC, SeededRng(seed))
    moved = {n: a + np.float32(0.5) for n, a in head.factors.items() if n[-1] in factors}
    return head, head.replace(moved)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_applying_the_update_of_one_owner_gives_its_adapter(name: str) -> None:
    """Update then apply is the identity: the head moves to where the only owner went."""
    method = get_method(name)
    assert method.name == name
    assert method.trainable(1) == FACTORS[name]
    head, trained = states(FACTORS[name])
    step = method.update(trained, head, 1)
    assert step.shape == (SPEC.layout(FACTORS[name]).size,)
    assert step.dtype == np.float32
    np.testing.assert_allclose(method.apply(head, step, 1).flat, trained.flat, atol=1e-7)


def test_ffa_is_exact_and_fedit_is_biased() -> None:
    """The mean of products equals the product with the mean for frozen A, and does not when both move."""
    for name, exact in (("ffa", True), ("fedit", False)):
        method = get_method(name)
        head, _ = states(())
        rng = np.random.default_rng(4)
        owners = [
            head.replace({n: rng.normal(size=a.shape).astype(np.float32) for n, a in head.factors.items()
                          if n[-1] in method.trainable(1)})
            for _ in range(3)
        ]  # fmt: skip
        mean = np.mean([method.update(o, head, 1) for o in owners], axis=0, dtype=np.float32)
        merged = method.apply(head, mean, 1)
        path = "model.layers.0.self_attn.q_proj"
        products = np.mean([o.factors[f"{path}.lora_B"] @ o.factors[f"{path}.lora_A"] for o in owners], axis=0)
        found = merged.factors[f"{path}.lora_B"] @ merged.factors[f"{path}.lora_A"]
        assert np.allclose(found, products, atol=1e-5) is exact


def test_a_frozen_factor_that_moved_is_refused() -> None:
    """Training that touched A under ffa would be lost silently; it is an error instead."""
    head, trained = states(("A", "B"))
    with pytest.raises(AdapterInvalid, match="lora_A is frozen in this round"):
        get_method("ffa").update(trained, head, 1)


def test_specs_and_layouts_never_mix() -> None:
    """Another rank, or a step of another length, is refused."""
    head, _ = states(())
    other = AdapterState.initial(AdapterSpec(SPEC.base, 1, 4, SPEC.modules, SPEC.layers), SeededRng(1))
    with pytest.raises(AdapterInvalid, match="another spec"):
        get_method("ffa").update(other, head, 1)
    with pytest.raises(AdapterInvalid, match="step of shape"):
        get_method("ffa").apply(head, np.zeros(3, np.float32), 1)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_plan_is_checked_against_the_method(name: str) -> None:
    """The layout must be that of the factors sent, with and without differential privacy."""
    method = get_method(name)
    layout = SPEC.layout(method.trainable(3)).digest
    noisy = Mechanism("dp-sgd", "record", "add-or-remove-one", 1.0, 1.0, 0.1, 5, 1e-5)
    for mechanism in (Mechanism.none(), noisy):
        method.check(make_plan(NAMES[:4], method=name, layout=layout, mechanism=mechanism))
    with pytest.raises(PolicyRefused, match="layout is not that of the factors"):
        method.check(make_plan(NAMES[:4], method=name, layout=SPEC.layout(("A",)).digest, round=RoundNumber(2)))
    with pytest.raises(PolicyRefused, match="names method 'alt'"):
        method.check(make_plan(NAMES[:4], method="alt", layout=layout))


@pytest.mark.parametrize("name", sorted(NOT_SUMS))
def test_methods_that_need_more_than_sums_are_refused_with_the_reason(name: str) -> None:
    """The sentence says what the method would need; the hint says what there is."""
    with pytest.raises(PolicyRefused, match=f"{name}.*opens only the sum") as caught:
        get_method(name)
    assert caught.value.hint == "choose one of: fedit, ffa"


def test_an_unknown_method_names_the_known_ones() -> None:
    """A typing error is a configuration error, not a refusal."""
    with pytest.raises(ConfigError, match="'faf' is unknown") as caught:
        get_method("faf")
    assert caught.value.hint == "choose one of: fedit, ffa"


def test_fedavg_scales_the_mean() -> None:
    """The step is the mean times the server's rate, float32; a rate that would not move is refused."""
    mean = np.array([1.0, -2.0], dtype=np.float32)
    np.testing.assert_array_equal(FedAvg().apply(mean), mean)
    step = FedAvg(0.5).apply(mean)
    assert step.dtype == np.float32
    assert step.tolist() == [0.5, -1.0]
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="server_lr"):
            FedAvg(bad)
