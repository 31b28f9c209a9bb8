"""Counters in Prometheus' text format (version 0.0.4). Numbers and names only, never text of a request."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict

from fedllm.serving.engine import EngineStats
from fedllm.serving.tenants import Tenant

_HELP = {
    "fedllm_requests_total": "Requests by tenant, route and HTTP status.",
    "fedllm_prompt_tokens_total": "Prompt tokens by tenant.",
    "fedllm_completion_tokens_total": "Generated tokens by tenant.",
    "fedllm_alias_flips_total": "Versions taken live, by alias.",
    "fedllm_versions_refused_total": "Versions refused at load, by alias.",
    "fedllm_source_errors_total": "Failed reads of the version source.",
}
_COUNTERS_OF_ENGINE = {"steps", "preemptions", "prefix_hit_tokens"}

Labels = tuple[tuple[str, str], ...]


class Counters:
    """Monotonic counts by name and labels."""

    def __init__(self) -> None:
        self._values: defaultdict[str, defaultdict[Labels, int]] = defaultdict(lambda: defaultdict(int))

    def add(self, name: str, value: int = 1, **labels: str) -> None:
        """Count; the name must be one of those documented here."""
        if name not in _HELP:
            raise ValueError(f"{name} is not a documented counter")
        self._values[name][tuple(sorted(labels.items()))] += value

    def value(self, name: str) -> int:
        """Return the sum over all labels."""
        return sum(self._values[name].values())

    def tokens(self, tenant: str, *, prompt: int, completion: int = 0) -> None:
        """Count what was computed for a tenant."""
        self.add("fedllm_prompt_tokens_total", prompt, tenant=tenant)
        self.add("fedllm_completion_tokens_total", completion, tenant=tenant)

    def render(self, engine: EngineStats, tenant: Tenant | None = None) -> str:
        """Return one exposition.

        Parameters
        ----------
        engine : EngineStats
            The engine's gauges; they tell of everybody's requests, so only a whole exposition has them.
        tenant : Tenant, optional
            Show only what is labelled with this tenant or an alias that it may use; everything by default.
        """
        lines: list[str] = []
        for name, help_text in _HELP.items():
            lines += [f"# HELP {name} {help_text}", f"# TYPE {name} counter"]
            lines += [
                f"{name}{_labels(labels)} {count}"
                for labels, count in self._values[name].items()
                if tenant is None or _concerns(dict(labels), tenant)
            ]
        if tenant is not None:
            return "\n".join(lines) + "\n"
        for field, value in asdict(engine).items():
            counter = field in _COUNTERS_OF_ENGINE
            name = f"fedllm_engine_{field}" + ("_total" if counter else "")
            lines += [f"# TYPE {name} {'counter' if counter else 'gauge'}", f"{name} {int(value)}"]
        return "\n".join(lines) + "\n"


def _concerns(labels: Mapping[str, str], tenant: Tenant) -> bool:
    return labels.get("tenant") == tenant.name or tenant.may_use(labels.get("alias", ""))


def _labels(labels: Labels | Mapping[str, str]) -> str:
    pairs = dict(labels)
    if not pairs:
        return ""
    escaped = {k: v.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") for k, v in pairs.items()}
    return "{" + ",".join(f'{k}="{v}"' for k, v in escaped.items()) + "}"
