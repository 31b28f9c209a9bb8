"""One round, start to new model, in real processes: fedllm over Flower and over gRPC, Flower's SecAgg+ and FedAvg.

Four owners on this machine, one system after the other, each alone; training is stubbed out on all sides by the same
known updates. A system's figure is the median over rounds of the seconds from the round's first step until the sum of
the survivors is open and a new global model exists. Flower's systems have no scoring by owners; fedllm's has, and the
whole round with it is reported beside. The gate: every round's model is the mean of the known updates, rounds added up.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

from rich.table import Table

from benchmarks.document import Document, check, parser, rounded, run
from benchmarks.round_federation import CLIP_RANGE, VALUE_BITS
from benchmarks.round_flower import EXCHANGES, run_peer
from benchmarks.round_ours import run_ours
from benchmarks.round_updates import OWNERS

Records = list[dict[str, Any]]
DIMS = (1_000_000, 10_000_000)
_FLOAT32_ADDING = 2e-7
"""Adding four models of this size in float32 is no further off."""

SYSTEMS: dict[str, Callable[[int, int], Records]] = {
    "flower_secagg": partial(run_peer, "secagg"),
    "flower": partial(run_ours, "flower"),
    "flower_fedavg": partial(run_peer, "fedavg"),
    "direct": partial(run_ours, "direct"),
}
"""Name to ``(dim, rounds) -> records``. fedllm's two have its transports' names."""
OURS = ("flower", "direct")
ALLOWED = {
    **dict.fromkeys(OURS, CLIP_RANGE / (2 ** (VALUE_BITS - 1) - 1)),
    # its grid over +-8, and float32 arithmetic on sums of up to 32
    "flower_secagg": 16 / 2**22 + 4e-6,
    "flower_fedavg": _FLOAT32_ADDING,
}
"""How far off a round's model may be for each round there was: one step of the system's grid."""

COUNTED = (
    "wall seconds of one round from its first step until the survivors' sum is open and a new global model exists: "
    "sending the model out, known updates in place of training, keys, masks, uploads, unmasking, the new model. Not "
    "counted: starting processes, connecting, and scoring by owners, which Flower's systems have not; "
    "*_round_with_scores_s is fedllm's whole round with scoring, gate and publication"
)
SETTINGS = (
    "mutual TLS on direct, none on Flower's loopback links; fedllm 16-bit values in 24-bit entries, complete graph, "
    "3 of 4 shares; Flower 22-bit values in 64-bit entries, its defaults, 4 shares, 3 to reconstruct; Flower's "
    "systems run as Flower ships them, with task polls every 0.25 s in place of 1 s as fedllm sets them; fedllm over "
    "Flower has what it brings: app processes that start warm, and a long poll in front of the SuperLink"
)


def gated(system: str, records: Records, rounds: int) -> Records:
    """Return a system's records if every one of its models was right.

    Raises
    ------
    GateFailed
        If a round is missing, or a model is further off than its quantisation explains, or not a number.
    """
    check(len(records) == rounds, f"{system}: {len(records)} of {rounds} rounds were recorded")
    for each in records:
        error, allowed = float(each["error"]), ALLOWED[system] * int(each["round"])
        check(
            error <= allowed, f"{system}: the model of round {each['round']} is {error:.3g} off, {allowed:.3g} allowed"
        )
    return records


def figures(dim: int, records: dict[str, Records]) -> Document:
    """Return the figures of one size from the records of all systems."""
    typical = {name: median(each["seconds"] for each in rows) for name, rows in records.items()}
    ours = {name: records[name] for name in OURS}
    made: Document = {"dim": dim, **{f"{name}_s": rounded(seconds) for name, seconds in typical.items()}}
    made["flower_over_secagg"] = rounded(typical["flower"] / typical["flower_secagg"], 3)
    made["direct_over_fedavg"] = rounded(typical["direct"] / typical["flower_fedavg"], 3)
    for name, rows in ours.items():
        made[f"{name}_round_with_scores_s"] = rounded(median(each["with_scores_s"] for each in rows))
    made["phases_s"] = {name: _phases(rows) for name, rows in ours.items()}
    made["exchanges"] = {
        **{name: median(each["exchanges"] for each in rows) for name, rows in ours.items()},
        **{
            f"{name}_with_scores": median(each["exchanges_with_scores"] for each in rows) for name, rows in ours.items()
        },
        **{f"flower_{name}": count for name, count in EXCHANGES.items()},
    }
    made["upload_bytes"] = {name: max(each["upload_bytes"] for each in rows) for name, rows in ours.items()}
    made["every_round_s"] = {name: [rounded(each["seconds"]) for each in rows] for name, rows in records.items()}
    made["max_abs_error"] = {name: rounded(max(each["error"] for each in rows), 3) for name, rows in records.items()}
    made["load_1m"] = {name: [each["load_1m"] for each in rows] for name, rows in records.items()}
    return made


def _phases(rows: Records) -> dict[str, float]:
    return {phase: rounded(median(each["phases"][phase] for each in rows), 3) for phase in rows[0]["phases"]}


def measure(options: Namespace) -> Document:
    """Run every system at every size, one after the other."""
    rounds = options.rounds or (2 if options.quick else 3)
    results = []
    for dim in options.dim or (DIMS[:1] if options.quick else DIMS):
        records = {name: gated(name, system(dim, rounds), rounds) for name, system in SYSTEMS.items()}
        results.append(figures(dim, records))
    return {
        "gate": True, "owners": OWNERS, "rounds": rounds, "training": "stubbed out: known updates on all sides",
        "counted": COUNTED, "settings": SETTINGS, "results": results,
    }  # fmt: skip


def table(document: Document) -> Table:
    """Return the document as a table."""
    made = Table(
        title=f"round: {document['owners']} owners, {document['rounds']} rounds, seconds to a new model",
        caption="; ".join(
            f"{each['dim']:,}: over Flower {each['flower_over_secagg']:.2f} of its SecAgg+, "
            f"direct {each['direct_over_fedavg']:.2f} of its FedAvg"
            for each in document["results"]
        ),
    )
    for column in ("entries", *SYSTEMS, *(f"{name} with scores" for name in OURS)):
        made.add_column(column, justify="right")
    for each in document["results"]:
        names = (*(f"{name}_s" for name in SYSTEMS), *(f"{name}_round_with_scores_s" for name in OURS))
        made.add_row(f"{each['dim']:,}", *(f"{each[name]:.3g}" for name in names))
    return made


def main(argv: list[str] | None = None) -> int:
    """Run from the command line."""
    arguments = parser("round", "How long does a round take, next to Flower's own?")
    arguments.add_argument("--dim", type=int, action="append", help="entries of the update; may be given again")
    arguments.add_argument("--rounds", type=int, help="rounds of each system; 3, with --quick 2")
    return run("round", arguments, measure, table, argv)


if __name__ == "__main__":
    sys.exit(main())
