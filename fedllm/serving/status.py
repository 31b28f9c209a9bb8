"""What the endpoint says of itself, to anyone, to a tenant and to an operator, as plain data. No web framework."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fedllm.serving.engine import Engine
from fedllm.serving.tenants import BASE_ACCESS, Tenant
from fedllm.serving.versions import Versions
from fedllm.serving.watch import AliasWatcher


def model_rows(engine: Engine, versions: Versions, tenant: Tenant) -> list[dict[str, Any]]:
    """Return OpenAI's model objects for what a tenant may use."""
    rows: list[dict[str, Any]] = []
    if tenant.may_use(BASE_ACCESS):
        digest = engine.base_digest
        rows.append({"id": versions.base_name, "created": 0, "parent": None, "version": None, "digest": digest})
    for alias, version in sorted(versions.visible(tenant).items()):
        rows.append(
            {
                "id": alias,
                "created": int(version.manifest.created),
                "parent": versions.base_name,
                "version": version.name,
                "digest": version.digest,
            }
        )
    return [{"object": "model", "owned_by": "fedllm", **row} for row in rows]


def health_body(engine: Engine, versions: Versions, watcher: AliasWatcher, tenant: Tenant | None) -> dict[str, Any]:
    """Return liveness for anyone, what is served and refused for a tenant, and all counters for an operator.

    Counters of the engine and the tiers move with everybody's requests: from cached prompt tokens one tenant could
    learn what another has asked.
    """
    stats = engine.stats()
    status = ("ok" if watcher.synced.is_set() else "starting") if stats.alive else "failed"
    body: dict[str, Any] = {"status": status, "base": versions.base_name, "epoch": versions.served.epoch}
    if tenant is None:
        return body
    visible = versions.visible(tenant)
    body |= {
        "aliases": {alias: {"version": v.name, "digest": v.digest} for alias, v in visible.items()},
        "refused": {alias: asdict(r) for alias, r in watcher.refused.items() if tenant.may_use(alias)},
        "source_error": watcher.source_error,
    }
    if tenant.operator:
        body |= {"engine": asdict(stats), "tiers": asdict(versions.tiers.hits)}
    return body
