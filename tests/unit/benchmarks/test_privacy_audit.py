"""The bound is the paper's and valid; the audit finds training without noise, and fails if it would not."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from benchmarks import privacy_audit
from benchmarks.audit_statistics import Attack, count_correct, epsilon_lower_bound, p_value
from benchmarks.document import GATE_FAILED, GateFailed
from benchmarks.privacy_audit import Audit, Case, judge
from fedllm.client import dpsgd
from fedllm.privacy import noise
from fedllm.rng import SeededRng

SMALL = Case(claimed=4.0, sample_rate=1.0, rounds=2, canaries=400, rank=4)


def naive_p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Return the p-value as corollary 5.4 writes it, with scipy's probabilities."""
    found = binom(guesses, 1 / (1 + math.exp(-epsilon)))
    alpha = max((found.pmf(range(correct - i, correct)).sum() / i for i in range(1, correct + 1)), default=0.0)
    return min(1.0, found.sf(correct - 1) + 2 * canaries * delta * alpha)


@pytest.mark.parametrize(
    ("canaries", "guesses", "correct", "delta", "published"),
    [(1000, 100, 75, 1e-4, 0.673), (100_000, 1510, 1439, 1e-5, 2.675)],
    ids=["appendix D", "section 7"],
)
def test_the_bounds_printed_in_the_paper(canaries, guesses, correct, delta, published) -> None:
    """Both figures of arXiv 2305.08846 come out, to the last digit that is printed (one is cut off, not rounded)."""
    assert epsilon_lower_bound(canaries, guesses, correct, delta) == pytest.approx(published, abs=1e-3)


def test_all_right_is_worth_what_one_computes_by_hand() -> None:
    """1000 of 1000 right has probability q^1000 at delta 0: q = 0.05^(1/1000), epsilon = log(q / (1 - q))."""
    q = 0.05 ** (1 / 1000)
    by_hand = math.log(q / (1 - q))
    assert by_hand == pytest.approx(5.809, abs=1e-3)
    assert epsilon_lower_bound(1000, 1000, 1000, 0.0) == pytest.approx(by_hand, abs=1e-6)
    assert by_hand - 0.2 < epsilon_lower_bound(1000, 1000, 1000, 1e-5) < by_hand


@pytest.mark.parametrize("correct", [0, 1, 499, 500, 520])
def test_half_right_refutes_nothing(correct: int) -> None:
    """What coins get right is no evidence; nor is less."""
    assert epsilon_lower_bound(1000, 1000, correct, 1e-5) == 0.0


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 20).flatmap(lambda r: st.tuples(st.just(r), st.integers(0, r), st.integers(r, 200))),
    st.floats(0, 8),
    st.sampled_from([0.0, 1e-5, 1e-3, 0.1]),
)
def test_the_p_value_is_its_naive_twins(sizes: tuple[int, int, int], epsilon: float, delta: float) -> None:
    """One cumulative sum gives what scipy gives for each i apart."""
    guesses, correct, canaries = sizes
    ours = p_value(canaries, guesses, correct, epsilon, delta)
    assert ours == pytest.approx(naive_p_value(canaries, guesses, correct, epsilon, delta), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-3])
def test_more_right_guesses_never_lower_the_bound(delta: float) -> None:
    """Monotone in the number of right guesses; and a larger delta explains more, so it never raises the bound."""
    bounds = [epsilon_lower_bound(300, 60, correct, delta) for correct in range(61)]
    assert bounds == sorted(bounds)
    assert bounds[-1] > 1.8
    assert all(b <= a for a, b in zip([epsilon_lower_bound(300, 60, v, 0.0) for v in range(61)], bounds, strict=True))


@pytest.mark.parametrize("numbers", [(10, 11, 5), (10, 5, 6), (10, 0, 0), (10, 5, -1)])
def test_impossible_counts_are_refused(numbers: tuple[int, int, int]) -> None:
    """Guesses are among the canaries, right guesses among the guesses."""
    with pytest.raises(ValueError, match="guesses on"):
        p_value(*numbers, 1.0, 1e-5)


@pytest.mark.parametrize("delta", [0.0, 0.02])
def test_randomised_response_is_wrongly_accused_in_one_run_of_twenty_at_most(delta: float) -> None:
    """2000 runs of the mechanism that the bound is tight for: bounds above its epsilon of 1 stay within 5 %.

    Each bit is told truly with probability e / (1 + e); with delta, all bits are told with probability delta.
    """
    runs, bits = 2000, 200
    draw = np.random.default_rng(5)
    correct = draw.binomial(bits, 1 / (1 + math.exp(-1)), runs)
    correct[draw.random(runs) < delta] = bits
    bound = {v: epsilon_lower_bound(bits, bits, int(v), delta) for v in np.unique(correct)}
    wrong = sum(bound[v] > 1.0 for v in correct) / runs
    assert wrong <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)
    if delta == 0:
        assert wrong > 0.01  # else the bound would be valid because it is useless
        assert np.mean([bound[v] for v in correct]) > 0.6


def test_guesses_are_the_surest() -> None:
    """The highest half is guessed in, the lowest out, the middle not at all."""
    scores = np.array([0.9, 0.8, 0.1, 0.0, 0.5, 0.4])
    assert count_correct(scores, np.array([1, 1, 0, 0, 0, 1], dtype=bool), 4) == 4
    assert count_correct(scores, np.array([0, 1, 0, 1, 1, 0], dtype=bool), 4) == 2
    with pytest.raises(ValueError, match="even"):
        count_correct(scores, np.zeros(6, dtype=bool), 3)


