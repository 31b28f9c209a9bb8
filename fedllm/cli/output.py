"""How results, errors and progress reach a person or a program."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fedllm.errors import FedllmError

stderr = Console(stderr=True, highlight=False)
stdout = Console(highlight=False, soft_wrap=True)
_UNBROKEN = 10_000
_HINTS = {
    2: "docs/configuration.md names every key and what it takes, --help every flag",
    5: "check the name or path; 'list' commands show what there is",
}


def print_json(document: Any) -> None:
    """Print one JSON document on stdout; what JSON has no number for (infinity) is null."""
    sys.stdout.write(json.dumps(_finite(document), indent=2, sort_keys=False, allow_nan=False) + "\n")


def print_line(text: str) -> None:
    """Print one line of data on stdout."""
    sys.stdout.write(text + "\n")


def say(text: str) -> None:
    """Tell a person something on stderr."""
    stderr.print(text, markup=False, soft_wrap=True)  # a path that is broken over lines cannot be copied


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, console: Console = stdout
) -> None:
    """Print a table; numbers are right-aligned. Into a pipe or file no line is broken and no box is drawn."""
    body = [[_cell(value) for value in row] for row in rows]
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.ROUNDED if console.is_terminal else None
    )
    for index, column in enumerate(columns):
        numeric = bool(body) and all(_is_number(row[index]) for row in body)
        table.add_column(column, justify="right" if numeric else "left", no_wrap=index == 0)
    for row in body:
        table.add_row(*(Text(cell) for cell in row))
    target = console if console.is_terminal else Console(file=console.file, width=_UNBROKEN, highlight=False)
    target.print(table)


def print_error(error: FedllmError) -> None:
    """Print ``error[code]: message`` and the hint on stderr."""
    hint = error.hint or _HINTS.get(error.exit_code, f"docs/errors.md says what {error.code} means")
    stderr.print(f"error[{error.code}]: {error.message}\n\nhint: {hint}", markup=False, soft_wrap=True)


def progress() -> Progress:
    """Return a progress display on stderr; silent where stderr is no terminal or progress is unwanted."""
    off = bool(os.environ.get("FEDLLM_NO_PROGRESS")) or not sys.stderr.isatty()
    return Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=30), TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(), console=stderr, disable=off,
    )  # fmt: skip


def _cell(value: object) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, float):
        if value and abs(value) < 0.001:
            return f"{value:.3g}"
        return f"{value:.3f}" if abs(value) < 100 else f"{value:.1f}"
    return " ".join(str(value).split())


def exact(value: object) -> str:
    """Return a setting as it would be typed: numbers unrounded, lists comma-separated."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return ", ".join(f"{key} = {exact(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ",".join(map(exact, value))
    return str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _is_number(text: str) -> bool:
    try:
        float(text.rstrip("%s"))
    except ValueError:
        return text == "-"
    return True
