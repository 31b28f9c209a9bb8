"""``python -m benchmarks --quick``: one benchmark after another, each in a process of its own; fails if a gate fails.

What cannot be measured here, for want of a GPU, the base model or an optional peer, is no failure: the last line of
output names it. ``leakage`` is left out and run by its name: it takes four minutes by itself even when quick.
"""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import ArgumentParser
from importlib import import_module

from benchmarks.document import GATE_FAILED, NOT_MEASURED, Document, show

NAMES = (
    "secagg",
    "dp_step",
    "privacy_audit",
    "utility",
    "serving",
    "kernels",
    "hotswap",
    "tiers",
    "burst",
    "fairness",
    "gpu_engine",
    "round",
)


def one(name: str, flags: list[str]) -> tuple[int, Document]:
    """Run one benchmark; return its exit status and document."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    try:
        document: Document = json.loads(done.stdout)
    except ValueError:  # whatever its status, 2 for an unknown flag too, it has not said that it could not be measured
        error = f"ended with status {done.returncode} and without a document"
        return GATE_FAILED, {"benchmark": name, "gate": False, "error": error}
    return done.returncode, document


def main(argv: list[str] | None = None) -> int:
    """Run all; return the largest exit status of those that could be measured."""
    arguments = ArgumentParser(prog="python -m benchmarks", description=__doc__)
    arguments.add_argument("--quick", action="store_true", help="a few minutes on two cores")
    arguments.add_argument("--json", action="store_true", help="one document, by benchmark")
    options = arguments.parse_args(argv)
    documents: dict[str, Document] = {}
    worst, failed, missing = 0, [], []
    for name in NAMES:
        status, documents[name] = one(name, ["--quick"] if options.quick else [])
        if status == NOT_MEASURED:
            missing.append(name)
        elif status:
            worst = max(worst, abs(status))
            failed.append(name)
        if not options.json:
            show(documents[name], import_module(f"benchmarks.{name}").table)
    if options.json:
        print(json.dumps(documents, indent=2))
    else:
        print(f"failed: {_listed(failed)}; not measured, which is no failure: {_listed(missing)}")
    return worst


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"


if __name__ == "__main__":
    sys.exit(main())
