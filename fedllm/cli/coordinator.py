"""``fedllm coordinator``: the process that runs rounds."""

from __future__ import annotations

from pathlib import Path

import typer

from fedllm import telemetry
from fedllm.cli.context import ControlApi, coordinator_settings
from fedllm.cli.federation import KEY_FILE
from fedllm.cli.output import print_json, print_table
from fedllm.cli.plain import Noun
from fedllm.clock import SystemClock
from fedllm.identity import SigningIdentity

app = Noun("Run and watch the coordinator.")
HOME = typer.Option(..., help="The coordinator's folder, made by 'fedllm init'.")


@app.command("start")
def start(
    home: Path = HOME,
    port: int | None = typer.Option(None, help="Port of the control API."),
    flower_port: int | None = typer.Option(None, help="Port of the Flower SuperLink."),
    direct_port: int | None = typer.Option(None, help="Port that owners of direct federations dial."),
) -> None:
    """Run the coordinator until SIGTERM: carriers, rounds, registry, control API."""
    flags = {"port": port, "flower_port": flower_port, "direct_port": direct_port}
    settings, federations, _ = coordinator_settings(home, flags)
    telemetry.configure(SystemClock())
    from fedllm.server.app import run

    run(settings, federations)


@app.command("check")
def check(home: Path = HOME, as_json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """Validate configuration, keys, certificates, rosters and base models; change nothing."""
    from fedllm.server.app import check_transport, load_federation

    settings, federations, _ = coordinator_settings(home)
    identity = SigningIdentity.load(home / KEY_FILE)
    rows = []
    for federation in federations:
        loaded = load_federation(federation, home)
        check_transport(loaded, home, SystemClock())
        owners = len(loaded.roster.members)
        rows.append((federation.name, federation.alias, federation.method, owners, loaded.spec.base[:12]))
    if as_json:
        keys = ("name", "alias", "method", "owners", "base")
        print_json({
            "key": str(identity.public), "port": settings.port,
            "federations": [dict(zip(keys, row, strict=True)) for row in rows],
        })  # fmt: skip
    else:
        print_table(f"coordinator {identity.public}", ("federation", "alias", "method", "owners", "base"), rows)


@app.command("status")
def status(home: Path = HOME, as_json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """Show who is connected and what runs."""
    settings, _, _ = coordinator_settings(home)
    answer = ControlApi(settings).call("GET", "/v1/status")
    if as_json:
        print_json(answer)
        return
    for federation in answer["federations"]:
        rows = [(o["owner"], "yes" if o["connected"] else "no") for o in federation["owners"]]
        print_table(f"{federation['name']}: {federation['state']}", ("owner", "connected"), rows)
