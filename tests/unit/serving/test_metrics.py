"""What is exposed parses, counts each request once, stays bounded, and shows a tenant nothing of another."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from fedllm.ids import sha256
from fedllm.serving import metrics
from fedllm.serving.engine import EngineStats
from fedllm.serving.metrics import IDLE_S, MOST_NAMES, OTHER, Counters
from fedllm.serving.records import RequestRecord
from fedllm.serving.tenants import Tenant

STATS = EngineStats(3, 2, 25, 100, 8, 4, 900, 5, 640, True)
V1, V2 = sha256(b"1"), sha256(b"2")
RECORD = RequestRecord(
    id="cmpl-1", tenant="acme", key="first", route="/v1/completions", alias="acme/tools", version=V1, status=200,
    prompt_tokens=30, completion_tokens=11, cached_tokens=16, started=1000.0, ttft_s=0.2, seconds=1.2,
)  # fmt: skip

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def series(text: str) -> Series:
    """Return every sample of an exposition, by name and labels."""
    found: Series = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found
            found[key] = sample.value
    return found


def value(text: str, name: str, **labels: str) -> float | None:
    """Return one sample, or None."""
    return series(text).get((name, tuple(sorted(labels.items()))))


def test_a_record_is_counted_by_tenant_by_version_and_by_alias() -> None:
    """Known answers of one request: counts, tokens, and the buckets that its times fall into."""
    counters = Counters()
    counters.observe(RECORD)
    text = counters.render(STATS)
    assert value(text, "fedllm_requests_total", tenant="acme", route="/v1/completions", status="200") == 1
    assert value(text, "fedllm_prompt_tokens_total", tenant="acme") == 30
    assert value(text, "fedllm_completion_tokens_total", tenant="acme") == 11
    assert value(text, "fedllm_cached_tokens_total", tenant="acme") == 16
    assert value(text, "fedllm_version_requests_total", version=V1[:8]) == 1
    assert value(text, "fedllm_version_errors_total", version=V1[:8]) == 0
    assert value(text, "fedllm_version_tokens_total", version=V1[:8], kind="completion") == 11
    assert value(text, "fedllm_ttft_seconds_sum", alias="acme/tools") == pytest.approx(0.2)
    assert value(text, "fedllm_ttft_seconds_bucket", alias="acme/tools", le="0.1") == 0
    assert value(text, "fedllm_ttft_seconds_bucket", alias="acme/tools", le="0.2") == 1
    assert value(text, "fedllm_token_gap_seconds_sum", alias="acme/tools") == pytest.approx(0.1)
    assert value(text, "fedllm_request_seconds_count", alias="acme/tools") == 1


def test_the_engine_is_told_with_types_and_use() -> None:
    """Steps count up, queues do not, and the share of the KV cache is computed."""
    text = Counters().render(STATS)
    assert value(text, "fedllm_engine_running") == 3
    assert value(text, "fedllm_engine_waiting") == 2
    assert value(text, "fedllm_engine_steps_total") == 900
    assert value(text, "fedllm_engine_kv_use_ratio") == 0.75
    assert "# TYPE fedllm_engine_steps_total counter" in text
    assert "# TYPE fedllm_engine_alive gauge" in text
    assert value(Counters().render(replace(STATS, total_blocks=0, free_blocks=0)), "fedllm_engine_kv_use_ratio") == 0


def test_a_router_has_no_engine() -> None:
    """Without a snapshot there are no gauges of an engine, and all else."""
    counters = Counters()
    counters.observe(replace(RECORD, retries=2))
    text = counters.render(None)
    assert "fedllm_engine" not in text
    assert value(text, "fedllm_retries_total") == 2


def test_errors_belong_to_the_version_from_500_on() -> None:
    """A client that left or asked wrongly says nothing about a version; before admission there is none."""
    counters = Counters()
    for status in (200, 400, 429, 499, 500, 503):
        counters.observe(replace(RECORD, status=status))
    counters.observe(replace(RECORD, status=500, version=None, ttft_s=None))
    text = counters.render(STATS)
    assert value(text, "fedllm_version_errors_total", version=V1[:8]) == 2
    assert value(text, "fedllm_version_requests_total", version=V1[:8]) == 6
    assert value(text, "fedllm_request_seconds_count", alias="acme/tools") == 6
    assert counters.value("fedllm_requests_total") == 7


def test_a_tenant_sees_its_own_counters_and_moves_of_its_aliases_only() -> None:
    """Histograms, versions, readings and the engine tell of others: none of them is there."""
    counters = Counters()
    counters.observe(RECORD)
    counters.observe(replace(RECORD, tenant="rival", alias="base", version=V2))
    counters.add("fedllm_alias_flips_total", alias="acme/tools")
    counters.add("fedllm_alias_flips_total", alias="rival/own")
    counters.follow("fedllm_backlog_tokens", lambda: 5.0)
    seen = series(counters.render(STATS, Tenant("acme", "0" * 64, ("acme/tools", "base"))))
    assert all(dict(labels).get("tenant", "acme") == "acme" for _, labels in seen)
    assert {name for name, _ in seen} == {
        "fedllm_requests_total", "fedllm_prompt_tokens_total", "fedllm_completion_tokens_total",
        "fedllm_cached_tokens_total", "fedllm_alias_flips_total",
    }  # fmt: skip
    assert ("fedllm_alias_flips_total", (("alias", "rival/own"),)) not in seen
    assert counters.render(STATS, Tenant("poor", "0" * 64)) == ""


def test_two_processes_worth_of_counters_share_nothing() -> None:
    """Each instance has a registry of its own."""
    first, second = Counters(), Counters()
    first.observe(RECORD)
    assert (first.value("fedllm_requests_total"), second.value("fedllm_requests_total")) == (1, 0)


@pytest.mark.parametrize(
    ("name", "labels"),
    [("fedllm_surprises_total", {}), ("fedllm_alias_flips_total", {}), ("fedllm_alias_flips_total", {"tenant": "a"})],
)
def test_only_documented_names_and_labels_are_counted(name: str, labels: dict[str, str]) -> None:
    """A slip of the pen in a name is found where it is made."""
    with pytest.raises(ValueError, match=r"label|documented"):
        Counters().add(name, **labels)
    with pytest.raises(ValueError, match="not a documented reading"):
        Counters().follow("fedllm_surprise", lambda: 1.0)


def test_readings_are_read_at_each_exposition() -> None:
    """With a label where they have one; those that only grow are counters."""
    counters, up = Counters(), {"east": 1.0, "west": 0.0}
    counters.follow("fedllm_replica_up", lambda: up)
    counters.follow("fedllm_spans_lost_total", lambda: 7)
    assert value(counters.render(None), "fedllm_replica_up", replica="west") == 0
    up["west"] = 1.0
    text = counters.render(None)
    assert value(text, "fedllm_replica_up", replica="west") == 1
    assert value(text, "fedllm_spans_lost_total") == 7
    assert "# TYPE fedllm_spans_lost_total counter" in text


def test_names_are_bounded_and_make_room_when_idle() -> None:
    """Thousands of adapters have so many series at a time; the excess is one; an hour later others have theirs."""
    counters = Counters()
    for number in range(3 * MOST_NAMES):
        counters.observe(replace(RECORD, alias=f"acme/a{number}", version=sha256(b"%d" % number)))
    seen = series(counters.render(None))
    aliases = {dict(labels)["alias"] for name, labels in seen if name == "fedllm_request_seconds_count"}
    versions = {dict(labels)["version"] for name, labels in seen if name == "fedllm_version_requests_total"}
    assert len(aliases) == len(versions) == MOST_NAMES + 1
    assert seen["fedllm_request_seconds_count", (("alias", OTHER),)] == 2 * MOST_NAMES
    counters.observe(replace(RECORD, alias="acme/late", started=1000.0 + IDLE_S + 60))
    late = series(counters.render(None))
    assert late["fedllm_request_seconds_count", (("alias", "acme/late"),)] == 1
    assert ("fedllm_request_seconds_count", (("alias", "acme/a0"),)) not in late
    assert counters.value("fedllm_requests_total") == 3 * MOST_NAMES + 1


def test_the_name_that_makes_room_is_the_one_longest_unused() -> None:
    """A name in use keeps its series, however long ago it was first seen."""
    counters, later = Counters(), RECORD.started + IDLE_S + 60
    for number in range(MOST_NAMES):
        counters.observe(replace(RECORD, alias=f"acme/a{number}"))
    for alias in ("acme/a0", "acme/late"):
        counters.observe(replace(RECORD, alias=alias, started=later))
    text = counters.render(None)
    assert value(text, "fedllm_request_seconds_count", alias="acme/a0") == 2
    assert value(text, "fedllm_request_seconds_count", alias="acme/late") == 1
    assert value(text, "fedllm_request_seconds_count", alias="acme/a1") is None


@given(st.text(max_size=20), st.text(max_size=20))
def test_any_name_is_escaped(tenant: str, alias: str) -> None:
    """Quotes, backslashes and line ends in a label are read back as they were."""
    counters = Counters()
    counters.observe(replace(RECORD, tenant=tenant, alias=alias))
    text = counters.render(STATS)
    assert value(text, "fedllm_prompt_tokens_total", tenant=tenant) == 30
    assert value(text, "fedllm_request_seconds_count", alias=alias) == 1


RECORDS = st.builds(
    RequestRecord, id=st.just(""), tenant=st.sampled_from(["", "a", "b"]), key=st.just(""), route=st.just("other"),
    alias=st.sampled_from(["", "base", "a/x"]), version=st.sampled_from([None, V1, V2]),
    status=st.sampled_from([200, 400, 499, 500]), prompt_tokens=st.integers(0, 9), completion_tokens=st.integers(0, 9),
    cached_tokens=st.integers(0, 9), started=st.just(1.0), ttft_s=st.none() | st.floats(0, 100),
    seconds=st.floats(0, 100),
)  # fmt: skip


@given(st.lists(RECORDS, max_size=30))
def test_counts_equal_a_naive_sum(records: list[RequestRecord]) -> None:
    """Whatever ends, by tenant and by version the sums are those of the records."""
    counters = Counters()
    for record in records:
        counters.observe(record)
    text = counters.render(None)
    for tenant in ("", "a", "b"):
        own = [r for r in records if r.tenant == tenant]
        assert (value(text, "fedllm_prompt_tokens_total", tenant=tenant) or 0) == sum(r.prompt_tokens for r in own)
    for version in (V1, V2):
        own = [r for r in records if r.version == version]
        found = value(text, "fedllm_version_tokens_total", version=version[:8], kind="completion") or 0
        assert found == sum(r.completion_tokens for r in own)
    for alias in ("", "base", "a/x"):
        bound = [r for r in records if r.alias == alias and r.version]
        assert (value(text, "fedllm_ttft_seconds_count", alias=alias) or 0) == sum(r.ttft_s is not None for r in bound)


def test_no_time_of_creation_is_exposed() -> None:
    """Every series that is there is one that is documented."""
    counters = Counters()
    counters.observe(RECORD)
    assert "_created" not in counters.render(STATS)
    documented = set(metrics._COUNTERS) | set(metrics._SECONDS)
    families = {f.name for f in text_string_to_metric_families(counters.render(None))}
    assert families == {name.removesuffix("_total") for name in documented}


def test_what_a_tenant_is_not_shown_is_not_even_read() -> None:
    """Tenants scrape as often as they like: no readings are made for them, and no histograms of all aliases."""
    counters, read = Counters(), []
    counters.observe(RECORD)
    counters.follow("fedllm_backlog_tokens", lambda: read.append(1) or 0.0)
    assert 'tenant="acme"' in counters.render(STATS, Tenant("acme"))
    assert read == []
    counters.render(STATS)
    assert read == [1]


def test_names_seen_in_a_future_that_was_none_make_room() -> None:
    """A machine that began with the wrong year: when its time is set back, new names still find room."""
    counters = Counters()
    for number in range(MOST_NAMES):
        counters.observe(replace(RECORD, alias=f"acme/a{number}", started=RECORD.started + 1e9))
    counters.observe(replace(RECORD, alias="acme/now"))
    assert value(counters.render(None), "fedllm_request_seconds_count", alias="acme/now") == 1
