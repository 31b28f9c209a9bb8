"""DP-SGD: the four traps, clipping, noise and the divisor, on a tiny Llama."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
from scipy import stats

from fedllm.adapter import AdapterSpec, AdapterState
from fedllm.client import dpsgd
from fedllm.client.dataset import Example, Unit, open_dataset
from fedllm.client.model import LoraModel
from fedllm.client.tokenizer import ChatTokenizer
from fedllm.errors import ConfigError
from fedllm.ids import Digest
from fedllm.messages.mechanism import RELATION_ADD_REMOVE, UNIT_RECORD, Mechanism
from fedllm.messages.plan import Recipe
from fedllm.privacy.clip import SLACK
from fedllm.rng import OsRng, Rng, SeededRng, uniform_floats

BASE = Digest("ab" * 32)
SPEC = AdapterSpec(BASE, 4, 8, {"q_proj": (64, 64), "v_proj": (32, 64)}, (1,))
RECIPE = Recipe("sgd", 2.0, 1, 1, 4, 200)
ALPHA = 1e-6  # false-alarm rate of every statistical test here


def mechanism(*, noise: float = 0.8, clip: float = 0.05, rate: float = 0.25, steps: int = 1) -> Mechanism:
    """Return a DP-SGD mechanism with a few numbers changed."""
    return Mechanism("dp-sgd", UNIT_RECORD, RELATION_ADD_REMOVE, noise, clip, rate, steps, 1e-5)


def started() -> AdapterState:
    """Return an adapter whose B is not zero, so that both factors have gradients."""
    state = AdapterState.initial(SPEC, SeededRng("start"))
    layout = SPEC.layout(("B",))
    flat = (uniform_floats(SeededRng("b"), layout.size) - 0.5).astype(np.float32) * 0.1
    return state.replace(layout.unflatten(flat))


@pytest.fixture(scope="module")
def examples(tiny_base: Path, owners_data: dict[str, Path]) -> tuple[Example, ...]:
    """Return training records of different lengths."""
    train = open_dataset(owners_data["east"], ChatTokenizer(tiny_base), max_tokens=200).train
    return tuple(Example(e.input_ids[k % 9 :], e.labels[k % 9 :]) for k, e in enumerate(train))


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> LoraModel:
    """Return the tiny model in float32 (the naive twin needs exact sums), loaded once."""
    made = LoraModel(tiny_base, BASE)
    made._causal.float()
    return made


def gradients(model: LoraModel, examples: list[Example], factors: tuple[str, ...] = ("A", "B")) -> np.ndarray:
    """Return per-record gradients as DP-SGD computes them."""
    model.load_state(started())
    parameters = model.parameters(factors)
    with dpsgd._per_record(model) as upper:
        return dpsgd.record_gradients(model, upper, parameters, examples)


def units(examples: Sequence[Example]) -> list[Unit]:
    """Return each record as a unit of its own."""
    return [Unit((example,)) for example in examples]


def moved(
    model: LoraModel, examples: Sequence[Example], plan: Mechanism, declared: int, seed: str, rng: Rng | None = None
) -> np.ndarray:
    """Return how far one private training moved B."""
    state = started()
    model.load_state(state)
    layout = SPEC.layout(("B",))
    parameters = model.parameters(("B",))
    rng = rng or SeededRng(seed)
    dpsgd.train_private(model, parameters, units(examples), RECIPE, plan, declared, rng, lambda done, total: None)
    return layout.flatten(model.read_state().factors).astype(float) - layout.flatten(state.factors)


def test_gradients_equal_one_by_one_autograd(model: LoraModel, examples: tuple[Example, ...]) -> None:
    """The naive twin: HF's own loss and plain autograd, one record at a time, no hooks, no cut, no padding."""
    batch = list(examples[:6])
    got = gradients(model, batch)
    model.load_state(started())
    parameters = model.parameters(("A", "B"))
    for row, example in enumerate(batch):
        loss = model._causal(input_ids=torch.tensor([example.input_ids]), labels=torch.tensor([example.labels])).loss
        expected = torch.cat([g.ravel() for g in torch.autograd.grad(loss, parameters)]).double().numpy()
        assert np.linalg.norm(got[row] - expected) < 1e-3 * np.linalg.norm(expected)


def test_trap_1_a_record_does_not_feel_its_batch_mates(model: LoraModel, examples: tuple[Example, ...]) -> None:
    """HF's batch-mean loss couples records through their lengths; ours must not."""
    alone = gradients(model, [examples[0]])[0]
    short = Example(examples[1].input_ids[-4:], examples[1].labels[-4:])
    for mates in ([examples[1]], [short], list(examples[1:4])):
        together = gradients(model, [examples[0], *mates])[0]
        assert np.linalg.norm(together - alone) < 1e-4 * np.linalg.norm(alone)


