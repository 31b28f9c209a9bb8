"""``fedllm demo``: the whole loop on this machine, with a table at the end."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import sys
from pathlib import Path
from types import FrameType

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from fedllm.cli.context import cache_root
from fedllm.cli.model import fetch
from fedllm.cli.output import print_json, say, stderr, stdout
from fedllm.clock import SystemClock
from fedllm.demo.recipe import BASE, MAX_EPSILON, MAX_TOKENS, OWNERS, ROUNDS, recipe
from fedllm.errors import ConfigError

_STATES = ("PLANNED", "TRAINING", "SHARES", "MASKED", "CONFIRM", "UNMASK", "AGGREGATED", "EVALUATING", "JUDGED")


def register(app: typer.Typer) -> None:
    """Add the top-level command."""
    app.command("demo")(demo)


def demo(
    rounds: int = typer.Option(ROUNDS, min=1, help="Federated rounds."),
    epsilon: str = typer.Option(str(MAX_EPSILON), help="Budget per record over all rounds at δ = 1e-5, or inf."),
    compare: bool = typer.Option(False, "--compare", help="Also train each owner's own adapter at the same budget."),
    keep: Path | None = typer.Option(None, help="Keep all files in this folder."),
    as_json: bool = typer.Option(False, "--json", help="Print one JSON document instead of tables."),
) -> None:
    """Four owners, a coordinator and an endpoint as real processes: train, sum, score, swap, answer."""
    from fedllm.demo.compare import train_all_alone
    from fedllm.demo.data import prepare
    from fedllm.demo.report import print_report
    from fedllm.demo.run import run_demo

    budget = _budget(epsilon)
    base = fetch(BASE)
    data = prepare(cache_root() / "demo-data", base, OWNERS, max_tokens=MAX_TOKENS)
    chosen = recipe(budget, rounds)
    # SIGTERM ends the demo as Ctrl-C does, so that its children are always taken down by the same code.
    signal.signal(signal.SIGTERM, _interrupt)
    with _Screen(rounds) as screen:
        alone = None
        if compare:
            screen.stage("training each owner's own adapter at the same budget")
            alone = train_all_alone(data, base, chosen)
        report = asyncio.run(run_demo(base, data, chosen, alone=alone, clock=SystemClock(), watch=screen, keep=keep))
    if as_json:
        print_json(report.to_json())
    else:
        print_report(report, stdout)


def _budget(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isinf(value):
        return None
    if not value > 0:
        raise ConfigError(f"--epsilon is {text!r}: a positive number or inf expected")
    return value


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


class _Screen:
    """Progress on stderr: a bar on a terminal, a line for each change elsewhere."""

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds
        self._last = ""
        live = sys.stderr.isatty() and not os.environ.get("FEDLLM_NO_PROGRESS")
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), TimeElapsedColumn())
        self._bars = Progress(*columns, console=stderr, disable=not live)
        self._task = self._bars.add_task("starting", total=rounds * len(_STATES))
        self._live = live

    def __enter__(self) -> _Screen:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def stage(self, text: str) -> None:
        """Say that a new part of the demo begins."""
        say(text)

    def round(self, number: int, total: int, state: str, detail: str) -> None:
        """Show where the current round is."""
        line = f"round {number}/{total}: {state.lower()} {detail}".rstrip()
        done = (number - 1) * len(_STATES) + (_STATES.index(state) + 1 if state in _STATES else 0)
        self._bars.update(self._task, completed=done, description=line)
        if line != self._last and not self._live:
            say(line)
        self._last = line
