"""What a router says of itself, to anyone, to a tenant and to an operator, as plain data. No web framework."""

from __future__ import annotations

from typing import Any

from fedllm.serving.router.reply import Router
from fedllm.serving.tenants import Tenant


def health_body(router: Router, tenant: Tenant | None) -> dict[str, Any]:
    """Return liveness for anyone, what is served for a tenant, and the replicas for an operator.

    The status is ``starting`` until the aliases are known, then ``ok``, and ``failed`` while no replica is healthy.
    """
    models, follower = router.models, router.follower
    able = any(replica.healthy and not replica.draining for replica in router.fleet.replicas.values())
    status = "starting" if not follower.synced.is_set() else "ok" if able else "failed"
    body: dict[str, Any] = {"status": status, "base": models.base_name, "epoch": models.epoch}
    if tenant is None:
        return body
    body |= {
        "aliases": {
            alias: {"version": version.name, "digest": version.digest}
            for alias, version in models.served.items()
            if tenant.may_use(alias)
        },
        "held_back": {alias: name for alias, name in models.held_back.items() if tenant.may_use(alias)},
        "source_error": follower.source_error,
    }
    if tenant.operator:
        body |= {"replicas": router.fleet.rows(), "waiting": len(router.dispatcher.line)}
    return body
