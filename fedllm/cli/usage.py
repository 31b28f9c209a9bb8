"""``fedllm usage``: what tenants used, from the store that an endpoint or a router writes."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from fedllm.cli.output import print_json, print_table
from fedllm.cli.plain import Noun
from fedllm.clock import SystemClock
from fedllm.errors import ConfigError

if TYPE_CHECKING:
    from fedllm.serving.usage import UsageStore

app = Noun("What tenants used: requests and tokens.")
STORE = typer.Option(..., help="The store: 'usage' in serve.toml or route.toml, a file or a SQLAlchemy URL.")
TENANT = typer.Option(None, help="Only this tenant.")
SINCE = typer.Option(None, help="First moment, UTC: 2026-11-01, or 2026-11-01T12:00:00Z.")
UNTIL = typer.Option(None, help="End, UTC; requests that began before it count.")


@app.command("export")
def export(
    store: str = STORE,
    tenant: str | None = TENANT,
    since: str | None = SINCE,
    until: str | None = UNTIL,
    as_json: bool = typer.Option(False, "--json", help="Print a JSON list."),
    as_csv: bool = typer.Option(False, "--csv", help="Print CSV that a spreadsheet reads as text; the default."),
) -> None:
    """Print every request that was stored, one row each; never what was asked or answered."""
    if as_json and as_csv:
        raise ConfigError("--json and --csv: one of them", hint="CSV is the default")
    first, end = _moment("--since", since), _moment("--until", until)
    with _opened(store) as usage:
        if not as_json:
            usage.export_csv(sys.stdout, first, end, tenant)
            return
        begin = "[\n"
        for row in usage.every(first, end, tenant):  # a month may be more than fits in memory
            sys.stdout.write(begin + json.dumps(row.as_dict(), allow_nan=False))
            begin = ",\n"
        sys.stdout.write("[]\n" if begin == "[\n" else "\n]\n")


@app.command("show")
def show(
    store: str = STORE,
    tenant: str | None = TENANT,
    since: str | None = SINCE,
    until: str | None = UNTIL,
    by: str = typer.Option(
        "tenant,version,day", help="Sums by these: tenant key route alias version status replica day."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Show totals: requests, and tokens of prompts and answers."""
    groups = tuple(by.split(","))
    first, end = _moment("--since", since), _moment("--until", until)
    with _opened(store) as usage:
        found = usage.totals(first, end, groups, tenant=tenant)
    if as_json:
        print_json([total.as_dict() for total in found])
        return
    rows = [
        (*(_short(name, total.group[name]) for name in groups), total.requests, total.prompt_tokens,
         total.completion_tokens, total.cached_tokens)
        for total in found
    ]  # fmt: skip
    print_table("usage", (*groups, "requests", "prompt", "completion", "cached"), rows)


@contextmanager
def _opened(store: str) -> Iterator[UsageStore]:
    from fedllm.serving.usage import open_usage

    usage = open_usage(store, SystemClock(), reading=True)
    try:
        yield usage
    finally:
        asyncio.run(usage.close())


def _moment(flag: str, text: str | None) -> float | None:
    from fedllm.serving.usage_rows import utc_seconds

    return None if text is None else utc_seconds(text, what=flag)


def _short(name: str, value: object) -> object:
    return value[:12] if name == "version" and isinstance(value, str) else value
