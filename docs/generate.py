"""Write the reference pages that are read out of the code: errors, configuration and the command line.

``python docs/generate.py`` rewrites them; a test fails when they are stale.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click
import typer

from fedllm import cli, config, errors
from fedllm.aggregation.methods import support

HERE = Path(__file__).parent


def errors_page() -> str:
    """Return ``errors.md``: every code, its exit code, what it means."""
    rows = [(cls.code, cls.exit_code, cls.__name__, (cls.__doc__ or "").splitlines()[0]) for cls in _all_errors()]
    lines = [f"| `{code}` | {exit_code} | `{name}` | {meaning} |" for code, exit_code, name, meaning in sorted(rows)]
    return (
        "# Errors\n\nEvery error names the thing, the value found and the value allowed, and carries a hint. "
        "The command line prints\n`error[code]: message` on stderr and exits with the number below. No error ever "
        "holds training text, a prompt or a secret.\n\n| code | exit | class | meaning |\n| --- | --- | --- | --- |\n"
        + "\n".join(lines)
        + "\n"
    )


def _all_errors() -> list[type[errors.FedllmError]]:
    found = [errors.FedllmError]
    for cls in found:
        found += cls.__subclasses__()
    return [cls for cls in found if cls.__module__ == "fedllm.errors"]


def configuration_page() -> str:
    """Return ``configuration.md``: every key of every section."""
    sections = [
        ("coordinator", "`<home>/fedllm.toml`", config.CoordinatorSettings),
        ("federation.NAME", "`<home>/fedllm.toml`", config.FederationSettings),
        ("client", "`<home>/client.toml`", config.ClientSettings),
        ("serve", "`serve.toml`", config.ServeSettings),
        ("route", "`route.toml`", config.RouteSettings),
    ]
    text = (
        "# Configuration\n\nFlags win over `FEDLLM_<SECTION>_<KEY>` variables, those over TOML, that over defaults; "
        "`fedllm config show HOME --origin`\nsays which one won. An unknown key is an error that names the nearest "
        "known one. Secrets are files, never keys of these tables.\n"
    )
    for name, where, cls in sections:
        text += f"\n## `[{name}]` in {where}\n\n| key | type | default | meaning |\n| --- | --- | --- | --- |\n"
        for spec in dataclasses.fields(cls):
            text += f"| `{spec.name}` | {_type(spec)} | {_default(spec)} | {spec.metadata['doc']} |\n"
    return text


def _type(spec: dataclasses.Field[Any]) -> str:
    return str(spec.type).replace("|", "or")


def _default(spec: dataclasses.Field[Any]) -> str:
    if spec.default is not dataclasses.MISSING:
        return f"`{spec.default!r}`"
    if spec.default_factory is not dataclasses.MISSING:
        return f"`{spec.default_factory()!r}`"
    return "required"


def help_page() -> str:
    """Return ``help.md``: what ``--help`` prints for every command, at a fixed width."""
    text = "# Command line\n\nWhat `--help` prints, for every command. Exit codes: [errors.md](errors.md).\n"
    root = typer.main.get_command(cli.app)
    return text + _help(root, root.context_class(root, info_name="fedllm", terminal_width=_WIDTH))


def _help(command: click.Command, context: click.Context) -> str:
    lines = [line.rstrip() for line in command.get_help(context).splitlines()]
    text = f"\n## `{context.command_path}`\n\n```\n" + "\n".join(lines) + "\n```\n"
    for name, inner in getattr(command, "commands", {}).items():
        text += _help(inner, inner.context_class(inner, info_name=name, parent=context))
    return text


def methods_page() -> str:
    """Return ``methods.md``: which method runs under what."""
    heads = " | ".join(support.CONDITIONS)
    text = (
        "# Methods\n\nWhat each LoRA method runs under. A federation that asks for a refused combination is told so "
        "when its round is planned,\nwith the sentence of the table. Secure aggregation is never off.\n\n"
        f"| method | {heads} |\n|{' --- |' * (1 + len(support.CONDITIONS))}\n"
    )
    for name, refusals in support.table():
        cells = ["yes" if why is None else f"refused: {why}" for why in refusals]
        text += f"| `{name}` | {' | '.join(cells)} |\n"
    return text


_WIDTH = 100
PAGES = {
    "methods.md": methods_page,
    "errors.md": errors_page,
    "configuration.md": configuration_page,
    "help.md": help_page,
}

if __name__ == "__main__":
    for page, make in PAGES.items():
        (HERE / page).write_text(make(), encoding="utf-8")
