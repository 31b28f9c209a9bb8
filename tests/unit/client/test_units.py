"""Persons as privacy units: sampled, averaged and clipped as one, against a naive twin on a tiny Llama."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from fedllm.adapter import AdapterSpec, AdapterState
from fedllm.client import dpsgd
from fedllm.client.dataset import Example, Unit, open_dataset
from fedllm.client.model import LoraModel
from fedllm.client.tokenizer import ChatTokenizer
from fedllm.ids import Digest
from fedllm.messages.mechanism import RELATION_ADD_REMOVE, UNIT_RECORD, Mechanism
from fedllm.messages.plan import Recipe
from fedllm.privacy.clip import SLACK
from fedllm.rng import SeededRng, uniform_floats

BASE = Digest("ab" * 32)
SPEC = AdapterSpec(BASE, 4, 8, {"q_proj": (64, 64), "v_proj": (32, 64)}, (1,))
SIZES = (3, 1, 5, 1, 2, 4)


@pytest.fixture(scope="module")
def examples(tiny_base: Path, owners_data: dict[str, Path]) -> tuple[Example, ...]:
    """Return training records of different lengths."""
    train = open_dataset(owners_data["east"], ChatTokenizer(tiny_base), max_tokens=200).train
    return tuple(Example(e.input_ids[k % 9 :], e.labels[k % 9 :]) for k, e in enumerate(train))


@pytest.fixture(scope="module")
def persons(examples: tuple[Example, ...]) -> list[Unit]:
    """Return units of `SIZES` records."""
    ends = np.cumsum(SIZES)
    return [Unit(examples[end - n : end], bytes([n])) for end, n in zip(ends, SIZES, strict=True)]


@pytest.fixture
def model(tiny_base: Path) -> LoraModel:
    """Return the tiny model in float32 with an adapter that has gradients in both factors."""
    made = LoraModel(tiny_base, BASE)
    made._causal.float()
    state, layout = AdapterState.initial(SPEC, SeededRng("start")), SPEC.layout(("B",))
    flat = (uniform_floats(SeededRng("b"), layout.size) - 0.5).astype(np.float32) * 0.1
    made.load_state(state.replace(layout.unflatten(flat)))
    return made


def naive(model: LoraModel, units: Sequence[Unit], clip: float) -> tuple[np.ndarray, int]:
    """Return the clipped sum and the balance by plain autograd of HF's own loss, one record at a time."""
    parameters = model.parameters(("A", "B"))
    total, balance = np.zeros(sum(p.numel() for p in parameters)), 0
    for unit in units:
        own = []
        for e in unit.examples:
            loss = model._causal(input_ids=torch.tensor([e.input_ids]), labels=torch.tensor([e.labels])).loss
            own.append(torch.cat([g.ravel() for g in torch.autograd.grad(loss, parameters)]).double().numpy())
        mean = np.mean(own, axis=0)
        norm = float(np.linalg.norm(mean))
        total += mean * min(1.0, clip * (1 - SLACK) / norm)
        balance += 1 if norm <= clip else -1
    return total, balance


def product(model: LoraModel, units: Sequence[Unit], clip: float, microbatch: int) -> tuple[np.ndarray, int]:
    """Return what the trainer computes."""
    parameters = model.parameters(("A", "B"))
    with dpsgd._per_record(model) as upper:
        return dpsgd.clipped_sum(model, upper, parameters, units, clip, microbatch)


@pytest.mark.parametrize("microbatch", [1, 2, 3, 16])
@pytest.mark.parametrize("clip", [0.05, 100.0])
def test_a_unit_is_the_mean_of_its_records_clipped_once(
    model: LoraModel, persons: list[Unit], clip: float, microbatch: int
) -> None:
    """The naive twin, with units that fill, share and overlap microbatches; clipped and not."""
    expected, expected_balance = naive(model, persons, clip)
    got, balance = product(model, persons, clip, microbatch)
    assert np.linalg.norm(got - expected) < 1e-3 * np.linalg.norm(expected)
    assert balance == expected_balance == (6 if clip == 100.0 else -6)


