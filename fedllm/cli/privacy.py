"""``fedllm privacy``: the owner's ledger, and noise for a budget."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import typer

from fedllm.cli.output import print_json, print_line, print_table
from fedllm.cli.plain import Noun
from fedllm.clock import SystemClock
from fedllm.errors import ConfigError, NotFound
from fedllm.identity import SigningIdentity, VerifyKey
from fedllm.messages.mechanism import (
    DP_FTRL,
    DP_SGD,
    RELATION_ADD_REMOVE,
    RELATION_ZERO_OUT,
    SKELLAM,
    UNIT_OWNER,
    UNIT_PERSON,
    UNIT_RECORD,
    Mechanism,
    NoiseShares,
    Stream,
)
from fedllm.privacy.mechanism import describe, describe_noise

app = Noun("Privacy: what was spent, what a budget costs.")
_BARS = 20
"""Rows of the burn-down, however many rounds there were."""
_WIDTH = 40
HOME = typer.Option(..., help="The owner's folder.")


@app.command("show")
def show(home: Path = HOME, as_json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """Show what the owner's ledger of record says was spent, round by round, with unit and delta."""
    from fedllm.privacy.accountant import burn_down
    from fedllm.privacy.ledger import Ledger

    ledger = Ledger.read(home / "ledger.jsonl", _public(home))
    if not ledger.entries():
        raise NotFound(f"the ledger at {home / 'ledger.jsonl'} is empty", hint="the daemon begins it when it starts")
    rounds = ledger.reservations()
    after = burn_down([r.effective for r in rounds], ledger.delta, unit=ledger.unit)
    spent, limit = ledger.spent(), ledger.limit_epsilon
    covered, uncovered = _coverage(ledger.unit, ledger.column)
    if as_json:
        print_json({
            "epsilon": spent, "limit": limit, "delta": ledger.delta, "unit": ledger.unit, "column": ledger.column,
            "relation": ledger.relation, "remaining": _left(limit, spent), "reservations": len(rounds),
            "rounds": [
                {
                    "federation": r.federation, "round": r.round_number, "plan": r.plan_digest,
                    "mechanism": r.effective.to_fields(), "epsilon": value, "remaining": _left(limit, value),
                    "outcome": r.outcome,
                }
                for r, value in zip(rounds, after, strict=True)
            ],
            "covers": covered, "does_not_cover": uncovered,
        })  # fmt: skip
        return
    terms = f"per {ledger.unit} ({ledger.relation}), δ = {ledger.delta:g}"
    rows = [
        (r.federation, r.round_number, f"{r.mechanism.kind}: {describe_noise(r.effective)}", _bound(value), r.outcome)
        for r, value in zip(rounds, after, strict=True)
    ]
    columns = ("federation", "round", "mechanism", "ε after it", "outcome")
    print_line(f"{len(rows)} rounds charged, ε {terms}")  # a table's title is broken where the table is narrow
    print_table("", columns, rows)
    if rows and math.isfinite(limit):
        _print_burn_down(after, limit, terms)
    allowed = "no limit" if math.isinf(limit) else f"{limit:g}"
    print_line(f"spent: {describe(spent, ledger.delta, ledger.unit, ledger.relation)} of {allowed}")
    print_line(f"covers {covered}")
    print_line(f"does not cover {uncovered}")


