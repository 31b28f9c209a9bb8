"""What does privacy cost? Held-out accuracy over epsilon, by method and privacy unit, between two bounds.

Two hundred owners (and twenty) adapt a small frozen network with LoRA; the product's own methods, clipping, noise and
accounting run in every silo. Bounds: an owner alone, and all records in one place. Clip and rate are tuned for every
cell on public owners. The gates: without noise a federation beats an owner alone, or the task shows nothing; and
the variance of an update without gradients is the mechanism's, or the noise is off. With ``--smollm2`` the real
base model and the demo's recipe instead.
"""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from dataclasses import replace
from itertools import product
from statistics import mean, stdev
from typing import Any

from rich.table import Table

from benchmarks import utility_smollm2
from benchmarks.document import Document, check, parser, rounded, run
from benchmarks.utility_federation import (
    DELTA,
    LOCAL_STEPS,
    RECORDS,
    ROUNDS,
    SAMPLE_RATE,
    Case,
    Knobs,
    mechanism,
    noise_over_signal,
    noise_ratio,
    priced,
)  # fmt: skip
from benchmarks.utility_model import SPEC, World, score
from benchmarks.utility_tuning import Score, grid, outcome, private_data, public_data, tune
from fedllm.adapter import AdapterState
from fedllm.messages.mechanism import RELATION_ADD_REMOVE, RELATION_ZERO_OUT, UNIT_OWNER, UNIT_RECORD
from fedllm.rng import SeededRng

METHODS = ("ffa", "fedit")
EPSILONS = (1.0, 3.0, 8.0)
MANY, FEW = 200, 20
SEEDS = 3
_ERRORS = 5.0
"""Standard errors that the variance of noise may be off."""
_LEAST_GAIN = 0.01
"""Accuracy by which a federation must beat an owner alone, without noise and at every seed."""


def cases(*, quick: bool = False, no_noise: bool = False) -> list[Case]:
    """Return the cells of the grid; with `no_noise` only those that are clipped and not noised."""
    epsilons, many = ((8.0,), FEW) if quick else (EPSILONS, MANY)
    budgets = [(epsilon, True) for epsilon in epsilons] + [(math.inf, True), (math.inf, False)]
    arms = [("federated", owners, unit) for unit in (UNIT_RECORD, UNIT_OWNER) for owners in sorted({many, FEW})[::-1]]
    arms += [("central", many, UNIT_RECORD), ("alone", 1, UNIT_RECORD)]
    every = product(arms, METHODS, budgets[-2:-1] if no_noise else budgets)
    return [Case(arm, n, method, unit, e, clipped) for (arm, n, unit), method, (e, clipped) in every]


def check_noise(world: World, cells: list[Case]) -> list[Document]:
    """Measure the noise of every mechanism without any gradient.

    Raises
    ------
    GateFailed
        If a variance is not the mechanism's.
    """
    rows: list[Document] = []
    for case in (c for c in cells if c.private and c.arm == "federated"):
        ratio, error = noise_ratio(world, case, "gate")
        name = f"{case.unit}, {case.owners} owners, {case.method}, epsilon {case.epsilon:g}"
        check(
            abs(ratio - 1) <= _ERRORS * error,
            f"noise variance of {name} is {ratio:.4f} of the mechanism's, 1 ± {_ERRORS * error:.4f} allowed",
        )
        rows.append(_head(case) | {"variance_ratio": rounded(ratio), "standard_error": rounded(error, 2)})
    return rows


def check_gain(scores: dict[Case, list[Score]]) -> None:
    """Raise `GateFailed` unless every federation without noise beats an owner alone, seed by seed."""
    for case, found in scores.items():
        if case.private or case.arm != "federated":
            continue
        alone = scores[replace(case, arm="alone", owners=1, unit=UNIT_RECORD)]
        gain = min(ours.accuracy - theirs.accuracy for ours, theirs in zip(found, alone, strict=True))
        name = f"{case.owners} owners, {case.method}, unit {case.unit}"
        check(gain >= _LEAST_GAIN, f"{name}: accuracy {gain:.3f} over alone without noise, {_LEAST_GAIN} needed")


