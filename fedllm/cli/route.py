"""``fedllm route``: several replicas behind one endpoint."""

from __future__ import annotations

from pathlib import Path

import typer

from fedllm import telemetry
from fedllm.cli.context import route_settings
from fedllm.clock import SystemClock


def register(app: typer.Typer) -> None:
    """Add the top-level command."""
    app.command("route")(route)


def route(
    config: Path | None = typer.Option(None, help="route.toml; flags win over it."),
    replicas: Path | None = typer.Option(None, help="TOML file of the replicas; it may change while it is used."),
    registry: str | None = typer.Option(None, help="URL of the coordinator, or a shared registry folder."),
    coordinator_key: str | None = typer.Option(None, help="Pinned key that versions must be signed with."),
    tenants: Path | None = typer.Option(None, help="TOML file of tenants."),
    base_name: str | None = typer.Option(None, help="Model id of the base, the name of its folder at the replicas."),
    host: str | None = typer.Option(None, help="Address to listen on; loopback unless told otherwise."),
    port: int | None = typer.Option(None, help="Port of the OpenAI API."),
    ttft_objective_s: float | None = typer.Option(None, help="Seconds to the first token that limits adapt to."),
    max_in_flight: int | None = typer.Option(None, help="Requests in flight at one replica at most."),
    predictions_mb: int | None = typer.Option(None, help="MiB of answers at temperature 0 kept for their own tenant."),
) -> None:
    """Run a router until SIGTERM: one OpenAI API before several replicas, and one moment at which an alias moves."""
    flags = {
        "replicas": replicas, "registry": registry, "coordinator_key": coordinator_key, "tenants": tenants,
        "base_name": base_name, "host": host, "port": port, "ttft_objective_s": ttft_objective_s,
        "max_in_flight": max_in_flight, "predictions_mb": predictions_mb,
    }  # fmt: skip
    settings, _ = route_settings(config, flags)
    telemetry.configure(SystemClock())
    from fedllm.serving.router.app import run

    run(settings)