@app.command("verify")
def verify(home: Path = HOME, as_json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """Check every entry's hash, signature and place in the chain; exit 1 and the line if one is wrong."""
    from fedllm.privacy.ledger import Ledger

    entries = Ledger.read(home / "ledger.jsonl", _public(home)).entries()  # reading verifies
    if as_json:
        print_json({"entries": len(entries), "last": entries[-1].digest if entries else None})
    else:
        print_line(f"{len(entries)} entries, chain and signatures good")


@app.command("calibrate")
def calibrate(
    epsilon: float = typer.Option(..., help="Budget over all rounds, per unit."),
    delta: float = typer.Option(1e-5, help="Delta."),
    mechanism: str = typer.Option(DP_SGD, help="dp-sgd, dp-ftrl or skellam."),
    unit: str = typer.Option("", help="record, person or owner: of the ledger. Default: what the mechanism is for."),
    rounds: int = typer.Option(1, help="Rounds."),
    steps_per_round: int | None = typer.Option(None, help="Noisy steps of a round (dp-sgd, dp-ftrl)."),
    steps: int | None = typer.Option(None, help="Noisy steps over all rounds, instead of the two above."),
    sample_rate: float = typer.Option(0.25, help="Poisson probability of a unit in a step (dp-sgd)."),
    band: int = typer.Option(8, help="Steps over which noise is correlated (dp-ftrl)."),
    separation: int = typer.Option(16, help="Steps between two uses of one unit (dp-ftrl)."),
    owners: int | None = typer.Option(None, help="Fewest owners of a sum that is opened (skellam)."),
    colluders: int = typer.Option(0, help="Owners that may collude with the coordinator (skellam)."),
    value_bits: int = typer.Option(16, help="Bits of one quantised entry (skellam)."),
    dimension: int | None = typer.Option(None, help="Trained entries of the adapter; for the signal-to-noise ratio."),
    records: int | None = typer.Option(None, help="Units that one owner trains on; for the signal-to-noise ratio."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Print the noise multiplier that spends a budget exactly, and how much signal it leaves.

    Priced as the ledger prices it: PLD accounting, Renyi accounting where the noise is skellam.
    """
    from fedllm.privacy.calibrate import signal_to_noise, solve

    if steps is not None and (steps_per_round is not None or rounds != 1):
        raise ConfigError(
            f"--steps {steps} are all noisy steps: give them, or --rounds and --steps-per-round",
            hint="--rounds 10 --steps-per-round 8 is --steps 80",
        )
    per_round = steps_per_round if steps is None else steps
    try:
        if mechanism == SKELLAM:
            template, records = _in_ring(owners, colluders, dimension, value_bits, delta, per_round), owners
        else:
            template = _in_silo(mechanism, delta, sample_rate, rounds, per_round, band, separation)
        unit = unit or template.unit
        noise = solve(template, epsilon=epsilon, delta=delta, rounds=rounds, unit=unit)
        solved = dataclasses.replace(template, noise_multiplier=noise)
        ratio = None
        if dimension is not None and records is not None:
            ratio = signal_to_noise(solved, dimension=dimension, records=records)
    except ValueError as error:
        raise ConfigError(
            f"{mechanism}: {error}", hint="'fedllm privacy calibrate --help' says what each takes"
        ) from None
    _print_solved(solved, epsilon, rounds, unit, ratio, as_json=as_json)


def limit(home: Path, epsilon: float, *, reason: str) -> bool:
    """Record a changed limit in the ledger, as a signed act of the owner.

    Returns
    -------
    bool
        Whether a line was written: there is a ledger and its limit was another one.
    """
    from fedllm.privacy.ledger import Ledger

    path = home / "ledger.jsonl"
    if not path.is_file():
        return False  # the daemon begins one with the policy's limit
    ledger = Ledger.resume(path, SigningIdentity.load(home / "owner.pem"), SystemClock())
    if not ledger.entries():
        return False  # a crash came before its first line: nothing was promised yet
    if ledger.limit_epsilon == epsilon:
        return False
    ledger.set_limit(epsilon, reason=reason)
    return True


def _public(home: Path) -> VerifyKey:
    return SigningIdentity.load(home / "owner.pem").public


def _left(limit: float, spent: float) -> float:
    return limit if math.isinf(limit) else max(0.0, limit - spent)


def _bound(value: float) -> str:
    """Return an epsilon for a table below a line that says unit and delta; never below the value."""
    return "∞" if math.isinf(value) else f"{math.ceil(value * 100 - 1e-9) / 100:.2f}"


def _coverage(unit: str, column: str) -> tuple[str, str]:
    covered = {
        UNIT_RECORD: "one training record",
        UNIT_PERSON: f"all training records with one value of column {column!r}",
        UNIT_OWNER: "all training records of this owner",
    }
    seen = "that this owner takes part, " if unit == UNIT_OWNER else ""
    return covered[unit], f"{seen}held-out scores (masked sums without noise), training time, declared sizes"


def _print_burn_down(after: Sequence[float], limit: float, terms: str) -> None:
    """Print what was left after each round as bars; of many rounds some, the last always."""
    last = len(after) - 1
    shown = sorted({round(row * last / (_BARS - 1)) for row in range(_BARS)})
    rows = []
    for at in shown:
        left = _left(limit, after[at])
        rows.append((at + 1, f"{math.floor(left * 100 + 1e-9) / 100:.2f}", _bar(left / limit)))
    print_line(f"left of {limit:g}, ε {terms}")
    print_table("", ("rounds charged", "left", ""), rows)


def _bar(share: float) -> str:
    eighths = math.floor(share * 8 * _WIDTH)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip() or "▏"


def _in_silo(
    kind: str, delta: float, sample_rate: float, rounds: int, steps: int | None, band: int, separation: int
) -> Mechanism:
    if kind not in {DP_SGD, DP_FTRL}:
        raise ConfigError(f"mechanism {kind!r}: {DP_SGD}, {DP_FTRL} or {SKELLAM} allowed")
    if steps is None:
        raise ConfigError(f"{kind}: steps are missing", hint="--rounds and --steps-per-round, or --steps")
    if kind == DP_SGD:
        return Mechanism(kind, UNIT_RECORD, RELATION_ADD_REMOVE, 1.0, 1.0, sample_rate, steps, delta)
    stream = Stream("calibrate", max(rounds, 1) * steps, band, separation)
    return Mechanism(kind, UNIT_RECORD, RELATION_ADD_REMOVE, 1.0, 1.0, 1.0, steps, delta, stream=stream)


def _in_ring(
    owners: int | None, colluders: int, dimension: int | None, value_bits: int, delta: float, steps: int | None
) -> Mechanism:
    if owners is None or dimension is None or steps is not None:
        raise ConfigError(
            f"{SKELLAM} needs --owners and --dimension, and has one release a round",
            hint="--rounds 10 --owners 20 --colluders 2 --dimension 30720",
        )
    if not (0 <= colluders < owners and 2 <= value_bits <= 32):
        raise ConfigError(
            f"{owners} owners, {colluders} colluders, {value_bits} value bits: fewer colluders than owners needed, 2 to"
            " 32 bits"
        )
    shares = NoiseShares(owners - colluders, dimension, 1 << (value_bits - 1))
    return Mechanism(SKELLAM, UNIT_OWNER, RELATION_ZERO_OUT, 1.0, 1.0, 1.0, 1, delta, shares=shares)


def _print_solved(
    solved: Mechanism, budget: float, rounds: int, unit: str, ratio: float | None, *, as_json: bool
) -> None:
    from fedllm.privacy.accountant import epsilon
    from fedllm.privacy.charges import RELATIONS

    spent, relation = epsilon([solved] * rounds, solved.delta, unit=unit), RELATIONS[unit]
    if as_json:
        print_json({
            "noise_multiplier": solved.noise_multiplier, "epsilon": budget, "spent": spent, "delta": solved.delta,
            "unit": unit, "relation": relation, "mechanism": solved.kind, "rounds": rounds, "steps": solved.steps,
            "signal_to_noise": ratio, "noise_over_signal": None if ratio is None else 1 / ratio,
        })  # fmt: skip
        return
    print_line(f"noise multiplier {solved.noise_multiplier:g}")
    print_line(
        f"spends {describe(spent, solved.delta, unit, relation)}, in {rounds} rounds of: {describe_noise(solved)}"
    )
    if ratio is None:
        print_line("signal to noise: say --dimension and --records")
    else:
        print_line(f"signal to noise {ratio:.3g} at most, noise over signal {1 / ratio:.3g}, in one release")
