"""The small model's gradients, its noise, what tuning may see, and that a seed repeats."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from benchmarks import utility, utility_federation, utility_plot, utility_smollm2, utility_tuning
from benchmarks.document import GATE_FAILED, GateFailed
from benchmarks.utility_federation import Case, Knobs, fit, mechanism, noise_ratio, priced, update
from benchmarks.utility_model import SPEC, Records, World, gradients, score
from benchmarks.utility_tuning import Data, Score, groups, outcome, private_data, public_data, tune
from fedllm.adapter import AdapterState
from fedllm.privacy.noise import GaussianGrid
from fedllm.privacy.skellam import SumGrid
from fedllm.rng import SeededRng, uniform_floats

RECORD = Case("federated", 20, "fedit", "record", 8.0)
OWNER = Case("federated", 20, "ffa", "owner", 8.0)
PLAIN = Case("federated", 4, "ffa", "record", math.inf)
LAYOUT = SPEC.layout()


@pytest.fixture(scope="module")
def world() -> World:
    """Return the one world."""
    return World.make()


@pytest.fixture(scope="module")
def records(world: World) -> Records:
    """Return a dozen records."""
    return world.owner((7,), 12)


@pytest.fixture
def state() -> AdapterState:
    """Return an adapter whose B is not zero, so that A has gradients."""
    flat = 0.3 * (uniform_floats(SeededRng("state"), LAYOUT.size) - 0.5)
    return AdapterState(SPEC, LAYOUT.unflatten(flat.astype(np.float32)))


def dense(world: World, state: AdapterState, record: Records) -> np.ndarray:
    """Return one record's gradient as a flat vector."""
    return gradients(world, state.factors, record, LAYOUT).total(np.ones(1))


def test_gradients_are_those_of_finite_differences(world: World, state: AdapterState, records: Records) -> None:
    """Along random directions through all four factors the loss changes as the gradients say."""
    found = gradients(world, state.factors, records, LAYOUT).total(np.full(12, 1 / 12))
    start, step = LAYOUT.flatten(state.factors).astype(np.float64), 1e-3

    def loss(flat: np.ndarray) -> float:
        exact, at = {}, 0
        for name, (rows, columns) in LAYOUT.entries:  # float32 would drown the differences
            exact[name] = flat[at : at + rows * columns].reshape(rows, columns)
            at += rows * columns
        return score(world, exact, records)[1]

    for index in range(8):
        direction = np.random.default_rng(index).normal(size=LAYOUT.size)
        slope = (loss(start + step * direction) - loss(start - step * direction)) / (2 * step)
        assert found @ direction == pytest.approx(slope, rel=1e-3, abs=1e-5)


