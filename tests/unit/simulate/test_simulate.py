"""Simulated federations: the real protocol, exact sums, and faults that end in the right sum or in a reason."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from fedllm.cli.simulate import toy_settings
from fedllm.clock import SystemClock
from fedllm.errors import ConfigError
from fedllm.ids import OwnerId
from fedllm.simulate.fates import MISDEEDS, Chances, Draw, Fates, Misdeed, drawn
from fedllm.simulate.forecast import Forecast
from fedllm.simulate.report import SimulationReport
from fedllm.simulate.run import ExactSums, simulate
from fedllm.simulate.world import Cast, toy_spec, whole_plan

TIMES = ("seconds", "peak_gib")


def run(
    owners: int, fates: Draw, *, dim: int = 500, rounds: int = 1, seed: int = 0, **changed: Any
) -> SimulationReport:
    """Run a simulation of the command line's own toy federation."""
    settings = dataclasses.replace(toy_settings(owners, noise=None), **changed)
    return simulate(
        settings, dim=dim, rounds=rounds, fates=fates, seed=seed, clock=SystemClock(), watch=lambda _event: None
    )


def by_chance(seed: int = 0, **chances: float) -> Draw:
    """Return fates drawn at these chances."""
    return drawn(seed, Chances(**chances))


def owner(number: int) -> OwnerId:
    """Return the name of an owner, from 1 on."""
    return OwnerId(f"owner-{number:04d}")


def without_times(report: SimulationReport) -> dict[str, Any]:
    """Return a report as JSON holds it, less what no seed repeats."""
    found = {k: v for k, v in report.to_json().items() if k not in TIMES}
    return found | {"rounds": [{k: v for k, v in each.items() if k not in TIMES} for each in found["rounds"]]}


def test_the_same_seed_gives_the_same_report() -> None:
    """Bit for bit, with owners lost, late and corrupt; another seed meets other fates."""
    first, again = (run(12, by_chance(3, dropout=0.1, straggler=0.1, corrupt=0.1), rounds=2, seed=3) for _ in range(2))
    assert without_times(first) == without_times(again)
    other = run(12, by_chance(4, dropout=0.1, straggler=0.1, corrupt=0.1), rounds=2, seed=4)
    assert without_times(other) != without_times(first)


def test_several_rounds_without_faults_are_exact() -> None:
    """Everybody is in every sum, in one attempt, and nobody is named."""
    report = run(5, by_chance(), rounds=3)
    assert report.exact
    assert [(r.state, r.survivors, r.attempts, r.faults) for r in report.rounds] == [("JUDGED", 5, 1, {})] * 3


@pytest.mark.parametrize("arrow", range(0, 16, 3))
def test_as_many_losses_as_the_threshold_allows_leave_the_sum_exact(arrow: int) -> None:
    """Nine of twelve must be there, so that three may go at any arrow of the round; what is opened says who is in."""
    report = run(12, lambda _n, _o: Fates(lost={owner(k): arrow for k in (2, 5, 11)}))
    (only,) = report.rounds
    assert only.exact, only.reason
    assert only.state == "JUDGED"
    assert only.survivors == (9 if arrow <= 5 else 12)
    assert only.lost == 3


def test_losses_beyond_the_threshold_are_made_good_by_another_attempt() -> None:
    """Nine of twelve must be there: with five gone before anything was opened, the seven that are left sum again."""
    report = run(12, lambda _n, _o: Fates(lost={owner(k): 4 for k in range(1, 6)}))
    (only,) = report.rounds
    assert (only.state, only.exact, only.survivors, only.attempts) == ("JUDGED", True, 7, 2)


@pytest.mark.parametrize(("arrow", "lost"), [(8, 5), (2, 10)])
def test_losses_beyond_all_attempts_abort_with_a_reason(arrow: int, lost: int) -> None:
    """Once some were asked to unmask there is no second attempt; and two owners are too few for any sum."""
    report = run(12, lambda _n, _o: Fates(lost={owner(k): arrow for k in range(1, lost + 1)}))
    (only,) = report.rounds
    assert (only.state, only.exact, only.survivors) == ("ABORTED", None, 0)
    assert only.reason is not None
    assert "9 needed" in only.reason or "9 are needed" in only.reason, only.reason
    assert not report.exact


