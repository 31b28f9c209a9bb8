"""The trainers: loading, training without privacy, scoring; the toy twin."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from unit.client.trainer_fakes import BASE, EAST, PRIVATE, SPEC, adamw, plan

from fedllm.adapter import AdapterSpec, AdapterState
from fedllm.aggregation.vector import LOSS_LIMIT
from fedllm.client import model as model_module
from fedllm.client.dataset import Example, open_dataset
from fedllm.client.evaluate import evaluate
from fedllm.client.model import LoraModel
from fedllm.client.tokenizer import ChatTokenizer
from fedllm.client.toy import ToyTrainer
from fedllm.client.train import LoraTrainer
from fedllm.client.trainer import Trainer
from fedllm.errors import AdapterInvalid, BaseMismatch, ConfigError, IntegrityError, PolicyRefused
from fedllm.ids import Digest, OwnerId
from fedllm.messages.mechanism import Mechanism
from fedllm.messages.plan import Recipe
from fedllm.rng import SeededRng


@pytest.fixture(scope="module")
def trainer(tiny_base: Path, owners_data: dict[str, Path]) -> LoraTrainer:
    """Return a trainer on the tiny model."""
    return LoraTrainer(tiny_base, BASE, owners_data["east"], max_tokens=200, owner=EAST)


@pytest.fixture
def head() -> AdapterState:
    """Return an untrained adapter."""
    return AdapterState.initial(SPEC, SeededRng("head"))


def test_training_lowers_held_out_loss_and_moves_only_its_factor(trainer: LoraTrainer, head: AdapterState) -> None:
    """A few AdamW steps on B; A stays bit for bit; progress is told."""
    done: list[tuple[int, int]] = []
    before = trainer.score(head)
    trained = trainer.fit(
        head, plan(adamw(), Mechanism.none(), head), ("B",), SeededRng(1), lambda *at: done.append(at)
    )
    after = trainer.score(trained.state)
    assert after.mean_loss < before.mean_loss - 0.1
    assert (after.records, after.tokens) == (before.records, before.tokens)
    assert done == [(i + 1, 6) for i in range(6)]
    assert trained.mean_loss is not None
    assert trained.records == trainer.records == 40
    frozen = [name for name, _ in SPEC.layout(("A",)).entries]
    assert all(trained.state.factors[n].tobytes() == head.factors[n].tobytes() for n in frozen)


def test_private_training_tells_no_loss_and_differs_every_time(trainer: LoraTrainer, head: AdapterState) -> None:
    """Under DP the training loss would be a release outside epsilon."""
    recipe = Recipe("sgd", 1.0, 3, 1, 4, 200)
    states = []
    for seed in (1, 2):
        trained = trainer.fit(head, plan(recipe, PRIVATE, head), ("B",), SeededRng(seed), lambda *at: None)
        assert trained.mean_loss is None
        states.append(trained.state.digest)
    assert len({head.digest, *states}) == 3


def test_the_plan_must_price_what_it_trains(trainer: LoraTrainer, head: AdapterState) -> None:
    """Three priced steps and four trained ones would be a hidden charge."""
    with pytest.raises(PolicyRefused, match="prices 3"):
        trainer.fit(head, plan(Recipe("sgd", 1.0, 4, 1, 4, 200), PRIVATE, head), ("B",), SeededRng(0), lambda *at: None)


def test_an_owner_must_be_in_the_plan(tiny_base: Path, owners_data: dict[str, Path], head: AdapterState) -> None:
    """The declared size is per owner; none is guessed."""
    nameless = LoraTrainer(tiny_base, BASE, owners_data["east"], max_tokens=200)
    shared = plan(Recipe("sgd", 1.0, 3, 1, 4, 200), PRIVATE, head, EAST, OwnerId("north"))
    with pytest.raises(PolicyRefused, match="declares no size"):
        nameless.fit(head, shared, ("B",), SeededRng(0), lambda *at: None)


def test_unknown_optimisers_are_refused(trainer: LoraTrainer, head: AdapterState) -> None:
    """The message names what there is."""
    with pytest.raises(ConfigError, match="adamw or sgd"):
        trainer.fit(head, plan(adamw(optimizer="lion"), Mechanism.none(), head), ("B",), SeededRng(0), lambda *at: None)


def test_microbatches_do_not_change_training(trainer: LoraTrainer, head: AdapterState) -> None:
    """Same batches cut differently, same adapter up to rounding."""
    flats = [
        trainer.fit(
            head, plan(adamw(optimizer="sgd", microbatch=size), Mechanism.none(), head), ("B",), SeededRng(5),
            lambda *at: None,
        ).state.flat
        for size in (1, 3, 8)
    ]  # fmt: skip
    moved = np.abs(flats[0] - head.flat).max()
    assert all(np.abs(flat - flats[0]).max() < 0.05 * moved for flat in flats[1:])


def test_scores_equal_the_naive_loss(tiny_base: Path, owners_data: dict[str, Path], head: AdapterState) -> None:
    """The twin: HF's forward pass over the whole model, one record at a time."""
    trainer = LoraTrainer(tiny_base, BASE, owners_data["west"], max_tokens=200)
    score = trainer.score(head)
    causal = trainer._model._causal
    total, tokens = 0.0, 0
    for example in open_dataset(owners_data["west"], ChatTokenizer(tiny_base), max_tokens=200).heldout:
        with torch.no_grad():
            loss = causal(input_ids=torch.tensor([example.input_ids]), labels=torch.tensor([example.labels])).loss
        total += float(loss) * example.answer_tokens
        tokens += example.answer_tokens
    assert score.tokens == tokens
    assert score.mean_loss == pytest.approx(total / tokens, rel=5e-3)