def measure(options: Namespace) -> Document:
    """Gate the noise, tune on public owners, train on private ones, gate the gain."""
    if options.smollm2:
        return utility_smollm2.measure(options.method or METHODS, quick=options.quick)
    world, cells = World.make(), cases(quick=options.quick, no_noise=options.no_noise)
    noise = check_noise(world, cells)
    public = public_data(world)
    tuned = {case: tune(world, public, case, grid(case, quick=options.quick)) for case in cells}
    scores: dict[Case, list[Score]] = {case: [] for case in cells}
    for seed in range(1 if options.quick else SEEDS):
        private = private_data(world, seed, max(case.owners for case in cells))
        for case, found in scores.items():
            found.append(outcome(world, private, case, tuned[case], f"{seed}"))
    check_gain(scores)
    return {
        "gate": True,
        "base_accuracy": rounded(base_accuracy(world)),
        "delta": DELTA,
        "records_per_owner": RECORDS,
        "rounds": ROUNDS,
        "local_steps": LOCAL_STEPS,
        "sample_rate": SAMPLE_RATE,
        "seeds": 1 if options.quick else SEEDS,
        "rows": [row_of(case, tuned[case], found) for case, found in scores.items()],
        "noise": noise,
    }


def base_accuracy(world: World) -> float:
    """Return the accuracy of the frozen network without an adapter, on the first seed's owners."""
    start = AdapterState.initial(SPEC, SeededRng("utility/base"))
    return score(world, start.factors, private_data(world, 0, FEW).common)[0]


def _head(case: Case) -> Document:
    relation = RELATION_ADD_REMOVE if case.unit == UNIT_RECORD else RELATION_ZERO_OUT
    return {
        "arm": case.arm, "owners": case.owners, "method": case.method,
        "unit": case.unit, "relation": relation, "epsilon": _number(case.epsilon), "delta": DELTA,
    }  # fmt: skip


def row_of(case: Case, knobs: Knobs, found: list[Score]) -> Document:
    """Return one cell of the grid: what was claimed, what the accountant finds, what was tuned, what came out."""
    noise = mechanism(case, 1.0).noise_multiplier if case.private else 0.0
    made = _head(case) | {
        "priced_epsilon": _number(priced(case)),
        "noise_multiplier": noise,
        "noise_over_signal": rounded(noise_over_signal(case), 3),
        "clip": _number(knobs.clip),
        "rate": knobs.rate,
    }
    for name in ("accuracy", "loss", "at_home"):
        values = [getattr(each, name) for each in found]
        made[name] = {"mean": _number(mean(values)), "std": _number(stdev(values)) if len(values) > 1 else None}
    return made


def _number(value: float) -> float | str:
    return rounded(value) if math.isfinite(value) else "inf"  # JSON has no infinity


def table(document: Document) -> Table:
    """Return the document as a table."""
    if "model" in document:
        return utility_smollm2.table(document)
    made = Table(
        title="held-out accuracy, mean ± standard deviation over seeds",
        caption=f"delta {document['delta']:g}; base without an adapter {document['base_accuracy']:.3f}",
    )
    for column in ("arm", "owners", "unit", "method", "epsilon", "z", "noise/signal", "clip", "rate", "accuracy"):
        made.add_column(column, justify="left" if column in {"arm", "unit", "method"} else "right")
    for row in document["rows"]:
        made.add_row(*_cells(row))
    return made


def _cells(row: Document) -> list[str]:
    accuracy, spread = row["accuracy"]["mean"], row["accuracy"]["std"]
    numbers: list[Any] = [row["noise_multiplier"], row["noise_over_signal"], row["clip"], row["rate"]]
    return [
        row["arm"], str(row["owners"]), row["unit"], row["method"], str(row["epsilon"]), *map(str, numbers),
        f"{accuracy:.3f}" + ("" if spread is None else f" ± {spread:.3f}"),
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run from the command line."""
    arguments = parser("utility", "What does privacy cost in held-out accuracy?")
    arguments.add_argument("--smollm2", action="store_true", help="the real base model and the demo's data instead")
    arguments.add_argument("--no-noise", action="store_true", help="only the cells that are clipped and not noised")
    arguments.add_argument("--method", action="append", choices=METHODS, help="with --smollm2: this method only")
    return run("utility", arguments, measure, table, argv)


if __name__ == "__main__":
    sys.exit(main())