def test_late_owners_are_left_out_or_waited_out() -> None:
    """Whoever's vector comes too late is not in the sum; whoever is late after it is."""
    report = run(12, lambda _n, _o: Fates(late={owner(1): 5, owner(2): 4, owner(3): 9}))
    (only,) = report.rounds
    assert (only.state, only.exact, only.survivors) == ("JUDGED", True, 10)


@pytest.mark.parametrize("misdeed", MISDEEDS)
def test_a_corrupt_owner_is_named_and_the_sum_stays_exact(misdeed: Misdeed) -> None:
    """One of seven misbehaves in each of the ways there are: it is among those named, and what opens is exact."""
    report = run(7, lambda _n, _o: Fates(misdeeds={owner(3): misdeed}))
    (only,) = report.rounds
    assert only.exact, only.reason
    assert only.misdeeds == {misdeed.value: [owner(3)]}
    assert owner(3) in {name for names in only.faults.values() for name in names}


def test_a_sparse_graph_is_exact_with_losses() -> None:
    """Above 128 owners each picks whom it shares with; losses at every stage still leave the exact sum."""
    report = run(132, by_chance(1, dropout=0.05, straggler=0.02), dim=40, seed=1)
    assert not report.complete
    assert report.neighbours < 131
    assert report.exact, report.rounds[0].reason


def test_an_owners_ledger_charges_every_round() -> None:
    """With DP the report names what the ledgers of record say; without, that nothing bounds it."""
    private = run(4, by_chance(), rounds=2, privacy=True, noise_multiplier=1.0)
    assert private.exact
    assert private.privacy["epsilon"] > 1
    assert private.privacy["unit"] == "record"
    assert run(4, by_chance()).privacy["epsilon"] is None


def test_one_wrong_entry_is_not_exact() -> None:
    """The check compares all integers: one off by one, or one vector too many, is found."""
    cast = Cast.of(toy_settings(3, noise=None), 8, 0)
    plan = whole_plan(cast.federation)
    sums = ExactSums()
    vectors = {owner(k): np.arange(8, dtype=np.uint32) * k for k in (1, 2, 3)}
    for name, values in vectors.items():
        sums.masked(name, values)
    total = np.arange(8, dtype=np.uint32) * 6
    sums.opened(plan, list(vectors), total)
    assert sums.exact
    off = total.copy()
    off[-1] += 1
    sums.opened(plan, list(vectors), off)
    assert sums.exact is False
    sums.begin()
    assert sums.exact is None
    for name, values in vectors.items():
        sums.masked(name, values)
    sums.opened(plan, [owner(1), owner(2)], total)
    assert sums.exact is False


@pytest.mark.parametrize("method", ["ffa", "fedit"])
@pytest.mark.parametrize("dim", [2, 3, 97, 100, 1000, 99_991])
def test_adapters_have_exactly_the_entries_asked_for(method: str, dim: int) -> None:
    """Whatever divides them: the layout of what is trained is the length of the sum."""
    factors = ("A", "B") if method == "fedit" else ("B",)
    assert toy_spec(dim, method).layout(factors).size == dim


@pytest.mark.parametrize(
    ("owners", "dim", "noise", "words"),
    [
        (2, 10, None, "2 owners"),
        (1001, 10, None, "1001 owners"),
        (4, 0, None, "dim is 0"),
        (4, 10**8, None, "dim is 100000000"),
        (4, 4_000_000, 8.0, "noise grid"),
    ],
)
def test_impossible_federations_are_refused_before_anything_is_made(
    owners: int, dim: int, noise: float | None, words: str
) -> None:
    """The error names the number found."""
    with pytest.raises(ConfigError, match=words):
        Cast.of(toy_settings(owners, noise=noise), dim, 0)


@pytest.mark.parametrize(("owners", "dim", "within"), [(4, 20_000, 0.01), (140, 200, 0.3)])
def test_the_forecast_of_uploads_is_what_owners_send(owners: int, dim: int, within: float) -> None:
    """But for the last goodbye; on a sparse graph an owner is picked more or less often than it picks."""
    report = run(owners, by_chance(), dim=dim)
    federation = Cast.of(toy_settings(owners, noise=None), dim, 0).federation
    forecast = Forecast.of(whole_plan(federation), federation.roster)
    assert forecast.graph == ("complete" if owners == 4 else "sparse")
    assert (forecast.neighbours, forecast.threshold) == (report.neighbours, report.threshold)
    assert forecast.upload_bytes == pytest.approx(report.upload_bytes, rel=within)
