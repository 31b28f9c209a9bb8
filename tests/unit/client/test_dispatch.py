"""Which training a plan's kind of mechanism means, in both trainers, and what they are given for it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from unit.client.trainer_fakes import BASE, EAST, PRIVATE, SPEC, adamw, plan

from fedllm.adapter import AdapterState
from fedllm.client import app, dpsgd, toy
from fedllm.client.toy import ToyTrainer
from fedllm.client.train import LoraTrainer
from fedllm.client.trainer import Trainer, check_steps
from fedllm.config import ClientSettings
from fedllm.errors import ConfigError, PolicyRefused
from fedllm.messages.mechanism import (
    RELATION_ADD_REMOVE,
    RELATION_ZERO_OUT,
    UNIT_OWNER,
    UNIT_RECORD,
    Mechanism,
    NoiseShares,
    Stream,
)
from fedllm.messages.plan import Recipe
from fedllm.rng import SeededRng

SGD = Recipe("sgd", 1.0, 3, 8, 4, 200)
SKELLAM = Mechanism(
    "skellam",
    UNIT_OWNER,
    RELATION_ZERO_OUT,
    1.0,
    1.0,
    1.0,
    1,
    1e-5,
    shares=NoiseShares(3, SPEC.layout(("B",)).size, 99),
)
FTRL = Mechanism("dp-ftrl", UNIT_RECORD, RELATION_ADD_REMOVE, 2.0, 0.5, 1.0, 3, 1e-5, stream=Stream("tools", 12, 2, 4))
HEAD = AdapterState.initial(SPEC, SeededRng("head"))
Made = Callable[..., Trainer]


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory, owners_data: dict[str, Path]) -> Path:
    """Return east's records, three in a row of one person: 14 persons."""
    folder = tmp_path_factory.mktemp("grouped")
    for name in ("train", "heldout"):
        lines = (owners_data["east"] / f"{name}.jsonl").read_text().splitlines()
        rows = [{**json.loads(line), "who": f"{name} {k // 3}"} for k, line in enumerate(lines)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(params=["lora", "toy"])
def made(request: pytest.FixtureRequest, tiny_base: Path, owners_data: dict[str, Path]) -> Made:
    """Return what makes a trainer of either kind."""
    if request.param == "toy":
        return lambda **changes: ToyTrainer(BASE, EAST, **changes)
    return lambda **changes: LoraTrainer(tiny_base, BASE, owners_data["east"], max_tokens=200, owner=EAST, **changes)


def test_skellam_trains_plainly_and_tells_no_loss(made: Made) -> None:
    """The noise comes later; a loss, which has none, may not leave beside the sum."""
    trainer = made()
    several = dataclasses.replace(SGD, steps=4)
    plain = trainer.fit(HEAD, plan(several, Mechanism.none(), HEAD), ("B",), SeededRng(5), lambda *_: None)
    noised = trainer.fit(HEAD, plan(several, SKELLAM, HEAD), ("B",), SeededRng(5), lambda *_: None)
    assert noised.state.digest == plain.state.digest != HEAD.digest
    assert plain.mean_loss is not None
    assert (noised.mean_loss, noised.steps) == (None, 4)


def test_no_record_that_fits_is_the_zero_update(tiny_base: Path, owners_data: dict[str, Path]) -> None:
    """Under skellam an error would say about an owner's data what no noise covers."""
    trainer = LoraTrainer(tiny_base, BASE, owners_data["east"], max_tokens=200, owner=EAST)
    short = dataclasses.replace(SGD, max_tokens=2)
    trained = trainer.fit(HEAD, plan(short, SKELLAM, HEAD), ("B",), SeededRng(5), lambda *_: None)
    assert trained.state.digest == HEAD.digest


def test_a_streams_training_is_given_what_it_needs(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients clipped within the slack at the parameters as they are; keys; the public size; and its moves arrive."""
    given: dict[str, Any] = {}

    def stream(
        gradient: Callable[[Sequence[int]], np.ndarray], keys: list[bytes], position: np.ndarray, **rest
    ) -> None:
        given.update(rest, keys=keys, position=position.copy())
        one, two = gradient([0]), gradient([0, 1])
        given["sums"] = one, two, gradient([1])
        rest["assign"](position + 0.25)
        given["after"] = gradient([0])
        rest["progress"](1, 3)

    monkeypatch.setattr(toy, "train_stream", stream)
    monkeypatch.setattr(dpsgd, "train_stream", stream)
    layout, done = SPEC.layout(("B",)), []
    trainer, small = made(streams=tmp_path), dataclasses.replace(FTRL, clip_norm=1e-3)
    trained = trainer.fit(HEAD, plan(SGD, small, HEAD), ("B",), SeededRng(5), lambda *at: done.append(at), charged=6)
    assert trained.mean_loss is None
    assert done == [(1, 3)]
    assert given["charged"] == 6
    assert (given["mechanism"], given["learning_rate"], given["declared_records"]) == (small, 1.0, 40)
    assert len(set(given["keys"])) == len(given["keys"]) == trainer.records
    np.testing.assert_array_equal(given["position"], layout.flatten(HEAD.factors))
    one, two, other = given["sums"]
    assert np.linalg.norm(one) == pytest.approx(1e-3 * (1 - 2**-10), rel=1e-9)
    np.testing.assert_allclose(two, one + other, atol=1e-7)
    assert np.linalg.norm(given["after"] - one) > 1e-3 * np.linalg.norm(one), "computed where assign has moved it"
    np.testing.assert_allclose(layout.flatten(trained.state.factors), given["position"] + 0.25, atol=1e-6)


def test_a_stream_runs_over_two_rounds(made: Made, tmp_path: Path) -> None:
    """The real stream, end to end: noise at every step, state kept in the folder and taken up again."""
    trainer = made(streams=tmp_path / "streams")
    states = [HEAD]
    for _ in range(2):
        head = states[-1]
        states.append(trainer.fit(head, plan(SGD, FTRL, head), ("B",), SeededRng(len(states)), lambda *_: None).state)
    assert len({state.digest for state in states}) == 3
    assert any((tmp_path / "streams").iterdir())


def test_a_stream_without_a_folder_is_refused(made: Made) -> None:
    """Its state must outlive the round: begun in memory, it would begin again and be charged once."""
    with pytest.raises(ConfigError, match="no folder"):
        made().fit(HEAD, plan(SGD, FTRL, HEAD), ("B",), SeededRng(5), lambda *_: None)


@pytest.mark.parametrize(("mechanism", "steps", "refused"), [
    (PRIVATE, 3, False), (PRIVATE, 4, True), (FTRL, 3, False), (FTRL, 2, True), (SKELLAM, 3, False),
    (Mechanism.none(), 3, False),
])  # fmt: skip
def test_steps_are_priced_where_they_are_noised(mechanism: Mechanism, steps: int, refused: bool) -> None:
    """A mechanism in the silo releases every step; a sum's noise covers what comes out at the end."""
    asked = plan(dataclasses.replace(SGD, steps=steps), mechanism, HEAD)
    if refused:
        with pytest.raises(PolicyRefused, match=f"trains {steps} steps and prices {mechanism.steps}"):
            check_steps(asked)
    else:
        check_steps(asked)


def test_grouped_records_are_declared_and_trained_by_person(
    tiny_base: Path, grouped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Persons are what is counted and what a step sums over; without a column records are."""
    batches: list[int] = []
    right = dpsgd.clipped_sum
    monkeypatch.setattr(dpsgd, "clipped_sum", lambda *a: batches.append(len(a[3])) or right(*a))
    everyone = dataclasses.replace(PRIVATE, sample_rate=1.0)
    for column, count in (("who", 14), ("", 40)):
        trainer = LoraTrainer(tiny_base, BASE, grouped, max_tokens=200, owner=EAST, unit_column=column)
        trained = trainer.fit(HEAD, plan(SGD, everyone, HEAD), ("B",), SeededRng(5), lambda *_: None)
        assert trained.records == trainer.records == count
        assert batches == [count] * 3
        batches.clear()


def test_the_owners_settings_reach_the_trainer(tiny_base: Path, grouped: Path, tmp_path: Path) -> None:
    """Column, checkpointing and the folder of streams, from client.toml to where they act."""
    required = {"owner": "east", "federation": "tools", "coordinator_key": "k", "roster": tmp_path}
    settings = ClientSettings(**required, home=tmp_path, data=grouped, base=tiny_base, max_tokens=200)
    plain = app._load_trainer(settings)
    changed = app._load_trainer(dataclasses.replace(settings, unit_column="who", checkpointing=True))
    assert isinstance(plain, LoraTrainer)
    assert isinstance(changed, LoraTrainer)
    assert (plain.records, changed.records) == (40, 14)
    assert (plain._model._checkpointing, changed._model._checkpointing) == (False, True)
    assert changed._streams == tmp_path / "streams"


def test_checkpointing_trains_the_same(tiny_base: Path, owners_data: dict[str, Path]) -> None:
    """Activations made twice, gradients the same: plainly and under noise of the same seed."""
    states = []
    for on in (False, True):
        trainer = LoraTrainer(tiny_base, BASE, owners_data["east"], max_tokens=200, owner=EAST, checkpointing=on)
        trainer._model._causal.float()
        for recipe, mechanism in ((adamw(steps=2, optimizer="sgd"), Mechanism.none()), (SGD, PRIVATE)):
            trained = trainer.fit(HEAD, plan(recipe, mechanism, HEAD), ("A", "B"), SeededRng(5), lambda *_: None)
            states.append(trained.state.flat - HEAD.flat)
    for without, with_it in zip(states[:2], states[2:], strict=True):
        assert np.linalg.norm(with_it - without) < 1e-4 * np.linalg.norm(without)
