"""``fedllm version``, ``doctor`` and ``config show``: what is here, and what is missing."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import typer

from fedllm.cli.context import (
    CLIENT_FILE,
    COORDINATOR_FILE,
    cache_root,
    client_settings,
    coordinator_settings,
    serve_settings,
)
from fedllm.cli.extras import PARTS
from fedllm.cli.output import exact, print_json, print_line, print_table
from fedllm.cli.plain import Noun
from fedllm.errors import NotFound

config = Noun("Look at settings.")


def register(app: typer.Typer) -> None:
    """Add the top-level commands."""
    app.command("version")(version)
    app.command("doctor")(doctor)


def version(as_json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """Print the installed release."""
    release = metadata.version("fedllm")
    if as_json:
        print_json({"fedllm": release, "python": platform.python_version()})
    else:
        print_line(release)


def doctor(as_json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """Report what each of the three programs would miss on this machine."""
    from fedllm.client.sandbox import probe

    parts = {part: [m for m in modules if find_spec(m) is None] for part, modules in PARTS.items()}
    isolation = probe()
    report = {
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "free_disk_gb": round(shutil.disk_usage(Path.cwd()).free / 1e9, 1),
        "models": str(cache_root() / "models"),
        "relay_isolation": isolation.kind,
        "missing": parts,
    }
    if as_json:
        print_json(report)
        return
    rows: list[tuple[str, object]] = [(k, v) for k, v in report.items() if k != "missing"]
    rows += [
        (f"fedllm[{part}]", "complete" if not gone else "missing: " + ", ".join(gone)) for part, gone in parts.items()
    ]
    print_table("fedllm doctor", ("what", "found"), rows)


@config.command("show")
def show(
    home: Path = typer.Argument(..., help="Folder of a coordinator or of an owner, or an endpoint's serve.toml."),
    origin: bool = typer.Option(False, "--origin", help="Say where each value came from."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON, origins included."),
) -> None:
    """Print the settings in force; no secret is ever a setting."""
    if home.is_file():
        sources = serve_settings(home, {})[1]
    elif (home / COORDINATOR_FILE).is_file():
        sources = coordinator_settings(home)[2]
    elif (home / CLIENT_FILE).is_file():
        sources = client_settings(home)[1]
    else:
        raise NotFound(
            f"{home} holds neither {COORDINATOR_FILE} nor {CLIENT_FILE}",
            hint="'fedllm init' or 'fedllm client join' makes such a folder",
        )
    if as_json:
        print_json({s.key: {"value": _plain(s.value), "origin": s.origin} for s in sources})
        return
    columns = ("key", "value", "origin") if origin else ("key", "value")
    print_table(str(home), columns, [(s.key, exact(s.value), s.origin)[: len(columns)] for s in sources])


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value