def test_states_go_in_and_out_unchanged(tiny_base: Path, head: AdapterState) -> None:
    """Another spec replaces the adapter; the same model serves both, one after the other."""
    model = LoraModel(tiny_base, BASE)
    other = AdapterState.initial(AdapterSpec(BASE, 2, 4, {"o_proj": (64, 64)}, (1,)), SeededRng("other"))
    for state in (head, other, head):
        model.load_state(state)
        assert model.read_state().digest == state.digest
        assert {n for n, _ in model._causal.named_parameters() if "lora" in n and ".default." in n} == {
            f"{name}.default.weight" for name in state.factors
        }


def test_wrong_adapters_are_refused(tiny_base: Path, monkeypatch: pytest.MonkeyPatch, head: AdapterState) -> None:
    """Another base, a layer or shape that is not there, and a load that silently does nothing."""
    model = LoraModel(tiny_base, BASE)
    with pytest.raises(BaseMismatch):
        model.adapt(dataclasses.replace(SPEC, base=Digest("cd" * 32)))
    with pytest.raises(AdapterInvalid, match="layer 7"):
        model.adapt(dataclasses.replace(SPEC, layers=(7,)))
    with pytest.raises(AdapterInvalid, match="base needs"):
        model.adapt(dataclasses.replace(SPEC, modules={"q_proj": (32, 64)}))
    monkeypatch.setattr(model_module.np, "ascontiguousarray", np.zeros_like)
    with pytest.raises(IntegrityError, match="did not load"):
        model.load_state(head)


def test_autograd_stays_above_the_cut(tiny_base: Path, owners_data: dict[str, Path]) -> None:
    """Frozen layers below the first adapted one are computed once a record, without a graph."""
    model = LoraModel(tiny_base, BASE)
    model.load_state(AdapterState.initial(dataclasses.replace(SPEC, layers=(1,)), SeededRng(0)))
    model.parameters(("B",))
    batch = open_dataset(owners_data["east"], ChatTokenizer(tiny_base), max_tokens=200).train[:3]
    calls: list[bool] = []
    model._causal.model.layers[0].register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    first, second = (model.answer_losses(batch)[0] for _ in range(2))
    assert calls == [False]
    assert torch.equal(first, second)


def test_a_record_may_be_scored_and_trained_on(tiny_base: Path, owners_data: dict[str, Path]) -> None:
    """States kept while scoring serve training too, should a record stand in both files."""
    model = LoraModel(tiny_base, BASE)
    state = AdapterState.initial(dataclasses.replace(SPEC, layers=(1,)), SeededRng(0))
    batch = open_dataset(owners_data["east"], ChatTokenizer(tiny_base), max_tokens=200).train[:3]
    evaluate(model, state, batch)
    parameters = model.parameters(("A", "B"))
    model.answer_losses(batch)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in parameters)


def test_the_toy_learns_privately_and_plainly(head: AdapterState) -> None:
    """The fake trainer obeys the same port, and its loss falls with and without noise."""
    trainer: Trainer = ToyTrainer(BASE, EAST)
    base = trainer.score(head).mean_loss
    private = plan(Recipe("sgd", 2.0, 3, 1, 4, 200), PRIVATE, head)
    for made in (private, plan(adamw(optimizer="sgd", learning_rate=1.0), Mechanism.none(), head)):
        trained = trainer.fit(head, made, ("B",), SeededRng(3), lambda *at: None)
        assert trainer.score(trained.state).mean_loss < base
    assert trainer.dataset != ToyTrainer(BASE, OwnerId("west")).dataset


def test_a_record_that_overflows_when_it_is_scored_tells_nobody() -> None:
    """It counts as the largest loss there is: an error would say in clear whose record overflows."""

    class Overflowing:
        """Two answer tokens a record; every second record's loss is no number."""

        def load_state(self, _state: AdapterState) -> None:
            pass

        def train_mode(self, _on: bool) -> None:
            pass

        def answer_losses(self, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
            sums = torch.tensor([2.0 if i % 2 else float("nan") for i in range(len(examples))])
            return sums, torch.full((len(examples),), 2)

    examples = [Example((1, 2, 3), (0, 1, 1))] * 4
    scored = evaluate(Overflowing(), AdapterState.initial(SPEC, SeededRng("head")), examples)  # type: ignore[arg-type]
    assert scored.mean_loss == (2 * 2 * LOSS_LIMIT + 2 * 2.0) / 8
