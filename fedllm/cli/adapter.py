"""``fedllm adapter``: versions, aliases, what endpoints report of them, import and export."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import typer

from fedllm.cli.context import ControlApi, coordinator_settings, pick_federation
from fedllm.cli.federation import KEY_FILE
from fedllm.cli.files import drafts
from fedllm.cli.output import print_json, print_line, print_table, say
from fedllm.cli.plain import Noun
from fedllm.clock import SystemClock
from fedllm.config import CoordinatorSettings, FederationSettings
from fedllm.errors import ConfigError, DigestMismatch, NotFound
from fedllm.identity import SigningIdentity
from fedllm.ids import AliasName, check_alias, check_name, sha256

app = Noun("Adapter versions and the aliases that point at them.")
HOME = typer.Option(..., help="The coordinator's folder.")
FEDERATION = typer.Option(None, help="Federation, or line of imported versions, if there are several.")
ALIAS = typer.Option(None, help="The alias itself, tenant/name; by default the federation's.")
VERSION = typer.Argument(..., help="NAME@vN, or at least 8 digits of a digest.")
JSON = typer.Option(False, "--json", help="Print JSON.")
_SOURCE = "reported by endpoints, not verified"
_COMPARED = (
    ("requests", "requests"), ("5xx of requests", "error_rate"), ("4xx", "errors_4xx"), ("5xx", "errors_5xx"),
    ("first token, p50 (s)", "ttft_p50_s"), ("first token, p90 (s)", "ttft_p90_s"),
    ("first token, p99 (s)", "ttft_p99_s"), ("prompt tokens", "prompt_tokens"),
    ("completion tokens", "completion_tokens"), ("rated up", "up"), ("rated down", "down"), ("up of rated", "up_share"),
)  # fmt: skip


@app.command("list")
def list_versions(home: Path = HOME, as_json: bool = JSON) -> None:
    """List all versions, oldest first, which alias is at which, and what endpoints report of them (not verified)."""
    api, _ = _connect(home)
    versions = api.call("GET", "/v1/versions")["versions"]
    aliases = api.call("GET", "/v1/aliases")["aliases"]
    observed = api.call("GET", "/v1/observations")["versions"]
    if as_json:
        rows = [{**_row(v), "observations": observed.get(v["digest"])} for v in versions]
        print_json({"versions": rows, "aliases": aliases})
        return
    cells = []
    for version in versions:
        row = _row(version)
        seen = (observed.get(row["digest"]) or {}).get("total") or {}
        at = ", ".join(sorted(alias for alias, digest in aliases.items() if digest == row["digest"]))
        cells.append((row["name"], row["digest"][:12], row["round"] or None, row["owners"], row["candidate_loss"],
                      row["epsilon"], at, seen.get("requests"), _share(seen.get("error_rate")),
                      _rated(seen)))  # fmt: skip
    columns = ("name", "digest", "round", "owners", "loss", "ε (advisory)", "alias", "requests", "5xx", "feedback")
    print_table("versions", columns, cells)


@app.command("show")
def show(version: str = VERSION, home: Path = HOME) -> None:
    """Print a version's manifest, its signature checked, and what endpoints report of it, which nobody checked."""
    api, key = _connect(home)
    found = _find(api, version)
    from fedllm.registry.remote import manifest_from_json

    manifest = manifest_from_json(found).open(key)
    observed = api.call("GET", f"/v1/versions/{manifest.digest}/observations")
    signed = {"base": manifest.base, "plan": manifest.plan, "files": sorted(manifest.files)}
    print_json({**_row(found), **signed, "observations": observed})


@app.command("compare")
def compare(
    version: str = VERSION,
    other: str | None = typer.Argument(None, help="Another version; by default the one before in its line."),
    home: Path = HOME,
    as_json: bool = JSON,
) -> None:
    """Show two versions side by side, as endpoints report them. It moves no alias."""
    api, _ = _connect(home)
    versions: list[dict[str, Any]] = api.call("GET", "/v1/versions")["versions"]
    first = _pick(versions, version)
    second = _before(versions, first) if other is None else _pick(versions, other)
    both = []
    for each in (first, second):
        total = api.call("GET", f"/v1/versions/{each['digest']}/observations")["total"] or {}
        row = _row(each)
        both.append({"name": row["name"], "digest": row["digest"], "candidate_loss": row["candidate_loss"], **total})
    if as_json:
        print_json({"source": _SOURCE, "versions": both})
        return
    rows = [("loss, held out", *(each["candidate_loss"] for each in both))]
    rows += [(label, *(each.get(key) for each in both)) for label, key in _COMPARED]
    print_table(_SOURCE, ("", both[0]["name"], both[1]["name"]), rows)


