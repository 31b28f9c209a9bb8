"""Adaptive clipping in the trainers: each step is clipped, noised and divided at a norm of its own."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from unit.client.trainer_fakes import BASE, EAST, PRIVATE, SPEC, plan

from fedllm.adapter import AdapterState
from fedllm.client import dpsgd, toy
from fedllm.client.dataset import Example, Unit
from fedllm.client.model import LoraModel
from fedllm.client.toy import ToyTrainer
from fedllm.errors import ConfigError
from fedllm.messages.mechanism import AdaptiveClip, Mechanism
from fedllm.messages.plan import Recipe
from fedllm.privacy.clip import SLACK
from fedllm.privacy.noise import GRID_BITS, GaussianGrid, discrete_gaussian
from fedllm.rng import Rng, SeededRng

STEPS, RATE = 5, 0.7
ADAPTIVE = dataclasses.replace(PRIVATE, steps=STEPS, sample_rate=1.0, adaptive=AdaptiveClip(0.5, 0.5, 4.0))
UNITS = [Unit((Example((1, 2, k + 3), (1, 2, k + 3)),)) for k in range(30)]


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> LoraModel:
    """Return the tiny model, adapted; its gradients are replaced here."""
    made = LoraModel(tiny_base, BASE)
    made.load_state(AdapterState.initial(SPEC, SeededRng("head")))
    return made


@pytest.fixture
def norms(monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Give each of `UNITS` a constant gradient along its own axis, and return their lengths: two have none."""
    lengths = np.exp(np.linspace(-3, 1, len(UNITS)))
    lengths[-2:] = np.nan, np.inf

    def fixed(_m: object, _u: object, p: list, e: list[Example]) -> np.ndarray:
        rows = np.zeros((len(e), sum(x.numel() for x in p)))
        for row, example in zip(rows, e, strict=True):
            row[example.input_ids[2] - 3] = lengths[example.input_ids[2] - 3]
        return rows

    monkeypatch.setattr(dpsgd, "record_gradients", fixed)
    return lengths


def twin(lengths: np.ndarray, mechanism: Mechanism, declared: int, size: int, rng: Rng) -> tuple[np.ndarray, list]:
    """Return how far training moves, and its clip norms, by the paper's own formulas with bits instead of signs."""
    assert mechanism.adaptive is not None
    clip, position, path = mechanism.clip_norm, np.zeros(size), []
    b = mechanism.adaptive.count_noise
    multiplier = (mechanism.noise_multiplier**-2 - (2 * b) ** -2) ** -0.5
    for _ in range(mechanism.steps):
        path.append(clip)
        taken = np.array([rng.token(8) for _ in lengths])
        assert taken.size == lengths.size  # at rate 1 every unit is sampled, whatever the words are
        total = np.zeros(size)
        finite = np.where(np.isfinite(lengths), lengths, 0.0)
        total[: lengths.size] = np.minimum(finite, clip * (1 - SLACK))
        position -= RATE / clip * GaussianGrid(multiplier * clip).add_noise(total, rng) / declared
        bits = (lengths <= clip).astype(float)  # Andrew et al. 2021, algorithm 1: sum of b_i - 1/2, noise N(0, b^2)
        noise = discrete_gaussian(2 * b, 1, rng)[0] / 2
        share = ((bits - 0.5).sum() + noise) / declared + 0.5
        clip *= math.exp(-mechanism.adaptive.rate * (share - mechanism.adaptive.quantile))
    return position, path


