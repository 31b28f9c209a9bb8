"""``fedllm tenant``: who may ask the endpoint or the router, for what, and how much."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fedllm.cli.output import print_json, print_line, print_table, say
from fedllm.cli.plain import Noun
from fedllm.clock import SystemClock, iso_utc
from fedllm.errors import ConfigError
from fedllm.rng import OsRng

if TYPE_CHECKING:
    from fedllm.serving.keys import ApiKey
    from fedllm.serving.tenants import Tenant

app = Noun("Who may ask the endpoint, and for what.")
FILE = typer.Option(..., "--tenants", help="TOML file of tenants; keys in it are hashed.")
NAME = typer.Argument(..., help="Name of the tenant.")
ALIASES = typer.Argument(..., help="Aliases tenant/name, or base.")
_DAY_S, _HOUR_S = 86_400.0, 3_600.0


@app.command("add")
def add(
    name: str = NAME,
    allow: list[str] = typer.Option([], help="Alias the tenant may use (repeat for several); nothing by default."),
    operator: bool = typer.Option(False, "--operator", help="Let its key read the whole endpoint's counters."),
    router: bool = typer.Option(False, "--router", help="Let its key speak for tenants of its own; allow '*' for all."),
    share_cache: bool = typer.Option(False, "--share-cache", help="Share the prefix cache of aliases that are shared."),
    log_prompts: bool = typer.Option(False, "--log-prompts", help="Agree that its prompts and answers are logged."),
    weight: float = typer.Option(1.0, min=0.1, max=10.0, help="Its share of a busy engine, next to the others'."),
    requests_per_minute: int | None = typer.Option(None, min=1, help="Most requests in a minute; no limit unless set."),
    tokens_per_minute: int | None = typer.Option(None, min=1, help="Most tokens of prompts and answers in a minute."),
    concurrent: int | None = typer.Option(None, min=1, help="Most requests in flight."),
    tokens_per_month: int | None = typer.Option(None, min=1, help="Most tokens in a calendar month, UTC."),
    expires_days: float | None = typer.Option(None, min=0.0, help="Days that its key lives; for ever unless set."),
    file: Path = FILE,
) -> None:
    """Make a tenant; its key is printed once and stored only as a hash."""
    from fedllm.serving.quota import Limits
    from fedllm.serving.tenants import create_tenant

    secret = create_tenant(
        file,
        name,
        allow,
        operator=operator,
        router=router,
        share_cache=share_cache,
        log_prompts=log_prompts,
        weight=weight,
        limits=Limits(requests_per_minute, tokens_per_minute, concurrent, tokens_per_month),
        expires_s=None if expires_days is None else expires_days * _DAY_S,
    )
    say(f"tenant {name} may use {', '.join(allow) or 'nothing yet'}; the key below is shown once")
    print_line(secret)


@app.command("list")
def list_tenants(file: Path = FILE, as_json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """List tenants, what they may use, their limits and the state of their keys; never keys."""
    from fedllm.serving.tenants import load_tenants

    now, found = SystemClock().now(), load_tenants(file)
    if as_json:
        print_json([_as_json(tenant, now) for tenant in found])
        return
    columns = ("tenant", "aliases", "weight", "role", "keys", "limits")
    print_table(str(file), columns, [_row(tenant, now) for tenant in found])


@app.command("rotate")
def rotate(
    name: str = NAME,
    overlap_hours: float = typer.Option(24.0, min=0.0, help="Hours that the keys valid now still open."),
    expires_days: float | None = typer.Option(None, min=0.0, help="Days that the new key lives; for ever unless set."),
    file: Path = FILE,
) -> None:
    """Print a new key, once; the old ones expire after the overlap, so that apps can change over."""
    from fedllm.serving.tenant_changes import rotate_key

    expires = None if expires_days is None else expires_days * _DAY_S
    overlap = overlap_hours * _HOUR_S
    secret = rotate_key(file, name, OsRng(), SystemClock(), overlap_s=overlap, expires_s=expires)
    say(f"older keys of {name} end within {overlap_hours:g} hours; the key below is shown once")
    print_line(secret)


@app.command("revoke")
def revoke(
    name: str = NAME,
    key: str | None = typer.Option(None, help="Name of one key, e.g. key-1; all of them by default."),
    file: Path = FILE,
) -> None:
    """Take keys back at once; requests that run go on."""
    from fedllm.serving.tenant_changes import revoke_keys

    revoked = revoke_keys(file, name, SystemClock(), key=key)
    say(f"revoked of {name}: {', '.join(revoked) or 'nothing, all were revoked before'}")


@app.command("allow")
def allow_aliases(name: str = NAME, aliases: list[str] = ALIASES, file: Path = FILE) -> None:
    """Let a tenant use further aliases."""
    from fedllm.serving.tenant_changes import change_access

    _say_access(name, change_access(file, name, allow=aliases))


@app.command("deny")
def deny_aliases(name: str = NAME, aliases: list[str] = ALIASES, file: Path = FILE) -> None:
    """Take aliases off a tenant's list; requests that run go on."""
    from fedllm.serving.tenant_changes import change_access

    _say_access(name, change_access(file, name, deny=aliases))


