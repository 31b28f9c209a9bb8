"""Dashboard, alerts and scaler name only what is exported, by labels that it has."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fedllm.clock import FakeClock
from fedllm.ids import sha256
from fedllm.serving.autoscale import Autoscaler, Bounds, Demand, autoscale_body
from fedllm.serving.engine import EngineStats
from fedllm.serving.metrics import _READINGS, Counters
from fedllm.serving.records import RequestRecord

DEPLOY = Path(__file__).parents[3] / "deploy"
FUNCTIONS = {"histogram_quantile", "sum", "max", "min", "rate", "increase", "by"}
TARGET_LABELS = {"job", "instance"}
TOKEN = re.compile(
    r'\s+|(?P<text>"(?:[^"\\]|\\.)*")|(?P<range>\[(?:\d+[smhd]|\$__rate_interval)\])|(?P<number>\d+(?:\.\d+)?)'
    r"|(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)|(?P<mark>=~|!~|!=|==|>=|<=|[-+*/(){},=<>])"
)


def exported() -> dict[str, set[str]]:
    """Return the labels of every sample that a process can expose, by name."""
    counters = Counters()
    record = RequestRecord("", "t", "", "r", "a", sha256(b"v"), 500, 1, 2, 1, 0.0, 0.1, 1.0)
    counters.observe(record)
    for name in ("fedllm_alias_flips_total", "fedllm_versions_refused_total"):
        counters.add(name, alias="a")
    for name, (_, label) in _READINGS.items():
        counters.follow(name, (lambda: {"x": 1.0}) if label else (lambda: 1.0))
    text = counters.render(EngineStats(1, 1, 1, 1, 1, 1, 1, 1, 1, True))
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def expressions() -> dict[str, str]:
    """Return every PromQL expression of the dashboard and the alerts, by where it stands."""
    board = json.loads((DEPLOY / "grafana" / "fedllm.json").read_text())
    found = {f"{p['title']} {t['refId']}": t["expr"] for p in board["panels"] for t in p["targets"]}
    found |= {f"annotation {a['name']}": a["expr"] for a in board["annotations"]["list"]}
    rules = (DEPLOY / "prometheus" / "rules.yml").read_text()
    alerts = re.findall(r"alert: (\w+)\n +expr: (?:>-\n)?(.*?)\n +(?:for|annotations):", rules, re.DOTALL)
    assert len(alerts) == rules.count("alert:")
    return found | dict(alerts)


def names_in(expression: str) -> tuple[set[str], set[str]]:
    """Return the metrics and the labels that an expression names; fail where it is not PromQL that is known here."""
    tokens: list[tuple[str, str]] = []
    at = 0
    while at < len(expression):
        match = TOKEN.match(expression, at)
        assert match, f"{expression[at:]!r} is not understood"
        at = match.end()
        if match.lastgroup:
            tokens.append((match.lastgroup, match.group()))
    counts = Counter(value for kind, value in tokens if kind == "mark")
    assert counts["("] == counts[")"]
    assert counts["{"] == counts["}"]
    metrics, labels, inside = set(), set(), ""
    for number, (kind, value) in enumerate(tokens):
        if value == "{" or (value == "(" and tokens[number - 1][1] == "by"):
            inside = value
        elif value in "})":
            inside = ""
        elif kind == "name" and inside:
            labels.add(value)
        elif kind == "name" and value not in FUNCTIONS:
            metrics.add(value)
    return metrics, labels


@pytest.mark.parametrize(("where", "expression"), expressions().items(), ids=list(expressions()))
def test_an_expression_names_only_what_is_exported(where: str, expression: str) -> None:
    """Every metric is one that we expose, and every label one of its own or of the scraped target."""
    known = exported()
    metrics, labels = names_in(expression)
    assert metrics, where
    assert metrics <= set(known)
    assert labels - TARGET_LABELS <= set().union(*(known[name] for name in metrics))


def test_the_check_finds_a_slip() -> None:
    """A name that is not exported, a label that no metric has, and what is no PromQL are told apart."""
    assert names_in('sum by (le) (rate(a_b{job="x, {c}"}[5m])) / c > 0.5') == ({"a_b", "c"}, {"le", "job"})
    with pytest.raises(AssertionError):
        names_in("sum(a")
    with pytest.raises(AssertionError):
        names_in("a ? b")


def test_what_an_operator_asks_for_is_on_the_dashboard() -> None:
    """Each of the questions has a panel, and no two panels lie on one another."""
    board = json.loads((DEPLOY / "grafana" / "fedllm.json").read_text())
    shown = "".join(target["expr"] for panel in board["panels"] for target in panel["targets"])
    for name in (
        "ttft_seconds_bucket", "token_gap_seconds_bucket", "engine_running", "engine_waiting", "engine_slots_used",
        "completion_tokens_total", "version_tokens_total", "version_errors_total", "engine_kv_use_ratio",
        "alias_flips_total", "tier_leases_total", "wanted_replicas",
    ):  # fmt: skip
        assert f"fedllm_{name}" in shown
    quantiles = [t["expr"].split(",")[0] for t in board["panels"][0]["targets"]]
    assert quantiles == [f"histogram_quantile({q}" for q in ("0.5", "0.9", "0.99")]
    cells = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in board["panels"]]
    assert len(set(cells)) == len(cells)
    assert len({p["id"] for p in board["panels"]}) == len(cells)


def test_the_scaler_reads_what_is_answered() -> None:
    """The value's path in KEDA's trigger is a number of the body."""
    scaler = Autoscaler(FakeClock(), Bounds(), objective_s=1.0)
    body: dict[str, Any] = autoscale_body(scaler, Demand(0, 0, 0, 1, None))
    (path,) = re.findall(r"valueLocation: (\S+)", (DEPLOY / "keda" / "scaledobject.yml").read_text())
    assert isinstance(body[path], int)
