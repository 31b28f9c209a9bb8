"""``fedllm privacy``: the owner's ledger, and noise for a budget."""

from __future__ import annotations

import math
from pathlib import Path

import typer

from fedllm.cli.output import print_json, print_line, print_table
from fedllm.cli.plain import Noun
from fedllm.clock import SystemClock
from fedllm.errors import NotFound
from fedllm.identity import SigningIdentity, VerifyKey

app = Noun("Privacy: what was spent, what a budget costs.")
HOME = typer.Option(..., help="The owner's folder.")


@app.command("show")
def show(home: Path = HOME, as_json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """Show what the owner's ledger of record says was spent, with unit and delta."""
    from fedllm.privacy.ledger import Ledger
    from fedllm.privacy.mechanism import describe

    ledger = Ledger.read(home / "ledger.jsonl", _public(home))
    if not ledger.entries():
        raise NotFound(f"the ledger at {home / 'ledger.jsonl'} is empty", hint="the daemon begins it when it starts")
    spent = ledger.spent()
    rows = [
        (r.federation, r.round_number, r.mechanism.kind, r.mechanism.noise_multiplier, r.mechanism.sample_rate,
         r.mechanism.steps, r.plan_digest[:12])
        for r in ledger.reservations()
    ]  # fmt: skip
    if as_json:
        print_json({
            "epsilon": spent, "limit": ledger.limit_epsilon, "delta": ledger.delta,
            "unit": ledger.unit, "relation": ledger.relation, "reservations": len(rows),
            "covers": "training records; held-out scores are released as masked sums outside epsilon",
        })  # fmt: skip
        return
    allowed = "no limit" if math.isinf(ledger.limit_epsilon) else f"{ledger.limit_epsilon:g}"
    columns = ("federation", "round", "mechanism", "noise", "sample rate", "steps", "plan")
    print_table(f"{len(rows)} rounds charged", columns, rows)
    print_line(f"spent: {describe(spent, ledger.delta, ledger.unit, ledger.relation)} of {allowed}")
    print_line("covers training records; held-out scores leave as masked sums, outside epsilon")


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
    epsilon: float = typer.Option(..., help="Budget over all rounds, per record."),
    delta: float = typer.Option(1e-5, help="Delta."),
    sample_rate: float = typer.Option(0.25, help="Poisson probability of a record in a step."),
    steps: int = typer.Option(..., help="Noisy steps over all rounds."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Print the noise multiplier that spends a budget exactly (PLD accounting)."""
    from fedllm.privacy.calibrate import noise_multiplier

    noise = noise_multiplier(epsilon=epsilon, delta=delta, sample_rate=sample_rate, steps=steps)
    if as_json:
        print_json({"noise_multiplier": noise, "epsilon": epsilon, "delta": delta, "unit": "record"})
    else:
        print_line(f"{noise:.4f}")


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
    if ledger.limit_epsilon == epsilon:
        return False
    ledger.set_limit(epsilon, reason=reason)
    return True


def _public(home: Path) -> VerifyKey:
    return SigningIdentity.load(home / "owner.pem").public
