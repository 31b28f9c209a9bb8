"""Prometheus metrics of an endpoint or a router (text format 0.0.4). Numbers and names only, never text of a request.

All that is told of a request is made from its one `RequestRecord`. Every name is in one of the tables below; labels
that a caller could make many of are bounded.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fedllm.serving.engine import EngineStats
from fedllm.serving.records import RequestRecord
from fedllm.serving.tenants import Tenant

_COUNTERS: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "fedllm_requests_total": ("Requests by tenant, route and HTTP status.", ("tenant", "route", "status")),
    "fedllm_prompt_tokens_total": ("Prompt tokens by tenant.", ("tenant",)),
    "fedllm_completion_tokens_total": ("Generated tokens by tenant.", ("tenant",)),
    "fedllm_cached_tokens_total": ("Prompt tokens that the prefix cache had, by tenant.", ("tenant",)),
    "fedllm_version_requests_total": ("Requests that a version answered, by the first 8 of its digest.", ("version",)),
    "fedllm_version_errors_total": ("Those of them that ended with a status from 500 on.", ("version",)),
    "fedllm_version_tokens_total": (
        "Tokens by version and kind: prompt, completion or cached (part of the prompt).",
        ("version", "kind"),
    ),
    "fedllm_retries_total": ("Replicas that failed a request before another answered it.", ()),
    "fedllm_alias_flips_total": ("Versions taken live, by alias.", ("alias",)),
    "fedllm_versions_refused_total": ("Versions refused at load, by alias.", ("alias",)),
    "fedllm_source_errors_total": ("Failed reads of the version source.", ()),
}
_SECONDS: Final[Mapping[str, tuple[str, tuple[float, ...]]]] = {
    "fedllm_ttft_seconds": (
        "Seconds from a request's arrival to its first token, by alias.",
        (0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0),
    ),
    "fedllm_token_gap_seconds": (
        "Mean seconds between two tokens of a request, one observation for each request, by alias.",
        (0.001, 0.0025, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5),
    ),
    "fedllm_request_seconds": (
        "Seconds from a request's arrival to its end, for requests that a version was bound to, by alias.",
        (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0),
    ),
}
_READINGS: Final[Mapping[str, tuple[str, str]]] = {
    "fedllm_wanted_replicas": ("Replicas that the scale signal asks for.", ""),
    "fedllm_replicas": ("Replicas that there are.", ""),
    "fedllm_backlog_tokens": ("Tokens of requests that have not been computed yet.", ""),
    "fedllm_router_waiting": ("Requests that wait in the router for a replica.", ""),
    "fedllm_replica_up": ("1 where a replica is healthy and its circuit closed, by replica.", "replica"),
    "fedllm_replica_in_flight": ("Requests in flight at a replica.", "replica"),
    "fedllm_replica_limit": ("Requests in flight that a replica may have, as adapted.", "replica"),
    "fedllm_tier_leases_total": ("Leases by where the version was found: slot, memory or fetched.", "tier"),
    "fedllm_spans_lost_total": ("Spans that did not reach the trace exporter.", ""),
}
_ENGINE: Final[Mapping[str, str]] = {
    "running": "Sequences in the batch of one step.",
    "waiting": "Requests queued in the engine.",
    "free_blocks": "Free blocks of the KV cache.",
    "total_blocks": "All blocks of the KV cache.",
    "slots": "Slots for adapters.",
    "slots_used": "Slots that hold a version.",
    "steps": "Steps of the engine.",
    "preemptions": "Sequences put back into the queue for want of blocks.",
    "prefix_hit_tokens": "Prompt tokens that the prefix cache had.",
    "alive": "1 while the step thread runs.",
}
_COUNTERS_OF_ENGINE = {"steps", "preemptions", "prefix_hit_tokens"}
_OF_AN_ALIAS = {"fedllm_alias_flips", "fedllm_versions_refused"}

OTHER = "other"
"""Value of a label whose own value has no room."""
MOST_NAMES = 128
"""Different aliases, and different versions, that have series of their own at a time."""
IDLE_S = 3600.0
"""Seconds without a request after which a name makes room for another."""


class Counters:
    """Counts, histograms and gauges of one process, in a registry of their own. A `RequestObserver`."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._counters = {
            name: Counter(name, text, labels, registry=self._registry) for name, (text, labels) in _COUNTERS.items()
        }
        self._seconds = {
            name: Histogram(name, text, ("alias",), buckets=buckets, registry=self._registry)
            for name, (text, buckets) in _SECONDS.items()
        }
        self._readings: dict[str, Callable[[], float | Mapping[str, float]]] = {}
        self._aliases = _Names(self._forget_alias)
        self._versions = _Names(self._forget_version)

    def add(self, name: str, value: int = 1, **labels: str) -> None:
        """Count.

        Raises
        ------
        ValueError
            If name or labels are not among those documented here.
        """
        if name not in self._counters:
            raise ValueError(f"{name} is not a documented counter")
        counter = self._counters[name]
        (counter.labels(**labels) if labels or _COUNTERS[name][1] else counter).inc(value)

    def value(self, name: str) -> int:
        """Return the sum over all labels that are shown now."""
        samples = (sample for metric in self._counters[name].collect() for sample in metric.samples)
        return int(sum(sample.value for sample in samples if sample.name == name))

    def tokens(self, tenant: str, *, prompt: int, completion: int = 0) -> None:
        """Count what was computed for a tenant."""
        self.add("fedllm_prompt_tokens_total", prompt, tenant=tenant)
        self.add("fedllm_completion_tokens_total", completion, tenant=tenant)

    def follow(self, name: str, read: Callable[[], float | Mapping[str, float]]) -> None:
        """Show what `read` returns at each exposition.

        Parameters
        ----------
        name : str
            One of the documented readings.
        read : Callable
            Returns the value, or the values by the reading's label.

        Raises
        ------
        ValueError
            If the name is not documented.
        """
        if name not in _READINGS:
            raise ValueError(f"{name} is not a documented reading")
        self._readings[name] = read

    def observe(self, record: RequestRecord) -> None:
        """Count one ended request."""
        self.add("fedllm_requests_total", tenant=record.tenant, route=record.route, status=str(record.status))
        kinds = {"prompt": record.prompt_tokens, "completion": record.completion_tokens, "cached": record.cached_tokens}
        for kind, count in kinds.items():
            if count:
                self.add(f"fedllm_{kind}_tokens_total", count, tenant=record.tenant)
        if record.retries:
            self.add("fedllm_retries_total", record.retries)
        if record.version is None:
            return
        ended = record.started + record.seconds
        version = self._versions.label(record.version[:8], ended)
        self.add("fedllm_version_requests_total", version=version)
        # Shown from the first request on: a rate over a series that begins at 1 misses the first error.
        self.add("fedllm_version_errors_total", int(record.status >= 500), version=version)
        for kind, count in kinds.items():
            self.add("fedllm_version_tokens_total", count, version=version, kind=kind)
        alias = self._aliases.label(record.alias, ended)
        taken = {
            "fedllm_ttft_seconds": record.ttft_s,
            "fedllm_token_gap_seconds": record.gap_s,
            "fedllm_request_seconds": record.seconds,
        }
        for name, seconds in taken.items():
            if seconds is not None:
                self._seconds[name].labels(alias).observe(seconds)

    def render(self, engine: EngineStats | None, tenant: Tenant | None = None) -> str:
        """Return one exposition.

        Parameters
        ----------
        engine : EngineStats or None
            The engine's gauges; a router has none.
        tenant : Tenant, optional
            Show only counters labelled with this tenant, and moves of aliases that it may use; everything by
            default. Histograms, gauges and counts by version tell of everybody's requests, so a tenant sees none.
        """
        families = self._families(engine) if tenant is None else self._families_of_tenants()
        return generate_latest(_View(families, tenant)).decode()

    def _families(self, engine: EngineStats | None) -> Iterator[Metric]:
        yield from self._registry.collect()
        for name, read in self._readings.items():
            text, label = _READINGS[name]
            found = read()
            values = found if isinstance(found, Mapping) else {"": found}
            yield _family(name, text, label, values)
        if engine is not None:
            yield from _engine_families(engine)

    def _families_of_tenants(self) -> Iterator[Metric]:
        # A tenant may ask as often as it likes: what it is not shown is not even collected.
        for name, (_, labels) in _COUNTERS.items():
            if "tenant" in labels or name.removesuffix("_total") in _OF_AN_ALIAS:
                yield from self._counters[name].collect()

    def _forget_alias(self, alias: str) -> None:
        for histogram in self._seconds.values():
            histogram.remove(alias)

    def _forget_version(self, version: str) -> None:
        for name, (_, labels) in _COUNTERS.items():
            if "version" in labels:
                self._counters[name].remove_by_labels({"version": version})