def test_trap_2_an_empty_batch_takes_a_step_of_noise(model: LoraModel) -> None:
    """No record sampled: the step happens all the same, with noise of exactly (sigma C lr / C / (q N))^2."""
    plan, declared = mechanism(), 40
    step = np.concatenate([moved(model, (), plan, declared, f"empty{i}") for i in range(4)])
    _assert_gaussian(step, plan.noise_multiplier * RECIPE.learning_rate / (plan.sample_rate * declared))


def test_noise_is_there_when_gradients_are_zero(
    model: LoraModel, examples: tuple[Example, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a useful epsilon a loss cannot tell noise on from off; the variance of an update can."""
    monkeypatch.setattr(dpsgd, "record_gradients", lambda m, u, p, e: np.zeros((len(e), sum(x.numel() for x in p))))
    plan, declared = mechanism(noise=1.5, rate=0.5), 40
    step = np.concatenate([moved(model, examples, plan, declared, f"zero{i}") for i in range(4)])
    _assert_gaussian(step, plan.noise_multiplier * RECIPE.learning_rate / (plan.sample_rate * declared))


def _assert_gaussian(step: np.ndarray, sigma: float) -> None:
    low, high = stats.chi2.ppf([ALPHA / 2, 1 - ALPHA / 2], df=step.size)
    assert low < float((step**2).sum()) / sigma**2 < high
    assert stats.kstest(step / sigma, "norm").pvalue > ALPHA


def test_trap_3_checkpointing_is_exact(tiny_base: Path, model: LoraModel, examples: tuple[Example, ...]) -> None:
    """Non-re-entrant checkpointing loses per-sample gradients; the re-entrant kind must change nothing."""
    saving = LoraModel(tiny_base, BASE, checkpointing=True)
    saving._causal.float()
    batch = list(examples[:4])
    expected = gradients(model, batch)
    passes: list[bool] = []
    saving._causal.model.layers[1].mlp.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    got = gradients(saving, batch)
    assert passes == [False, True], "activations are dropped, and computed again for the backward pass"
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-9)


def test_trap_4_what_is_read_is_what_was_trained(model: LoraModel, examples: tuple[Example, ...]) -> None:
    """Opacus' wrapper prefixes names and a lenient load then loads nothing: we read the model itself."""
    step = moved(model, examples, mechanism(rate=1.0), 40, "trap4")
    assert np.abs(step).min() > 0
    after = model.read_state()
    model.load_state(AdapterState.initial(SPEC, SeededRng("other")))
    model.load_state(after)
    assert model.read_state().digest == after.digest
    assert not any("_module" in name for name, _ in model.tail.named_parameters())
    assert not any(hasattr(p, "grad_sample") for p in model.tail.parameters()), "hooks are gone"


def test_an_interrupted_step_leaves_nothing_behind(model: LoraModel, examples: tuple[Example, ...]) -> None:
    """A forward pass without its backward pass, of another size: the next training's gradients are its own alone."""
    expected = gradients(model, list(examples[:2]))
    model.load_state(started())
    model.parameters(("A", "B"))
    with pytest.raises(RuntimeError, match="out of memory"), dpsgd._per_record(model) as upper:
        model.answer_losses(examples[2:7], upper=upper)
        raise RuntimeError("out of memory")
    np.testing.assert_allclose(gradients(model, list(examples[:2])), expected, rtol=1e-5, atol=1e-9)
    left = {name for module in model.tail.modules() for name in vars(module)}
    assert not left & {"activations", "max_batch_len", "autograd_grad_sample_hooks"}


def test_only_the_trained_factor_moves(model: LoraModel, examples: tuple[Example, ...]) -> None:
    """A frozen factor stays bit for bit."""
    moved(model, examples, mechanism(rate=1.0), 40, "only")
    names = [name for name, _ in SPEC.layout(("A",)).entries]
    assert all(model.read_state().factors[n].tobytes() == started().factors[n].tobytes() for n in names)


def test_no_record_counts_more_than_the_clip_norm(model: LoraModel, examples: tuple[Example, ...]) -> None:
    """Adding one record moves the clipped sum by at most C (1 - 2^-10), and a large gradient by all of it."""
    model.load_state(started())
    parameters = model.parameters(("B",))
    clip = 1e-4
    with dpsgd._per_record(model) as upper:
        one, many, fewer, none = (
            dpsgd.clipped_sum(model, upper, parameters, units(part), clip, 4)[0]
            for part in (examples[:1], examples[:9], examples[1:9], [])
        )
    assert np.linalg.norm(one) == pytest.approx(clip * (1 - SLACK), rel=1e-9)
    np.testing.assert_allclose(many - fewer, one, atol=clip * 1e-4)
    assert not none.any()


def test_microbatches_change_memory_not_the_result(model: LoraModel, examples: tuple[Example, ...]) -> None:
    """The sum over one large batch is the sum over small ones."""
    model.load_state(started())
    parameters = model.parameters(("B",))
    with dpsgd._per_record(model) as upper:
        batch = units(examples[:10])
        sums = [dpsgd.clipped_sum(model, upper, parameters, batch, 0.05, size)[0] for size in (1, 3, 10)]
    for other in sums[1:]:
        np.testing.assert_allclose(other, sums[0], rtol=1e-3, atol=1e-7)


def test_the_divisor_is_the_declared_size(model: LoraModel, examples: tuple[Example, ...]) -> None:
    """Twice the declared size, half the step: the private count is in neither."""
    plan = mechanism(rate=1.0)
    once = moved(model, examples[:8], plan, 20, "declared")
    twice = moved(model, examples[:8], plan, 40, "declared")
    np.testing.assert_allclose(once, 2 * twice, rtol=1e-3, atol=1e-6)


def test_poisson_sampling_is_independent_per_record(examples: tuple[Example, ...]) -> None:
    """Batch sizes follow the binomial law that the accountant assumes, not a fixed size."""
    rng = SeededRng("poisson")
    sizes = np.array([len(dpsgd.poisson_sample(examples, 0.25, rng)) for _ in range(2000)])
    n, q = len(examples), 0.25
    assert abs(sizes.mean() - n * q) < 5 * math.sqrt(n * q * (1 - q) / 2000)
    low, high = stats.chi2.ppf([ALPHA / 2, 1 - ALPHA / 2], df=2000)
    assert low < ((sizes - n * q) ** 2).sum() / (n * q * (1 - q)) < high


def test_an_overflowing_record_adds_nothing_and_says_nothing(
    model: LoraModel, examples: tuple[Example, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NaN is not averaged, and no error tells the coordinator which records overflow: the step is all noise."""
    monkeypatch.setattr(
        dpsgd, "record_gradients", lambda m, u, p, e: np.full((len(e), sum(x.numel() for x in p)), np.nan)
    )
    overflowing = moved(model, examples, mechanism(rate=1.0), 40, "nan")
    assert np.isfinite(overflowing).all()
    monkeypatch.setattr(dpsgd, "record_gradients", lambda m, u, p, e: np.zeros((len(e), sum(x.numel() for x in p))))
    assert (overflowing == moved(model, examples, mechanism(rate=1.0), 40, "nan")).all()


def test_too_coarse_a_grid_is_refused(model: LoraModel, examples: tuple[Example, ...]) -> None:
    """Noise so large that rounding to its grid could pass the clipping slack: no guarantee, no training."""
    with pytest.raises(ConfigError, match="noise grid"):
        moved(model, examples, mechanism(noise=1e4), 40, "coarse")


def test_all_randomness_is_the_operating_systems(
    model: LoraModel, examples: tuple[Example, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Generators of torch and numpy can be predicted from their outputs: none is asked, none moves."""

    def refuse(*_arguments: object, **_keywords: object) -> NoReturn:
        raise AssertionError("a generator that is not cryptographic was asked")

    for name in ("normal", "randn", "rand", "randint", "randperm", "bernoulli", "randn_like", "rand_like"):
        monkeypatch.setattr(torch, name, refuse)
    for name in ("normal_", "uniform_", "bernoulli_", "random_", "exponential_", "log_normal_", "cauchy_"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    for name in ("default_rng", "normal", "standard_normal", "randn", "random", "uniform", "laplace", "choice"):
        monkeypatch.setattr(np.random, name, refuse)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    asked: list[int] = []

    class Counting(OsRng):
        def token(self, size: int) -> bytes:
            asked.append(size)
            return super().token(size)

    step = moved(model, examples, mechanism(), 40, "unused", Counting())
    assert sum(asked) > 8 * step.size, "the noise alone needs a word an entry"
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
    assert not np.array_equal(step, moved(model, examples, mechanism(), 40, "unused", OsRng()))


@pytest.mark.parametrize("values", [np.zeros, np.ones])
def test_zero_gradients_are_not_divided_by(
    model: LoraModel, examples: tuple[Example, ...], monkeypatch: pytest.MonkeyPatch, values: Callable[..., np.ndarray]
) -> None:
    """A gradient without length stays, one with length is cut to the clip norm, however large that is."""
    monkeypatch.setattr(dpsgd, "record_gradients", lambda m, u, p, e: values((len(e), sum(x.numel() for x in p))))
    model.load_state(started())
    parameters = model.parameters(("B",))
    total, balance = dpsgd.clipped_sum(model, model.tail, parameters, units(examples[:3]), 12.0, 4)
    length = np.linalg.norm(values(sum(p.numel() for p in parameters)))
    assert np.linalg.norm(total) == pytest.approx(3 * min(length, 12.0 * (1 - SLACK)))
    assert balance == (3 if length <= 12.0 else -3)
