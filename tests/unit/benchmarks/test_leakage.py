"""The attacks find what is there and nothing in noise; their statistics have the answers known by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import leakage, leakage_inversion, leakage_memory
from benchmarks.document import GATE_FAILED, GateFailed
from benchmarks.leakage_inversion import MODULES, Attack, Public, Ring, gate, recall, span_residuals
from benchmarks.leakage_memory import (
    PRIVATE,
    attack_row,
    auc,
    chance_exposure,
    exposure,
    gate_exposure,
    gate_membership,
    interval,
    plant,
    tpr_at,
)
from benchmarks.leakage_training import Judge, Silo, as_examples, private
from fedllm.basemodel.inspect import BaseModel, open_base

VOCABULARY, RANK, OUT = 500, 24, 40
SCORES = st.lists(st.integers(0, 5), min_size=1, max_size=30).map(lambda values: np.array(values, dtype=np.float64))


@pytest.fixture(scope="module")
def public() -> Public:
    """Return random directions for a small vocabulary."""
    draw = np.random.default_rng(0)
    return Public({m: draw.normal(size=(VOCABULARY, RANK)) for m in MODULES})


def linear_update(public: Public, tokens: list[int], seed: int, *, skip: int = 0) -> dict[str, np.ndarray]:
    """Return ``sum_t delta_t (A x_t)^T`` with random deltas; the first `skip` tokens do not move q."""
    draw = np.random.default_rng(seed)
    deltas = {m: draw.normal(size=(OUT, len(tokens))) for m in MODULES}
    deltas["q_proj"][:, :skip] = 0.0
    return {m: deltas[m] @ public.directions[m][tokens] for m in MODULES}


@pytest.mark.parametrize("count", [1, 7, RANK - 1])
def test_the_span_check_recovers_every_token_of_a_linear_layer(public: Public, count: int) -> None:
    """Exact up to one token less than the rank, in float32, for the token that moves v alone, too."""
    tokens = [int(t) for t in np.random.default_rng(count).choice(VOCABULARY, count, replace=False)]
    update = linear_update(public, tokens, count, skip=1 if count > 1 else 0)
    single = {m: piece.astype(np.float32).astype(np.float64) for m, piece in update.items()}
    assert set(public.guess(single, count)) == set(tokens)


def test_the_span_check_recovers_nothing_from_noise(public: Public) -> None:
    """Guesses on pure noise hit a record's tokens as often as random ones: 10 of 500."""
    hits = []
    for seed in range(40):
        draw = np.random.default_rng(seed)
        tokens = frozenset(int(t) for t in draw.choice(VOCABULARY, 10, replace=False))
        noise = {m: draw.normal(size=(OUT, RANK)) for m in MODULES}
        hits.append(recall(public.guess(noise, 10, deviation=1.0), tokens))
    assert np.mean(hits) < 0.06


def test_a_full_row_space_has_no_residual_to_tell_tokens_by(public: Public) -> None:
    """With more tokens than rank the attack is far from exact: what keeps a sum of many records apart."""
    tokens = list(range(4 * RANK))
    update = linear_update(public, tokens, 5)
    assert recall(public.guess(update, len(tokens)), frozenset(tokens)) < 0.6
    residuals = span_residuals(update["q_proj"], public.directions["q_proj"])
    assert residuals[tokens].max() > 0.01


def test_residuals_are_zero_inside_the_span_and_one_across_it() -> None:
    """Two known directions in three dimensions, and a floor that leaves the stronger one."""
    update = np.diag([3.0, 0.01, 0.0])
    directions = np.array([[2.0, 0, 0], [0, 5.0, 0], [0, 0, 1.0], [1.0, 0, 1.0]])
    assert span_residuals(update, directions) == pytest.approx([0, 0, 1, 0.5])
    assert span_residuals(update, directions, floor=0.1) == pytest.approx([0, 1, 1, 0.5])


