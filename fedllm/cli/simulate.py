"""``fedllm simulate``: a federation of made-up owners in this process, and whether its sums are exact."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from fedllm.cli.context import error_class
from fedllm.cli.output import print_json, print_line, print_table, progress
from fedllm.clock import SystemClock
from fedllm.config import FederationSettings
from fedllm.errors import ConfigError, FedllmError, IntegrityError, PolicyRefused, RoundAborted

if TYPE_CHECKING:
    from fedllm.server.ports import RoundEvent
    from fedllm.simulate.fates import Draw
    from fedllm.simulate.report import SimulationReport
    from fedllm.simulate.run import Watch

_RECORDS = 8
_SAMPLE_RATE = 0.5
_DELTA = 1e-5
_MOST_ROUNDS = 1000
_LEAST_LOSSES, _MOST_LOSSES = 0.05, 0.3
_MECHANISMS = {"record": "dp-sgd", "owner": "skellam"}
_EXACT = {None: None, True: "yes", False: "NO"}


def register(app: typer.Typer) -> None:
    """Add the top-level command."""
    app.command("simulate")(simulate)


def simulate(
    owners: int = typer.Option(50, help="Owners, 3 to 1000."),
    dim: int = typer.Option(10_000, help="Entries of the adapter update that is summed."),
    rounds: int = typer.Option(1, help="Rounds."),
    dropout: float = typer.Option(0.0, help="Probability that an owner is lost, anywhere in a round."),
    straggler: float = typer.Option(0.0, help="Probability that one of an owner's messages comes too late."),
    corrupt: float = typer.Option(0.0, help="Probability that an owner misbehaves in a round."),
    seed: int = typer.Option(0, help="The same seed gives the same keys, masks, faults and report."),
    epsilon: float | None = typer.Option(None, help="Budget per unit over all rounds at δ = 1e-5; none: no noise."),
    unit: str = typer.Option("record", help="Unit of the budget: record (DP-SGD), or owner (noise shares in the sum)."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON document."),
) -> None:
    """Run rounds with the real protocol on a toy task; exit 0 if every round opened an exact sum, else 1."""
    from fedllm.simulate.fates import Chances, drawn

    if not 1 <= rounds <= _MOST_ROUNDS:
        raise ConfigError(f"rounds is {rounds}: 1 to {_MOST_ROUNDS} allowed")
    if unit not in _MECHANISMS:
        raise ConfigError(f"unit is {unit!r}: {', '.join(_MECHANISMS)} allowed")
    fates = drawn(seed, Chances(dropout, straggler, corrupt))
    settings = toy_settings(owners, noise=None, losses=dropout + straggler + corrupt)
    if epsilon is not None:
        settings = noised(settings, _MECHANISMS[unit], dim=dim, epsilon=epsilon, rounds=rounds)
    report = run(settings, dim=dim, rounds=rounds, fates=fates, seed=seed)
    if as_json:
        print_json(report.to_json())
    else:
        print_report(report)
    error = failure(report)
    if error is not None:
        raise error


def run(settings: FederationSettings, *, dim: int, rounds: int, fates: Draw, seed: int) -> SimulationReport:
    """Run a simulation under a progress bar."""
    from fedllm.simulate.run import simulate as run_simulation

    # owners that refuse and coordinators that retry are what is simulated: the report counts them
    logging.getLogger("fedllm").addHandler(logging.NullHandler())
    with _bar(rounds) as watch:
        return run_simulation(
            settings, dim=dim, rounds=rounds, fates=fates, seed=seed, clock=SystemClock(), watch=watch
        )


def toy_settings(owners: int, *, noise: float | None, losses: float = 0.0) -> FederationSettings:
    """Return a federation of `owners` owners, with DP-SGD at this noise multiplier or without.

    Its plans expect as many owners to be lost as `losses` says, within what any plan can withstand.
    """
    names = [f"owner-{number:04d}" for number in range(1, owners + 1)]
    return FederationSettings(
        name="simulation",
        base=Path("toy"),
        alias="toy/simulation",
        local_steps=1,
        learning_rate=0.02,
        privacy=noise is not None,
        noise_multiplier=noise or 1.0,
        clip_norm=1.0,
        sample_rate=_SAMPLE_RATE,
        delta=_DELTA,
        dropout=min(max(losses, _LEAST_LOSSES), _MOST_LOSSES),
        declared_records=dict.fromkeys(names, _RECORDS),
    )


def print_report(report: SimulationReport) -> None:
    """Print a report as tables."""
    from fedllm.privacy.mechanism import describe

    graph = "everybody" if report.complete else f"{report.neighbours} picks"
    privacy = report.privacy
    spent = math.inf if privacy["epsilon"] is None else privacy["epsilon"]
    facts = [
        ("owners", report.owners), ("entries", report.dim), ("seed", report.seed),
        ("secrets shared with", f"{graph}, {report.threshold} of the shares open one"),
        ("ring", f"{report.ring_bits} bits, values of {report.value_bits}"),
        ("charged to an owner's ledger", describe(spent, privacy["delta"], privacy["unit"], privacy["relation"])),
        *([] if privacy["noise_over_signal"] is None else [("noise over signal", privacy["noise_over_signal"])]),
        ("bytes an owner sent in a round, at most", report.upload_bytes),
        ("seconds", report.seconds), ("peak GiB", report.peak_gib),
    ]  # fmt: skip
    print_table("simulation", ("what", "value"), facts)
    rows = [
        (r.round, r.state.lower(), f"{r.survivors}/{report.owners}", r.attempts, _EXACT[r.exact],
         "; ".join(f"{code}: {len(who)}" for code, who in r.faults.items()), r.reason)
        for r in report.rounds
    ]  # fmt: skip
    print_table("rounds", ("round", "state", "owners", "attempts", "exact", "faults", "why"), rows)
    print_line("exact: every opened sum is the plain sum of its survivors" if report.exact else "not exact")


def failure(report: SimulationReport) -> FedllmError | None:
    """Return the error that a simulation ends with, None if all is well."""
    wrong = [each.round for each in report.rounds if each.exact is False]
    if wrong:
        return IntegrityError(
            f"the sum opened in round {wrong[0]} is not the sum of its survivors' vectors",
            hint=f"a bug: report it with the command and seed {report.seed}",
        )
    if report.aborted:
        first = report.aborted[0]
        found = error_class(first.code or "")
        kind = found if found is not None and issubclass(found, PolicyRefused) else RoundAborted
        return kind(
            f"{len(report.aborted)} of {len(report.rounds)} simulated rounds were aborted; round {first.round}:"
            f" {first.reason}",
            hint="--json has every round's faults; lower --dropout, --straggler or --corrupt",
        )
    return None


def noised(
    settings: FederationSettings, mechanism: str, *, dim: int, epsilon: float, rounds: int
) -> FederationSettings:
    """Return the settings with the noise multiplier of `mechanism` that spends `epsilon` over all rounds."""
    from fedllm.privacy.calibrate import solve
    from fedllm.server.mechanisms import least_survivors, make_mechanism

    private = replace(settings, privacy=True, mechanism=mechanism, acknowledge_noise=True)
    owners = len(private.declared_records)
    least = least_survivors(private, owners, private.min_survivors)
    template = make_mechanism(private, owners=owners, least=least, dimension=dim)
    noise = solve(template, epsilon=epsilon, delta=_DELTA, rounds=rounds, unit=template.unit)
    return replace(private, noise_multiplier=noise)


@contextmanager
def _bar(rounds: int) -> Iterator[Watch]:
    from fedllm.server.ports import STATE_ORDER

    each = len(STATE_ORDER) - 1  # an aborted round is over, however far it was
    with progress() as bar:
        task = bar.add_task("making the owners", total=rounds * each)

        def watch(event: RoundEvent) -> None:
            done = (event.round - 1) * each + min(STATE_ORDER.index(event.state), each)
            part = event.done / event.total if event.total and event.owner is None else 0.0
            bar.update(task, completed=done + part, description=f"round {event.round}: {event.state.lower()}")

        yield watch
