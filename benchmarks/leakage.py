"""What leaks from an update, from a sum, and from a finished adapter: three attacks, each with a control that leaks.

Gradient inversion on what is sent, exposure of planted canaries and membership inference on what is published. A
control without protection that does not leak fails the gate: an attack that finds nothing there shows nothing.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable

import torch
from rich.table import Table

from benchmarks.document import Document, parser, run
from benchmarks.leakage_inversion import inversion
from benchmarks.leakage_memory import canary, membership

PARTS: dict[str, Callable[..., Document]] = {"inversion": inversion, "canary": canary, "membership": membership}


def measure(options: Namespace) -> Document:
    """Run the attacks that were asked for; each has its gate inside."""
    torch.set_num_threads(1)
    chosen = [options.only] if options.only else list(PARTS)
    return {"gate": True, "threads": 1} | {name: PARTS[name](quick=options.quick) for name in chosen}


def table(document: Document) -> Table:
    """Return the document as a table."""
    made = Table(title="leakage: SmolLM2-135M; rows marked * are controls and must leak")
    for column in ("attack", "what is seen", "found", "chance"):
        made.add_column(column, justify="left" if column in {"attack", "what is seen"} else "right")
    for setting in document.get("inversion", {}).get("settings", ()):
        attack = f"tokens of a record, up to {setting['tokens']}, rank {setting['rank']}"
        for name, row in setting["rows"].items():
            made.add_row(attack, _marked(name, row), f"{row['recall']:.2f}", f"{row['chance']:.2f}")
    for name, row in document.get("canary", {}).get("rows", {}).items():
        bits = ", ".join(f"{count}x {mean:.1f}" for count, mean in row["mean_exposure"].items())
        made.add_row("exposure, bits", _marked(name, row), bits, f"{document['canary']['chance']:.2f}")
    for name, row in document.get("membership", {}).get("rows", {}).items():
        for attack, scores in row["attacks"].items():
            low, high = scores["auc_interval"]
            made.add_row(
                f"membership, {attack}", _marked(name, row), f"AUC {scores['auc']:.2f} [{low:.2f}, {high:.2f}]", "0.50"
            )
    return made


def _marked(name: str, row: Document) -> str:
    return f"{name} *" if row["control"] else name


def main(argv: list[str] | None = None) -> int:
    """Run from the command line."""
    arguments = parser("leakage", "What leaks from updates, sums and adapters, with and without protection?")
    arguments.add_argument("--only", choices=list(PARTS), help="one attack instead of all three")
    return run("leakage", arguments, measure, table, argv)


if __name__ == "__main__":
    sys.exit(main())
