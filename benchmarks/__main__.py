"""``python -m benchmarks --quick``: every benchmark, each in a process of its own; fails if a gate fails."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import ArgumentParser
from importlib import import_module

from benchmarks.document import GATE_FAILED, NOT_MEASURED, Document, show

NAMES = ("secagg", "dp_step", "privacy_audit", "serving", "kernels", "hotswap", "gpu_engine", "round")


def one(name: str, flags: list[str]) -> tuple[int, Document]:
    """Run one benchmark; return its exit status and document."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    try:
        document: Document = json.loads(done.stdout)
    except ValueError:
        error = f"ended with status {done.returncode} and without a document"
        return done.returncode or GATE_FAILED, {"benchmark": name, "gate": False, "error": error}
    return done.returncode, document


def main(argv: list[str] | None = None) -> int:
    """Run all; return the largest exit status of those that could be measured."""
    arguments = ArgumentParser(prog="python -m benchmarks", description=__doc__)
    arguments.add_argument("--quick", action="store_true", help="a few minutes on two cores")
    arguments.add_argument("--json", action="store_true", help="one document, by benchmark")
    options = arguments.parse_args(argv)
    documents: dict[str, Document] = {}
    worst = 0
    for name in NAMES:
        status, documents[name] = one(name, ["--quick"] if options.quick else [])
        if status != NOT_MEASURED:  # a GPU, or an optional peer, that is not here
            worst = max(worst, abs(status))
        if not options.json:
            show(documents[name], import_module(f"benchmarks.{name}").table)
    if options.json:
        print(json.dumps(documents, indent=2))
    return worst


if __name__ == "__main__":
    sys.exit(main())
