"""``fedllm adapter``: versions, aliases, export."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import typer

from fedllm.cli.context import ControlApi, coordinator_settings, pick_federation
from fedllm.cli.files import drafts
from fedllm.cli.output import print_json, print_line, print_table, say
from fedllm.cli.plain import Noun
from fedllm.errors import ConfigError, DigestMismatch, NotFound
from fedllm.identity import SigningIdentity
from fedllm.ids import sha256

app = Noun("Adapter versions and the aliases that point at them.")
HOME = typer.Option(..., help="The coordinator's folder.")
FEDERATION = typer.Option(None, help="Federation, if there are several.")
VERSION = typer.Argument(..., help="NAME@vN, or at least 8 digits of a digest.")
JSON = typer.Option(False, "--json", help="Print JSON.")


@app.command("list")
def list_versions(home: Path = HOME, as_json: bool = JSON) -> None:
    """List all versions, oldest first, and which alias is at which."""
    api, _ = _connect(home)
    versions = api.call("GET", "/v1/versions")["versions"]
    aliases = api.call("GET", "/v1/aliases")["aliases"]
    if as_json:
        print_json({"versions": [_row(v) for v in versions], "aliases": aliases})
        return
    at = {digest: alias for alias, digest in aliases.items()}
    rows = []
    for version in versions:
        row = _row(version)
        rows.append((row["name"], row["digest"][:12], row["round"], row["owners"], row["candidate_loss"],
                     row["epsilon"], at.get(row["digest"], "")))  # fmt: skip
    print_table("versions", ("name", "digest", "round", "owners", "loss", "ε (advisory)", "alias"), rows)


@app.command("show")
def show(version: str = VERSION, home: Path = HOME) -> None:
    """Print one version's manifest, after checking the coordinator's signature over it."""
    api, key = _connect(home)
    found = _find(api, version)
    from fedllm.registry.remote import manifest_from_json

    manifest = manifest_from_json(found).open(key)
    print_json({**_row(found), "base": manifest.base, "plan": manifest.plan, "files": sorted(manifest.files)})


@app.command("promote")
def promote(
    version: str = VERSION,
    home: Path = HOME,
    federation: str | None = FEDERATION,
    reason: str = typer.Option("promoted by the operator", help="Goes into the alias's history."),
) -> None:
    """Move the federation's alias to a version (compare-and-swap against where it is now)."""
    settings, federations, _ = coordinator_settings(home)
    alias = pick_federation(federations, federation).alias
    api = ControlApi(settings)
    digest = _row(_find(api, version))["digest"]
    body = {"digest": digest, "expected": api.call("GET", "/v1/aliases")["aliases"].get(alias), "reason": reason}
    api.call("POST", f"/v1/aliases/{alias}", body)
    print_line(f"{alias} -> {digest}")


@app.command("rollback")
def rollback(
    home: Path = HOME,
    federation: str | None = FEDERATION,
    reason: str = typer.Option("rolled back by the operator", help="Goes into the alias's history."),
) -> None:
    """Move the alias back to where it was before its last move; epsilon spent stays spent."""
    settings, federations, _ = coordinator_settings(home)
    alias = pick_federation(federations, federation).alias
    table = ControlApi(settings).call("POST", f"/v1/aliases/{alias}", {"reason": reason})
    say("a rollback is another move of the alias: no version is deleted and no privacy budget comes back")
    print_line(f"{alias} -> {table['aliases'].get(alias)}")


@app.command("history")
def history(home: Path = HOME, federation: str | None = FEDERATION, as_json: bool = JSON) -> None:
    """Show every move of the federation's alias."""
    settings, federations, _ = coordinator_settings(home)
    alias = pick_federation(federations, federation).alias
    moves = ControlApi(settings).call("GET", f"/v1/aliases/{alias}/history")["moves"]
    if as_json:
        print_json(moves)
        return
    rows = [
        (m["epoch"], time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(m["moved"])), (m["previous"] or "-")[:12],
         m["new"][:12], m["actor"], m["reason"])
        for m in moves
    ]  # fmt: skip
    print_table(alias, ("epoch", "when (UTC)", "from", "to", "who", "why"), rows)


@app.command("export")
def export(version: str = VERSION, to: Path = typer.Argument(..., help="Folder to make."), home: Path = HOME) -> None:
    """Write a version's PEFT files to a new folder, digests checked."""
    api, key = _connect(home)
    from fedllm.registry.remote import manifest_from_json

    if to.exists():
        raise ConfigError(f"{to} exists and is not overwritten", hint="choose another folder")
    manifest = manifest_from_json(_find(api, version)).open(key)
    files = {}
    for name, record in manifest.files.items():
        data = api.blob(record.sha256)
        if sha256(data) != record.sha256:
            raise DigestMismatch(f"{name}: the coordinator sent other bytes than the signed manifest names")
        files[name] = data
    with drafts(to) as scratch:
        for name, data in files.items():
            (scratch / name).write_bytes(data)
    print_line(str(to))


def _connect(home: Path) -> tuple[ControlApi, Any]:
    settings, _, _ = coordinator_settings(home)
    return ControlApi(settings), SigningIdentity.load(home / "coordinator.pem").public


def _find(api: ControlApi, wanted: str) -> dict[str, Any]:
    versions: list[dict[str, Any]] = api.call("GET", "/v1/versions")["versions"]
    for version in versions:
        row = _row(version)
        if wanted == row["name"] or (len(wanted) >= 8 and row["digest"].startswith(wanted)):
            return version
    raise NotFound(f"no version {wanted!r}", hint="'fedllm adapter list' names them: NAME@vN or a digest")


def _row(version: dict[str, Any]) -> dict[str, Any]:
    privacy, metrics = version["privacy"], version["metrics"]
    return {
        "name": version["name"],
        "digest": version["digest"],
        "parent": version["parent"],
        "round": version["round"],
        "method": version["method"],
        "owners": f"{version['survivors']}/{version['cohort_size']}",
        "candidate_loss": metrics.get("candidate_loss"),
        "head_loss": metrics.get("head_loss"),
        **privacy,
    }
