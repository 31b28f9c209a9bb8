"""What every benchmark's document has in common: the machine, the date, the command, and the gate's verdict."""

from __future__ import annotations

import json
import os
import platform
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedllm.errors import FedllmError, NotFound

Document = dict[str, Any]
"""One benchmark's results, as JSON prints them."""

MODEL = "smollm2-135m"
GATE_FAILED = 1
NOT_MEASURED = 2
_FLAGS = ("aes", "vaes", "avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
_PACKAGES = ("cryptography", "flwr", "numpy", "opacus", "peft", "torch", "transformers")


class GateFailed(Exception):
    """The results are wrong, so no time is reported.

    Parameters
    ----------
    message : str
        The check, the value found and the value allowed.
    """


def check(ok: bool, message: str) -> None:
    """Raise `GateFailed` with `message` unless `ok`."""
    if not ok:
        raise GateFailed(message)


def hardware(cpuinfo: Path = Path("/proc/cpuinfo")) -> Document:
    """Return a generic description of this machine: cores, load, and the CPU flags that matter here."""
    flags: set[str] = set()
    if cpuinfo.is_file():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")]
        flags = set(lines[0].split()) if lines else set()
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "cpu_flags": [flag for flag in _FLAGS if flag in flags],
        "load_1m": round(os.getloadavg()[0], 1),
        "gpu": None,
    }


def versions() -> dict[str, str]:
    """Return Python's version, and those of the packages measured that are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def model_folder() -> Path:
    """Return the folder of the real base model, under ``FEDLLM_CACHE`` (default ``.cache/fedllm``).

    Raises
    ------
    NotFound
        If it has not been pulled.
    """
    folder = Path(os.environ.get("FEDLLM_CACHE", ".cache/fedllm")) / "models" / MODEL
    if not (folder / "config.json").is_file():
        raise NotFound(
            f"base model {MODEL} is not in the cache", hint=f"fedllm model pull {MODEL}, or set FEDLLM_CACHE"
        )
    return folder


def parser(name: str, question: str) -> ArgumentParser:
    """Return a command line with the flags that all benchmarks have."""
    made = ArgumentParser(prog=f"python -m benchmarks.{name}", description=question)
    made.add_argument("--quick", action="store_true", help="fewer repetitions: a minute or two on one core")
    made.add_argument("--json", action="store_true", help="print one JSON document on standard output, no table")
    return made


def run(
    name: str,
    arguments: ArgumentParser,
    measure: Callable[[Namespace], Document],
    table: Callable[[Document], Table],
    argv: Sequence[str] | None = None,
) -> int:
    """Measure, print, and return the exit status.

    Parameters
    ----------
    measure : Callable
        Gate, then timings. What it returns has ``gate``.
    table : Callable
        The same document for people.

    Returns
    -------
    int
        0; 1 if the gate failed; 2 if something that is needed is missing. The document says which, and has no
        figures then.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    options = arguments.parse_args(given)
    head: Document = {
        "benchmark": name,
        "command": " ".join(["python -m", f"benchmarks.{name}", *given]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "versions": versions(),
    }
    status = 0
    try:
        document = head | measure(options)
    except GateFailed as error:
        document, status = head | {"gate": False, "error": str(error)}, GATE_FAILED
    except FedllmError as error:
        hint = f" ({error.hint})" if error.hint else ""
        document, status = head | {"gate": None, "error": f"not measured: {error.message}{hint}"}, NOT_MEASURED
    if options.json:
        print(json.dumps(document, indent=2))
    else:
        show(document, table)
    return status


def show(document: Document, table: Callable[[Document], Table]) -> None:
    """Print a document as a table, or why there is none."""
    console = Console()
    if "error" in document:
        console.print(f"{document['benchmark']}: {document['error']}", style="red", markup=False)
        return
    console.print(table(document))


def rounded(value: float, digits: int = 4) -> float:
    """Return `value` to `digits` significant digits: more would be noise."""
    return float(f"{value:.{digits}g}")