def test_rank_one_norms_and_sums_are_the_dense_ones(world: World, state: AdapterState, records: Records) -> None:
    """A record's norm is that of its whole gradient, and a weighted sum is the sum of whole gradients."""
    rows = np.array([dense(world, state, records.pick(np.array([index]))) for index in range(12)])
    found = gradients(world, state.factors, records, LAYOUT)
    weights = np.linspace(0.1, 1.0, 12)
    np.testing.assert_allclose(found.norms(), np.linalg.norm(rows, axis=1), rtol=1e-9)
    np.testing.assert_allclose(found.total(weights), weights @ rows, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", [RECORD, PLAIN], ids=["private", "plain"])
def test_one_record_moves_a_step_by_no_more_than_the_clip(
    world: World, state: AdapterState, records: Records, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without noise, with every record sampled: adding one moves an update by at most the rate over the divisor."""
    monkeypatch.setattr(GaussianGrid, "add_noise", lambda self, x, rng: x)
    monkeypatch.setattr(utility_federation, "uniform_floats", lambda rng, count: np.zeros(count))
    monkeypatch.setattr(utility_federation, "LOCAL_STEPS", {"record": 1})
    loud = Records(100 * records.inputs, records.labels, 12)
    moves = []
    for count in (11, 12):
        some = loud.pick(np.arange(count))
        moves.append(update(world, state, some, case, Knobs(0.1, 1.0), 1, SeededRng("x")))
    allowed = 1.0 / (utility_federation.SAMPLE_RATE * 12)
    assert 0.9 * allowed < np.linalg.norm(moves[1] - moves[0]) <= allowed


@pytest.mark.parametrize("epsilon", [8.0, math.inf])
def test_an_owners_update_stays_in_its_ball(
    world: World, state: AdapterState, records: Records, epsilon: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unit owner: what is summed, less its noise, is no longer than the clip, however far training went."""
    monkeypatch.setattr(SumGrid, "noised", lambda self, x, mechanism, rng: self.encode(x, rng))
    found = update(world, state, records, replace(OWNER, epsilon=epsilon), Knobs(0.05, 3.0), 1, SeededRng("x"))
    assert 0.049 < np.linalg.norm(found) <= 0.05 * (1 + 1e-12)


@pytest.mark.parametrize("case", [RECORD, OWNER], ids=["record", "owner"])
def test_noise_is_the_mechanisms(world: World, case: Case) -> None:
    """Without gradients an update's variance is what its epsilon needs."""
    ratio, error = noise_ratio(world, case, "test")
    assert abs(ratio - 1) < 5 * error
    assert 0.99 * case.epsilon < priced(case) <= case.epsilon


@pytest.mark.parametrize("case", [RECORD, OWNER], ids=["record", "owner"])
def test_the_gate_notices_that_noise_is_off(world: World, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """An accuracy could not tell; the variance does."""
    monkeypatch.setattr(GaussianGrid, "add_noise", lambda self, x, rng: x)
    monkeypatch.setattr(SumGrid, "noised", lambda self, x, mechanism, rng: self.encode(x, rng))
    with pytest.raises(GateFailed, match="noise variance"):
        utility.check_noise(world, [case])


def test_no_privacy_has_no_mechanism() -> None:
    """An infinite epsilon claims nothing."""
    assert not mechanism(PLAIN, math.inf).covered
    assert priced(PLAIN) == math.inf


def test_a_seed_repeats_and_another_differs(world: World) -> None:
    """Data, start, sampling and noise come from the seed alone."""
    case = Case("federated", 3, "ffa", "record", 8.0)
    found = [outcome(world, private_data(world, seed, 3), case, Knobs(1.0, 1.0), str(seed)) for seed in (1, 1, 2)]
    assert found[0] == found[1]
    assert found[1] != found[2]


def test_tuning_draws_no_private_owner(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The records that a choice of clip and rate sees are the public split's, and the splits share nobody."""
    drawn: list[tuple[int, ...]] = []
    original = World.owner

    def owner(self: World, seed: tuple[int, ...], count: int) -> Records:
        drawn.append(seed)
        return original(self, seed, count)

    monkeypatch.setattr(World, "owner", owner)
    monkeypatch.setattr(utility_tuning, "PUBLIC_OWNERS", 4)
    chosen = tune(world, public_data(world), PLAIN, [Knobs(math.inf, 0.01), Knobs(math.inf, 1.0)])
    assert chosen.rate == 1.0
    public = set(drawn)
    drawn.clear()
    private_data(world, 0, 4)
    assert public and drawn
    assert not public & set(drawn)


def test_private_records_are_drawn_after_all_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark tunes every cell on the public split before the first private record exists."""
    public, tuned = Data((), ()), []

    def fake_tune(world: World, data: Data, case: Case, tries: list[Knobs]) -> Knobs:
        assert data is public
        tuned.append(case)
        return Knobs(1.0, 1.0)

    def fake_private(world: World, seed: int, owners: int) -> Data:
        assert tuned == utility.cases(quick=True)
        raise GateFailed("private records are drawn")

    monkeypatch.setattr(utility, "check_noise", lambda world, cells: [])
    monkeypatch.setattr(utility, "public_data", lambda world: public)
    monkeypatch.setattr(utility, "tune", fake_tune)
    monkeypatch.setattr(utility, "private_data", fake_private)
    with pytest.raises(GateFailed, match="private records are drawn"):
        utility.measure(Namespace(quick=True, no_noise=False, smollm2=False))


def test_a_federation_that_gains_nothing_fails_the_gate() -> None:
    """Without noise it must beat an owner alone at every seed."""
    plain, alone = (Case(arm, n, "ffa", "record", math.inf) for arm, n in (("federated", 20), ("alone", 1)))
    better, worse = Score(0.5, 1.0, 0.5), Score(0.4, 1.0, 0.4)
    utility.check_gain({plain: [better, better], alone: [worse, worse]})
    with pytest.raises(GateFailed, match="over alone"):
        utility.check_gain({plain: [better, worse], alone: [worse, worse]})


def test_divergence_is_a_score_of_nothing(world: World) -> None:
    """A run that leaves the finite numbers neither stops the benchmark nor wins."""
    data = private_data(world, 0, 1)
    found = outcome(world, data, Case("alone", 1, "fedit", "record", math.inf), Knobs(math.inf, 1e30), "0")
    assert (found.accuracy, found.loss) == (0.0, math.inf)


@pytest.mark.parametrize(("owners", "available"), [(20, 200), (1, 200), (200, 200), (200, 40), (20, 40)])
def test_groups_overlap_in_nobody(owners: int, available: int) -> None:
    """Each experiment has owners of its own, as many as asked or as there are."""
    made = groups(Case("federated", owners, "ffa", "record", 8.0), available)
    assert {len(group) for group in made} == {min(owners, available)}
    assert all(not set(a) & set(b) for a, b in pairwise(made))
    assert max(map(max, made)) < available


@pytest.mark.parametrize(("arm", "unit"), [("federated", "record"), ("federated", "owner"), ("central", "record")])
def test_a_thinned_federation_has_the_noise_of_the_whole(world: World, arm: str, unit: str) -> None:
    """The mean of five empty silos varies as the mean of the twenty that they stand for."""
    whole = Case(arm, 20, "ffa", unit, 8.0)
    head, knobs, rng = AdapterState.initial(SPEC, SeededRng("x")), Knobs(1.0, 1.0), SeededRng("y")
    variances = []
    for case, silos in ((whole, 20), (utility_tuning.thinned(whole, 5), 5)):
        parts = [Records.empty(200 * silos)] if arm == "central" else [Records.empty(200)] * silos
        means = [np.mean([update(world, head, p, case, knobs, 1, rng) for p in parts], axis=0) for _ in range(5)]
        variances.append(np.mean(np.square(means)))
    assert variances[0] == pytest.approx(variances[1], rel=0.15)


def test_the_document_says_unit_relation_and_delta(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A small run end to end; every epsilon stands with what it means, and its table and picture can be made."""
    cells = [
        Case(arm, n, "ffa", unit, e)
        for arm, n, unit in (("federated", 20, "record"), ("federated", 20, "owner"), ("alone", 1, "record"))
        for e in (8.0, math.inf)
    ]
    monkeypatch.setattr(utility, "cases", lambda quick, no_noise: cells)
    monkeypatch.setattr(utility, "grid", lambda case, quick: [Knobs(1.0 if case.private else math.inf, 3.0)])
    monkeypatch.setattr(utility_tuning, "groups", lambda case, available: [list(range(case.owners))])
    assert utility.main(["--quick", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["unit"] for row in found["rows"]] == [case.unit for case in cells]
    for row in found["rows"] + found["noise"]:
        assert row["relation"] == {"record": "add-or-remove-one", "owner": "zero-out-one"}[row["unit"]]
        assert row["delta"] == 1e-5
    assert all(row["priced_epsilon"] == "inf" or row["priced_epsilon"] <= row["epsilon"] for row in found["rows"])
    assert utility.table(found).row_count == len(cells)
    assert utility_plot.svg(found).count("stroke-width") == 3


def test_a_failed_gate_prints_no_figures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Wrong noise ends the benchmark before anything is trained."""
    monkeypatch.setattr(utility_federation, "fit", lambda world, head, *rest: head)
    assert utility.main(["--quick", "--json"]) == GATE_FAILED
    assert "rows" not in json.loads(capsys.readouterr().out)


def test_smollm2_takes_the_rate_with_the_least_public_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rate is tried on the public owners; one rate alone needs no trying."""
    monkeypatch.setattr(utility_smollm2, "train", lambda trainers, base, keys, seed: keys["learning_rate"])
    monkeypatch.setattr(utility_smollm2, "losses", lambda trainers, rate: {"a": abs(rate - 0.02), "b": 0.0})
    chosen = utility_smollm2.tuned({}, Path(), "fedit", None, (0.01, 0.03, 0.021))
    assert chosen["rate"] == 0.021
    assert set(chosen["tried"]) == {"0.01", "0.03", "0.021"}
    assert utility_smollm2.tuned({}, Path(), "ffa", None, (5.0,)) == {"rate": 5.0, "tried": {}}


def test_frozen_factors_stay(world: World, state: AdapterState, records: Records) -> None:
    """``ffa`` trains B and leaves A bit for bit."""
    trained = fit(world, state, records, OWNER, Knobs(1.0, 1.0), SeededRng("x"))
    for name, array in trained.factors.items():
        assert (array.tobytes() == state.factors[name].tobytes()) == name.endswith("lora_A")