def test_the_ring_opens_sums_and_hides_one_vector(public: Public) -> None:
    """An opened sum of two updates shows both records; a masked one alone is uniform words and shows none."""
    records = [[1, 2, 3], [40, 41, 42]]
    parts = [linear_update(public, tokens, seed) for seed, tokens in enumerate(records)]
    ring = Ring(max(float(np.abs(part[m]).max()) for part in parts for m in MODULES))
    opened = ring.opened(parts, "round")
    for m in MODULES:
        assert opened[m] == pytest.approx(parts[0][m] + parts[1][m], abs=4 * ring.deviation)
    assert set(public.guess(opened, 6, deviation=2 * ring.deviation)) == {1, 2, 3, 40, 41, 42}
    masked = ring.masked(parts[0], "mask")
    span = 2**leakage_inversion.RING_BITS * 2 * ring.deviation
    spread = np.concatenate([masked[m].ravel() for m in MODULES]) / span
    assert np.abs(spread).max() <= 0.5
    assert np.std(spread) == pytest.approx(1 / np.sqrt(12), rel=0.05)
    assert not {1, 2, 3} & set(public.guess(masked, 3))


def test_exposure_is_the_rank_in_bits() -> None:
    """First of 1,024 is 10 bits, the last none, in the middle one; a tie counts against the canary."""
    losses = np.arange(1024.0)
    assert exposure(losses) == 10
    assert exposure(-losses) == 0
    assert exposure(np.concatenate([[511.5], losses[:511], losses[512:]])) == pytest.approx(1, abs=0.01)
    assert exposure(np.array([1.0, 1.0])) == 0


def test_chance_exposure_is_what_random_ranks_have() -> None:
    """About log2 e; by simulation, too."""
    draw = np.random.default_rng(4)
    simulated = np.mean([exposure(draw.random(256)) for _ in range(4000)])
    assert chance_exposure(256) == pytest.approx(simulated, abs=0.1)
    assert chance_exposure(1 << 16) == pytest.approx(np.log2(np.e), abs=0.01)


@given(SCORES, SCORES)
def test_auc_is_the_share_of_pairs_in_order(members: np.ndarray, others: np.ndarray) -> None:
    """The naive twin over all pairs; swapping the sides gives the complement."""
    pairs = [(m > o) + 0.5 * (m == o) for m in members for o in others]
    assert auc(members, others) == pytest.approx(np.mean(pairs))
    assert auc(others, members) == pytest.approx(1 - np.mean(pairs))


@given(SCORES, SCORES, st.sampled_from([0.0, 0.01, 0.1, 0.5]))
def test_tpr_is_the_best_of_all_thresholds_that_are_allowed(
    members: np.ndarray, others: np.ndarray, rate: float
) -> None:
    """The naive twin tries every threshold."""
    allowed = [t for t in [*others, *members, -1.0] if (others > t).sum() <= int(rate * others.size)]
    assert tpr_at(members, others, rate) == max((members > t).mean() for t in allowed)


def test_tpr_of_known_scores() -> None:
    """One false positive of 100 is allowed at 1 %, so the threshold is the second highest non-member."""
    others = np.arange(100.0)
    members = np.array([97.0, 98.0, 98.5, 99.5])
    assert tpr_at(members, others, 0.01) == 0.5
    assert tpr_at(members, others, 0.0) == 0.25


def test_the_interval_holds_the_truth_and_narrows_with_data() -> None:
    """Scores of no difference: 0.5 is inside; more of them give a narrower interval; the seed decides."""
    draw = np.random.default_rng(6)
    few, many = draw.normal(size=(2, 30)), draw.normal(size=(2, 1000))
    low, high = interval(auc, *many, seed=1)
    assert low < 0.5 < high
    wide = interval(auc, *few, seed=1)
    assert wide[1] - wide[0] > high - low
    assert interval(auc, *few, seed=1) == wide
    assert attack_row(*few, seed=1)["auc_interval"] == pytest.approx(wide, abs=1e-3)


def test_canaries_are_repeatable_distinct_and_planted_first() -> None:
    """As many as asked for each number of repetitions; six digits; no candidate twice."""
    made = plant((0, 16), 2, 50)
    assert made == plant((0, 16), 2, 50)
    assert [each.repeats for each in made] == [0, 0, 16, 16]
    assert len({each.name for each in made}) == 4
    for each in made:
        assert len(set(each.codes)) == 50
        assert all(len(code) == 6 and code.isdigit() for code in each.codes)
        assert each.rows()[0]["completion"] == each.codes[0]


def inversion_rows(control: float, masked: float) -> dict:
    """Return a table of two rows."""
    return {
        "raw": {"control": True, "recall": control, "chance": 0.1},
        "one masked vector": {"control": False, "recall": masked, "chance": 0.1},
    }