class _Names:
    """Values of one label, `MOST_NAMES` at a time: what finds no room is ``other`` until a name has been idle."""

    def __init__(self, forget: Callable[[str], None]) -> None:
        self._forget = forget
        self._last: OrderedDict[str, float] = OrderedDict()

    def label(self, name: str, now: float) -> str:
        """Return what stands for `name` at a time, seconds."""
        if name not in self._last and len(self._last) >= MOST_NAMES:
            oldest, seen = next(iter(self._last.items()))
            if abs(now - seen) < IDLE_S:  # further ahead than that, it was seen before the machine's time was set back
                return OTHER
            del self._last[oldest]
            self._forget(oldest)
        self._last[name] = now
        self._last.move_to_end(name)
        return name


class _View(Collector):
    """What one reader sees of some families, without the client library's times of creation."""

    def __init__(self, families: Iterator[Metric], tenant: Tenant | None) -> None:
        self._families = families
        self._tenant = tenant

    def collect(self) -> Iterator[Metric]:
        """Yield families that are not empty for a tenant; all of them for an operator."""
        for family in self._families:
            seen = Metric(family.name, family.documentation, family.type)
            seen.samples = [
                s for s in family.samples if not s.name.endswith("_created") and self._shows(family, s.labels)
            ]
            if seen.samples or self._tenant is None:
                yield seen

    def _shows(self, family: Metric, labels: Mapping[str, str]) -> bool:
        if self._tenant is None:
            return True
        if family.name in _OF_AN_ALIAS:
            return self._tenant.may_use(labels["alias"])
        return labels.get("tenant") == self._tenant.name


def _family(name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
    kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
    family = kind(name, text, labels=(label,) if label else ())
    for key, value in values.items():
        family.add_metric((key,) if label else (), value)
    return family


def _engine_families(engine: EngineStats) -> Iterator[Metric]:
    """Yield one family for each number of the snapshot, and the share of the KV cache that is in use."""
    for field, value in asdict(engine).items():
        if isinstance(value, int | float):
            name = f"fedllm_engine_{field}" + ("_total" if field in _COUNTERS_OF_ENGINE else "")
            yield _family(name, _ENGINE.get(field, "As the engine counts it."), "", {"": float(value)})
    used = 1 - engine.free_blocks / engine.total_blocks if engine.total_blocks else 0.0
    yield _family("fedllm_engine_kv_use_ratio", "Share of the KV cache's blocks that is in use.", "", {"": used})