@pytest.mark.parametrize("rate", [1.0, 0.25])
def test_the_attack_is_the_linear_estimate_of_least_error(rate: float) -> None:
    """Scores equal the textbook's Cov(b, y) Cov(y)^-1 (y - E y), which works between parameters, not canaries."""
    draw = np.random.default_rng(3)
    canaries, dimension, spread = 6, 9, 0.7
    attack = Attack(canaries, spread, rate)
    steps = []
    for _ in range(3):
        gradients = draw.normal(size=(canaries, dimension)).astype(np.float32)
        released = draw.normal(size=dimension)
        attack.observe(gradients, released)
        steps.append((gradients.astype(np.float64), released))
    tall = np.concatenate([g for g, _ in steps], axis=1)
    own = [rate * (1 - rate) / 2 * g.T @ g + spread**2 * np.eye(dimension) for g, _ in steps]
    covariance = rate**2 / 4 * tall.T @ tall
    for i, block in enumerate(own):
        covariance[i * dimension : (i + 1) * dimension, i * dimension : (i + 1) * dimension] += block
    rest = np.concatenate([y for _, y in steps]) - rate / 2 * tall.sum(axis=0)
    expected = rate / 4 * tall @ np.linalg.solve(covariance, rest)
    assert attack.scores() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_seam_takes_the_noise_and_nothing_else() -> None:
    """With factor 0 a sum is rounded to the grid and no more; with 1/2 its noise halves; then all is as before."""
    grid = noise.GaussianGrid(2.0)
    x = np.linspace(-1, 1, 4000)
    with privacy_audit.noise_times(privacy_audit.OFF) as drawn:
        assert np.abs(grid.add_noise(x, SeededRng(1)) - x).max() <= grid.step / 2
    assert drawn == [4000]
    with privacy_audit.noise_times(privacy_audit.HALF):
        assert np.std(grid.add_noise(x, SeededRng(1)) - x) == pytest.approx(1.0, rel=0.06)
    assert np.std(grid.add_noise(x, SeededRng(1)) - x) == pytest.approx(2.0, rel=0.06)


def test_a_small_audit_of_the_real_training_finds_what_is_there(tmp_path) -> None:
    """400 canaries: no noise gives every canary away, epsilon 4 keeps its claim, a coin finds nothing."""
    row = Audit(SMALL, tmp_path, SeededRng(4)).row()
    assert row["control_correct"] == row["guesses"] == 120
    assert row["control_lower_bound"] == row["max_detectable_epsilon"] > 3
    assert row["epsilon_lower_bound"] <= row["accounted_epsilon"] <= 4.0
    assert row["correct"] < row["half_noise_correct"] < row["control_correct"]
    assert row["no_attack_lower_bound"] < 0.3
    judge(row)


def test_training_that_does_not_clip_is_refuted(tmp_path, monkeypatch) -> None:
    """The claim of epsilon 1 falls if gradients go into the sum as long as they are: the noise was made for norm 1."""
    clipped = dpsgd.clipped_sum
    monkeypatch.setattr(dpsgd, "clipped_sum", lambda *a: clipped(*a[:4], 1e6, *a[5:]))
    case = Case(claimed=1.0, sample_rate=1.0, rounds=1, canaries=400, rank=4)
    audit = Audit(case, tmp_path, SeededRng(4))
    correct = count_correct(audit.attack(privacy_audit.HONEST), audit.included, case.guesses)
    bound = epsilon_lower_bound(case.canaries, case.guesses, correct, privacy_audit.DELTA)
    with pytest.raises(GateFailed, match="refuted"):
        judge({**GOOD, "epsilon_lower_bound": bound, "half_noise_lower_bound": bound + 1})


def test_noise_in_the_control_fails_the_gate(tmp_path, monkeypatch, capsys) -> None:
    """If the noise stays on where it should be off, the audit says that it is dead, and prints no figures."""
    monkeypatch.setattr(privacy_audit, "OFF", 1.0)
    monkeypatch.setattr(privacy_audit, "QUICK", (SMALL,))
    monkeypatch.setattr(privacy_audit, "OsRng", lambda: SeededRng(4))
    assert privacy_audit.main(["--quick", "--json"]) == GATE_FAILED
    found = json.loads(capsys.readouterr().out)
    assert "the audit is dead" in found["error"]
    assert "audits" not in found


def test_noise_from_elsewhere_fails_the_gate(tmp_path, monkeypatch) -> None:
    """A training that draws its noise past the seam would make both controls honest runs: it is noticed."""
    monkeypatch.setattr(noise.GaussianGrid, "add_noise", lambda _grid, x, _rng: x)
    case = Case(claimed=1.0, sample_rate=1.0, rounds=1, canaries=20, rank=4)
    with pytest.raises(GateFailed, match="drawn 0 times"):
        Audit(case, tmp_path, SeededRng(4)).attack(privacy_audit.HONEST)


GOOD = {
    "claimed_epsilon": 1.0, "accounted_epsilon": 0.999, "sample_rate": 1.0, "epsilon_lower_bound": 0.3,
    "half_noise_lower_bound": 0.8, "control_lower_bound": 4.9,
}  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epsilon_lower_bound": 1.1, "half_noise_lower_bound": 2.0}, "refuted"),
        ({"control_lower_bound": 2.9}, "dead"),
        ({"half_noise_lower_bound": 0.3}, "dead"),
        ({"accounted_epsilon": 1.001}, "priced"),
    ],
)
def test_each_failure_is_named(wrong: dict[str, float], message: str) -> None:
    """A refuted claim, a control that sees nothing, a weak attack, a claim that training was not priced for."""
    judge(GOOD)
    with pytest.raises(GateFailed, match=message):
        judge({**GOOD, **wrong})