def test_a_person_of_many_records_counts_once(model: LoraModel, examples: tuple[Example, ...]) -> None:
    """Thirty records of one person move the sum by one clip norm; as records of their own they move it by up to 30."""
    clip = 1e-3
    person, _ = product(model, [Unit(examples[:30], b"p")], clip, 4)
    records, _ = product(model, [Unit((e,)) for e in examples[:30]], clip, 4)
    assert np.linalg.norm(person) == pytest.approx(clip * (1 - SLACK), rel=1e-9)
    assert np.linalg.norm(records) > 5 * clip


def test_repeating_a_record_changes_nothing(model: LoraModel, examples: tuple[Example, ...]) -> None:
    """The mean of equal gradients is that gradient: no unit gains by its number of records."""
    once, _ = product(model, [Unit(examples[:1], b"p")], 100.0, 4)
    thrice, _ = product(model, [Unit(examples[:1] * 3, b"p")], 100.0, 2)
    np.testing.assert_allclose(thrice, once, rtol=1e-4, atol=1e-7 * np.abs(once).max() + 1e-8)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_record_that_overflows_takes_its_unit_with_it(
    model: LoraModel, persons: list[Unit], monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    """The whole unit adds nothing and counts as long; the others are as they were, in every cut of the batch."""
    right = dpsgd.record_gradients
    broken = persons[2].examples[1]

    def sometimes(m: LoraModel, u: torch.nn.Module, p: list[torch.nn.Parameter], e: list[Example]) -> np.ndarray:
        found = right(m, u, p, e)
        for row, example in enumerate(e):
            if example == broken:
                found[row, :2] = value, -value
        return found

    others = [unit for unit in persons if unit is not persons[2]]
    expected, balance = product(model, others, 0.5, 4)
    monkeypatch.setattr(dpsgd, "record_gradients", sometimes)
    for microbatch in (1, 4, 16):
        got, with_broken = product(model, persons, 0.5, microbatch)
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-6)
        assert with_broken == balance - 1


def test_sampling_takes_whole_units(model: LoraModel, persons: list[Unit], monkeypatch: pytest.MonkeyPatch) -> None:
    """A person is in a step with all records or with none, each with the same probability."""
    seen: list[tuple[int, ...]] = []

    def note(_model: object, _upper: object, _parameters: object, batch: list[Unit], *_: object) -> tuple[float, int]:
        seen.append(tuple(persons.index(unit) for unit in batch))
        return np.zeros(sum(p.numel() for p in parameters)), 0

    parameters = model.parameters(("B",))
    monkeypatch.setattr(dpsgd, "clipped_sum", note)
    plan = Mechanism("dp-sgd", UNIT_RECORD, RELATION_ADD_REMOVE, 0.8, 0.05, 0.5, 400, 1e-5)
    recipe = Recipe("sgd", 0.1, 400, 1, 4, 200)
    dpsgd.train_private(model, parameters, persons, recipe, plan, 6, SeededRng("sampled"), lambda *_: None)
    often = np.bincount([unit for batch in seen for unit in batch], minlength=len(persons))
    assert len(seen) == 400
    assert (abs(often - 200) < 5 * 10).all(), "5 standard deviations of a fair coin"
    assert len(set(seen)) > 40, "independently of one another"


def test_units_of_one_record_are_never_copied(
    model: LoraModel, examples: tuple[Example, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What record gradients are made into is what is clipped: grouping costs nothing where nothing is grouped."""
    made: list[np.ndarray] = []
    monkeypatch.setattr(dpsgd, "record_gradients", lambda m, u, p, e: made.append(np.ones((len(e), 3))) or made[-1])
    yielded = list(dpsgd._unit_gradients(model, model.tail, [], [Unit((e,)) for e in examples[:10]], 4))
    assert [rows is source for rows, source in zip(yielded, made, strict=True)] == [True] * 3