@app.command("import")
def import_folder(
    folder: Path = typer.Argument(..., help="PEFT folder: adapter_config.json and adapter_model.safetensors."),
    federation: str = typer.Option(..., help="Name that its versions count under; not that of a federation."),
    base: Path = typer.Option(..., help="Folder of the base model that it was trained for."),
    alias: str | None = typer.Option(None, help="tenant/name that they are published to; said once for each name."),
    home: Path = HOME,
    as_json: bool = JSON,
) -> None:
    """Add a PEFT folder as a signed version; nothing is claimed of its data. 'adapter promote' publishes it."""
    from fedllm.basemodel.inspect import open_base
    from fedllm.registry.store import Registry
    from fedllm.server.imports import import_adapter

    _, federations, _ = coordinator_settings(home)
    check_name(federation, what="federation")
    if any(each.name == federation for each in federations):
        raise ConfigError(
            f"federation {federation!r} is trained here: its versions are made by rounds",
            hint="give imported versions a --federation name of their own",
        )
    target = None if alias is None else check_alias(alias)
    identity = SigningIdentity.load(home / KEY_FILE)
    registry = Registry(home / "registry", identity.public, SystemClock())
    try:
        made = import_adapter(folder, open_base(base), registry, identity, federation=federation, alias=target)
    finally:
        registry.close()
    say("privacy unit: none; nothing is claimed of the data that it was trained on")
    say(f"no alias has moved; next: 'fedllm adapter promote {made.name} --federation {federation}'")
    if as_json:
        print_json({"name": made.name, "digest": made.digest})
        return
    print_line(f"{made.name} {made.digest}")


@app.command("promote")
def promote(
    version: str = VERSION,
    home: Path = HOME,
    federation: str | None = FEDERATION,
    alias: str | None = ALIAS,
    reason: str = typer.Option("promoted by the operator", help="Goes into the alias's history."),
) -> None:
    """Move the federation's alias to a version (compare-and-swap against where it is now)."""
    settings, federations, _ = coordinator_settings(home)
    api, target = _target(settings, federations, federation, alias)
    digest = _row(_find(api, version))["digest"]
    body = {"digest": digest, "expected": api.call("GET", "/v1/aliases")["aliases"].get(target), "reason": reason}
    api.call("POST", f"/v1/aliases/{target}", body)
    print_line(f"{target} -> {digest}")


@app.command("rollback")
def rollback(
    home: Path = HOME,
    federation: str | None = FEDERATION,
    alias: str | None = ALIAS,
    reason: str = typer.Option("rolled back by the operator", help="Goes into the alias's history."),
) -> None:
    """Move the alias back to where it was before its last move; epsilon spent stays spent."""
    settings, federations, _ = coordinator_settings(home)
    api, target = _target(settings, federations, federation, alias)
    table = api.call("POST", f"/v1/aliases/{target}", {"reason": reason})
    say("a rollback is another move of the alias: no version is deleted and no privacy budget comes back")
    print_line(f"{target} -> {table['aliases'].get(target)}")


@app.command("history")
def history(
    home: Path = HOME, federation: str | None = FEDERATION, alias: str | None = ALIAS, as_json: bool = JSON
) -> None:
    """Show every move of the federation's alias."""
    settings, federations, _ = coordinator_settings(home)
    api, target = _target(settings, federations, federation, alias)
    moves = api.call("GET", f"/v1/aliases/{target}/history")["moves"]
    if as_json:
        print_json(moves)
        return
    rows = [
        (m["epoch"], time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(m["moved"])), (m["previous"] or "-")[:12],
         m["new"][:12], m["actor"], m["reason"])
        for m in moves
    ]  # fmt: skip
    print_table(target, ("epoch", "when (UTC)", "from", "to", "who", "why"), rows)


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
    return ControlApi(settings), SigningIdentity.load(home / KEY_FILE).public


def _target(
    settings: CoordinatorSettings, federations: list[FederationSettings], federation: str | None, alias: str | None
) -> tuple[ControlApi, AliasName]:
    """Return the alias that is meant: given itself, a federation's of the settings file, or an imported line's."""
    if alias is not None:
        target = check_alias(alias)
        return ControlApi(settings), target
    names = [each.name for each in federations]
    if federation in names or (federation is None and names):
        target = check_alias(pick_federation(federations, federation).alias)
        return ControlApi(settings), target
    api = ControlApi(settings)
    lines: dict[str, str] = api.call("GET", "/v1/lines")["lines"]
    name = next(iter(lines)) if federation is None and len(lines) == 1 else federation
    if name not in lines:
        known = ", ".join([*names, *sorted(lines)]) or "none"
        raise NotFound(
            f"no alias is known for federation {name!r} (known: {known})", hint="name one with --federation or --alias"
        )
    return api, check_alias(lines[name])


def _find(api: ControlApi, wanted: str) -> dict[str, Any]:
    return _pick(api.call("GET", "/v1/versions")["versions"], wanted)


def _before(versions: list[dict[str, Any]], version: dict[str, Any]) -> dict[str, Any]:
    line = [v for v in versions if v["federation"] == version["federation"] and v["number"] < version["number"]]
    if not line:
        raise NotFound(f"{version['name']} is the first of its line", hint="name the version to compare it with")
    return max(line, key=lambda found: int(found["number"]))


def _pick(versions: list[dict[str, Any]], wanted: str) -> dict[str, Any]:
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
        "owners": f"{version['survivors']}/{version['cohort_size']}" if version["cohort_size"] else None,
        "candidate_loss": metrics.get("candidate_loss"),
        "head_loss": metrics.get("head_loss"),
        **privacy,
    }


def _share(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.1f}%"


def _rated(seen: dict[str, Any]) -> str | None:
    return f"+{seen['up']} -{seen['down']}" if seen.get("up") or seen.get("down") else None