def test_training_is_the_papers(model: LoraModel, norms: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """The naive twin on the same random bytes: norms, noise and steps; no number counts as long and adds nothing."""
    parameters = model.parameters(("B",))
    size = sum(p.numel() for p in parameters)
    path: list[float] = []
    right = dpsgd.clipped_sum
    monkeypatch.setattr(dpsgd, "clipped_sum", lambda *a: path.append(a[4]) or right(*a))
    before = dpsgd._flat(parameters)
    recipe = Recipe("sgd", RATE, STEPS, 1, 8, 200)
    dpsgd.train_private(model, parameters, UNITS, recipe, ADAPTIVE, 32, SeededRng("same"), lambda *_: None)
    moved = dpsgd._flat(parameters) - before
    expected, clips = twin(norms, ADAPTIVE, 32, size, SeededRng("same"))
    np.testing.assert_allclose(path, clips, rtol=1e-12)
    assert len(set(path)) > 1
    np.testing.assert_allclose(moved, expected, atol=1e-6)


def test_each_round_starts_at_the_plans_norm(
    model: LoraModel, norms: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is carried over: a round's first norm is public."""
    del norms
    parameters = model.parameters(("B",))
    path: list[float] = []
    right = dpsgd.clipped_sum
    monkeypatch.setattr(dpsgd, "clipped_sum", lambda *a: path.append(a[4]) or right(*a))
    recipe = Recipe("sgd", RATE, STEPS, 1, 8, 200)
    for seed in (1, 2):
        dpsgd.train_private(model, parameters, UNITS, recipe, ADAPTIVE, 32, SeededRng(seed), lambda *_: None)
    assert path[0] == path[STEPS] == ADAPTIVE.clip_norm
    assert path[1:STEPS] != path[STEPS + 1 :]


def test_a_norm_is_compared_before_the_slack(model: LoraModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient of just the clip norm is short, and is cut by the slack all the same."""
    edge = np.array([0.05, np.nextafter(0.05, 1)])
    parameters = model.parameters(("B",))
    size = sum(p.numel() for p in parameters)
    monkeypatch.setattr(dpsgd, "record_gradients", lambda *_: edge[:, None] * np.eye(2, size))
    total, balance = dpsgd.clipped_sum(model, model.tail, parameters, UNITS[:2], 0.05, 8)
    assert balance == 0
    np.testing.assert_allclose(total[:2], 0.05 * (1 - SLACK))


def test_the_toy_clips_as_the_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake trainer's balances come from its own records' norms, and move the same helper."""
    seen: list[tuple[float, int]] = []
    moved: list[float] = []
    right = toy.next_clip_norm

    def note(mechanism: Mechanism, clip_norm: float, balance: int, declared: int, rng: Rng) -> float:
        seen.append((clip_norm, balance))
        moved.append(right(mechanism, clip_norm, balance, declared, rng))
        return moved[-1]

    monkeypatch.setattr(toy, "next_clip_norm", note)
    head = AdapterState.initial(SPEC, SeededRng("head"))
    trainer = ToyTrainer(BASE, EAST)
    data = trainer._of(SPEC)
    first = toy._gradients(head, data.inputs, data.targets(np.arange(40)), ("B",))[0].norms()
    wide = dataclasses.replace(ADAPTIVE, clip_norm=float(np.median(first)))
    made = plan(Recipe("sgd", 2.0, STEPS, 1, 4, 200), wide, head)
    trained = trainer.fit(head, made, ("B",), SeededRng(3), lambda *_: None)
    assert trained.mean_loss is None
    assert seen[0] == (wide.clip_norm, int(np.where(first <= wide.clip_norm, 1, -1).sum()))
    assert [clip for clip, _ in seen] == [wide.clip_norm, *moved[:-1]]
    assert len(set(moved)) > 1


def test_a_grid_too_coarse_for_a_moving_norm_is_refused_before_the_first_step(model: LoraModel) -> None:
    """It would be refused in mid-round, after what was charged was spent."""
    parameters = model.parameters(("B",))
    dimension = sum(p.numel() for p in parameters)
    noise = (
        1.2 * SLACK * 2**GRID_BITS / math.sqrt(dimension)
    )  # fits where sigma is just below a power of two, not just above one
    clip = 1.99 * 2 ** math.floor(math.log2(noise)) / noise
    fixed = dataclasses.replace(PRIVATE, noise_multiplier=noise, clip_norm=clip, sample_rate=1.0, steps=1)
    moving = dataclasses.replace(fixed, adaptive=AdaptiveClip(0.5, 0.2, 1e4))
    done: list[int] = []
    recipe = Recipe("sgd", 1e-6, 1, 1, 4, 200)
    dpsgd.train_private(model, parameters, [], recipe, fixed, 40, SeededRng(1), lambda at, _: done.append(at))
    with pytest.raises(ConfigError, match="noise grid"):
        dpsgd.train_private(model, parameters, [], recipe, moving, 40, SeededRng(1), lambda at, _: done.append(at))
    assert done == [1]