def test_each_gate_fails_on_a_control_that_does_not_leak() -> None:
    """And the inversion's on a mask that leaks."""
    gate(inversion_rows(1.0, 0.1))
    gate_exposure({"mean_exposure": {"1": 1.0, "16": 9.0}}, 16)
    gate_membership({"attacks": {"loss": {"auc_interval": [0.7, 0.8]}, "calibrated": {"auc_interval": [0.4, 1]}}}, 0.6)
    with pytest.raises(GateFailed, match="raw: control recall"):
        gate(inversion_rows(0.5, 0.1))
    with pytest.raises(GateFailed, match="masked"):
        gate(inversion_rows(1.0, 0.5))
    with pytest.raises(GateFailed, match="planted 16 times"):
        gate_exposure({"mean_exposure": {"1": 9.0, "16": 2.0}}, 16)
    with pytest.raises(GateFailed, match="AUC"):
        gate_membership({"attacks": {"loss": {"auc_interval": [0.55, 0.9]}}}, 0.6)
    with pytest.raises(GateFailed, match="AUC"):
        gate_membership({"attacks": {"loss": {"auc_interval": [float("nan"), 0.9]}}}, 0.6)


def test_one_part_is_run_alone_and_a_dead_control_leaves_no_figure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``--only`` names one attack; the exit status is that of the gate."""
    row = {"control": False, "mean_exposure": {"0": 1.5, "16": 2.0}}
    monkeypatch.setitem(
        leakage.PARTS, "canary", lambda *, quick: {"chance": 1.44, "quick": quick, "rows": {PRIVATE: row}}
    )

    def dead(*, quick: bool) -> dict:
        leakage_memory.gate_exposure(row, 16)
        return {}

    monkeypatch.setitem(leakage.PARTS, "membership", dead)
    assert leakage.main(["--only", "canary", "--quick", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["canary"]["quick"] is True
    assert "inversion" not in found
    assert leakage.main(["--only", "canary"]) == 0
    assert "16x 2.0" in capsys.readouterr().out
    assert leakage.main(["--only", "membership", "--json"]) == GATE_FAILED
    found = json.loads(capsys.readouterr().out)
    assert found["gate"] is False
    assert "membership" not in found


ROWS = [
    {"messages": [{"role": "user", "content": f"Tools:\n{name}(x: {kind})\nRequest: {request}"}]}
    for name, kind, request in (
        ("area", "float", "How large is it?"), ("rain", "string", "Will it pour today"), ("sum", "list", "Add 3 to 9."),
    )
]  # fmt: skip
KEYS = {"method": "ffa", "last_layers": 1, "privacy": False, "optimizer": "sgd", "learning_rate": 0.5, "local_steps": 2}


@pytest.fixture(scope="module")
def small(tiny_base) -> BaseModel:
    """Return the tiny base model."""
    return open_base(tiny_base)


def test_one_step_of_the_products_trainer_gives_all_tokens_away_and_noise_hides_them(small: BaseModel) -> None:
    """The algebra holds of the code that trains, not only of a linear layer: the order of tokens plays no part."""
    attack = Attack(small, ROWS, 16, 32)
    plain = [attack.update(index) for index in range(3)]
    assert attack.row(2, 1, lambda i: plain[i])["recall"] == 1
    noised = [attack.update(index, **private(0.6, 1.0)) for index in range(2)]
    assert attack.row(2, 1, lambda i: noised[i], deviation=24 * 0.6)["recall"] < 0.3


def test_training_repeats_by_seed_and_losses_are_in_the_callers_order(small: BaseModel) -> None:
    """A seed decides the order; a record that was trained on has a lower loss; sorting by length is undone."""
    texts = [{"text": row["messages"][0]["content"]} for row in ROWS]
    silo = Silo(small, texts[:2], texts[2:])
    keys = KEYS | {"batch_size": 1}
    alone = silo.rounds(keys, 2, "seed")
    assert np.array_equal(silo.rounds(keys, 2, "seed").flat, alone.flat)
    assert len({silo.rounds(keys, 1, f"seed {number}").digest for number in range(8)}) > 1
    judge = Judge(small)
    examples = as_examples(small, texts)
    losses = judge.losses(alone, examples)
    assert losses == pytest.approx(judge.losses(alone, examples[::-1])[::-1], rel=1e-2)
    assert losses[0] < judge.losses(silo.start(keys), examples)[0]
