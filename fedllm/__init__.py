"""fedllm: fine-tune a shared LoRA adapter across owners who cannot share data, and serve every version live.

The names below are the public Python API; each is imported when it is first used, so ``import fedllm`` loads
neither torch nor flwr. Everything else is private and may change.

* embed the daemon with your own trainer: `Daemon`, `OwnerPolicy`, `Trainer`, `Ledger`
* add a method, a gate or an engine: `Method`, `Gate`, `Engine`
* read what a federation publishes: `AdapterSpec`, `AdapterState`, `Manifest`, `HttpVersionSource`
* start a process from Python: `run_coordinator`, `run_client`, `run_endpoint`
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import Any

_PUBLIC = {
    "AdapterSpec": "fedllm.adapter:AdapterSpec",
    "AdapterState": "fedllm.adapter:AdapterState",
    "ClientSettings": "fedllm.config:ClientSettings",
    "CoordinatorSettings": "fedllm.config:CoordinatorSettings",
    "Daemon": "fedllm.client.daemon:Daemon",
    "Engine": "fedllm.serving.engine:Engine",
    "FederationSettings": "fedllm.config:FederationSettings",
    "FedllmError": "fedllm.errors:FedllmError",
    "Gate": "fedllm.server.ports:Gate",
    "HttpVersionSource": "fedllm.registry.remote:HttpVersionSource",
    "Ledger": "fedllm.privacy.ledger:Ledger",
    "Manifest": "fedllm.registry.model:Manifest",
    "Method": "fedllm.aggregation.methods.base:Method",
    "OwnerPolicy": "fedllm.client.policy:OwnerPolicy",
    "RoundPlan": "fedllm.messages.plan:RoundPlan",
    "ServeSettings": "fedllm.config:ServeSettings",
    "Trainer": "fedllm.client.trainer:Trainer",
    "run_client": "fedllm.client.app:run",
    "run_coordinator": "fedllm.server.app:run",
    "run_endpoint": "fedllm.serving.app:run",
}

__all__ = sorted([*_PUBLIC, "__version__"])  # noqa: PLE0605 - the table above is the one list


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name == "__version__":
        return metadata.version("fedllm")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fedllm' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