@app.command("limit")
def limit_tenant(
    name: str = NAME,
    limits: list[str] = typer.Argument(..., help="LIMIT=NUMBER, or LIMIT=none, e.g. tokens_per_minute=60000."),
    file: Path = FILE,
) -> None:
    """Set or lift limits; they hold from the next request on."""
    from fedllm.serving.tenant_changes import set_limits

    tenant = set_limits(file, name, dict(_limit(text) for text in limits))
    say(f"limits of {name}: {_limits(tenant) or 'none'}")


@app.command("remove")
def remove(name: str = NAME, file: Path = FILE) -> None:
    """Take a tenant and its keys out of the file."""
    from fedllm.serving.tenant_changes import remove_tenant

    remove_tenant(file, name)
    say(f"tenant {name} is removed")


def _limit(text: str) -> tuple[str, int | None]:
    key, equals, value = text.partition("=")
    if not equals or not (value == "none" or (value.isascii() and value.isdigit())):
        raise ConfigError(f"{text!r} is no limit: LIMIT=NUMBER or LIMIT=none", hint="e.g. tokens_per_minute=60000")
    return key, None if value == "none" else int(value)


def _say_access(name: str, allow: tuple[str, ...]) -> None:
    say(f"tenant {name} may use {', '.join(allow) or 'nothing'}")


def _as_json(tenant: Tenant, now: float) -> dict[str, Any]:
    return {
        "name": tenant.name,
        "allow": list(tenant.allow),
        "weight": tenant.weight,
        "operator": tenant.operator,
        "router": tenant.router,
        "share_cache": tenant.share_cache,
        "log_prompts": tenant.log_prompts,
        "retention_days": tenant.retention_days,
        "limits": asdict(tenant.limits),
        "keys": [
            {
                "name": key.name,
                "state": key.state(now),
                "created": iso_utc(key.created),
                "expires": iso_utc(key.expires) if key.expires is not None else None,
                "revoked": iso_utc(key.revoked) if key.revoked is not None else None,
            }
            for key in tenant.keys
        ],
    }


def _row(tenant: Tenant, now: float) -> tuple[object, ...]:
    roles = [role for role in ("operator", "router") if getattr(tenant, role)]
    keys = ", ".join(f"{key.name} {_life(key, now)}" for key in tenant.keys)
    return tenant.name, ", ".join(tenant.allow), f"{tenant.weight:g}", ", ".join(roles), keys, _limits(tenant)


def _life(key: ApiKey, now: float) -> str:
    state = key.state(now)
    return f"valid until {iso_utc(key.expires)}" if state == "valid" and key.expires is not None else state


def _limits(tenant: Tenant) -> str:
    return ", ".join(f"{name}={value}" for name, value in asdict(tenant.limits).items() if value is not None)
