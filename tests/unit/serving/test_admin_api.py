"""The admin listener: operators only, whatever the path; bad parameters named; exact pages; replicas in and out."""

from __future__ import annotations

import asyncio
import csv
import io
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from fedllm.clock import FakeClock
from fedllm.errors import AuthenticationError, NotFound, NotReady, Overloaded
from fedllm.serving.admin_api import MAX_PAGE, AdminState, create_admin_app
from fedllm.serving.records import RequestRecord
from fedllm.serving.tenants import Tenant
from fedllm.serving.usage import UsageStore, open_usage

NOW = 1_795_262_400.0  # 2026-11-21T12:00:00Z
ROUTES = [
    ("GET", "/health"), ("GET", "/metrics"), ("GET", "/usage"), ("GET", "/usage.csv"), ("GET", "/usage/totals"),
    ("GET", "/autoscale"), ("GET", "/tenants"), ("GET", "/replicas"),
    ("POST", "/replicas/r1/drain"), ("POST", "/replicas/r1/resume"),
]  # fmt: skip
Ask = Callable[..., httpx.Response]


def authenticate(headers: Mapping[str, str]) -> Tenant:
    """Know two keys: ``ops`` of an operator, ``acme`` of a tenant."""
    key = headers.get("authorization", "").removeprefix("Bearer ")
    if key == "broken":
        raise RuntimeError("secret text")
    if key == "hasty":
        raise Overloaded("too many wrong keys", retry_after_s=7)
    if key not in {"ops", "acme"}:
        raise AuthenticationError("the API key is missing or not known here", hint="fedllm tenant add prints one")
    return Tenant(key, operator=key == "ops")


def filled(path: Path) -> UsageStore:
    """Return a store with 25 requests of two tenants."""

    async def fill() -> None:
        usage = open_usage(str(path), FakeClock(NOW))
        for n in range(25):
            tenant = "rival" if n % 5 == 0 else "acme"
            usage.observe(
                RequestRecord(f"id-{n}", tenant, "=k", "/v1/x", "acme/tools", None, 200, 2, 1, 0, NOW + n, 0.1, 1.0)
            )
        await usage.close()

    asyncio.run(fill())
    return open_usage(str(path), FakeClock(NOW), reading=True)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UsageStore]:
    """Return a filled store."""
    usage = filled(tmp_path_factory.mktemp("usage") / "usage.db")
    yield usage
    asyncio.run(usage.close())


@pytest.fixture
def world(store: UsageStore) -> SimpleNamespace:
    """Return the listener's state, and what was done to replicas."""
    calls: list[tuple[str, str]] = []

    async def drain(name: str) -> None:
        if name != "r1":
            raise NotFound(f"there is no replica {name!r}")
        calls.append(("drain", name))

    async def resume(name: str) -> None:
        calls.append(("resume", name))

    state = AdminState(
        authenticate, lambda: "# TYPE x counter\nx 1\n", store, lambda: {"replicas_wanted": 2},
        lambda: [{"name": "acme"}], lambda: [{"name": "r1", "state": "serving"}], drain, resume,
    )  # fmt: skip
    return SimpleNamespace(calls=calls, state=state)


def asking(state: AdminState) -> Ask:
    """Return a function that asks the listener, as an operator unless told otherwise."""

    def ask(method: str, path: str, key: str | None = "ops") -> httpx.Response:
        async def once() -> httpx.Response:
            transport = httpx.ASGITransport(create_admin_app(state))
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            async with httpx.AsyncClient(transport=transport, base_url="http://admin") as client:
                return await client.request(method, path, headers=headers)

        return asyncio.run(once())

    return ask


@pytest.fixture
def ask(world: SimpleNamespace) -> Ask:
    """Ask the whole listener."""
    return asking(world.state)


def refused(answer: httpx.Response, status: int, *words: str) -> None:
    """Check OpenAI's error shape, and what the message says."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    for word in words:
        assert word in error["message"], error


def test_the_table_has_every_route(world: SimpleNamespace) -> None:
    """A route that is not in the table of these tests fails here."""
    app: Any = create_admin_app(world.state)
    there = {(m, r.path.replace("{name}", "r1")) for r in app.routes for m in r.methods}
    assert there == set(ROUTES)


@pytest.mark.parametrize(
    ("method", "path"), [*ROUTES, ("GET", "/nowhere"), ("DELETE", "/usage"), ("GET", "/openapi.json")]
)
def test_nobody_but_an_operator_passes(world: SimpleNamespace, ask: Ask, method: str, path: str) -> None:
    """No key and a wrong one: 401; a tenant's: 403; and a stranger cannot tell whether a path exists."""
    for key in (None, "", "wrong"):
        refused(ask(method, path, key), 401, "API key")
    refused(ask(method, path, "acme"), 403, "no operator's")
    assert world.calls == []


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_an_operator_passes(ask: Ask, method: str, path: str) -> None:
    """Every route of the table answers."""
    assert ask(method, path).status_code == 200


def test_unknown_paths_and_methods_have_the_same_shape(ask: Ask) -> None:
    """404 and 405, as the OpenAI face has them."""
    refused(ask("GET", "/nowhere"), 404, "no such path")
    answer = ask("DELETE", "/usage")
    refused(answer, 405, "another method")
    assert answer.headers["allow"] == "GET"


BAD = [
    ("/usage?limit=0", "limit"), (f"/usage?limit={MAX_PAGE + 1}", "limit"), ("/usage?limit=ten", "limit"),
    ("/usage?limit=%C2%B2", "limit"), ("/usage?limit=" + "9" * 5000, "limit"), ("/usage?limit=", "limit"),
    ("/usage?after=-1", "after"), (f"/usage?after={1 << 63}", "after"), ("/usage?since=yesterday", "since"),
    ("/usage?until=2026-13-01", "until"), ("/usage?tenant=../x", "tenant"), ("/usage?tenant=a%00", "tenant"),
    ("/usage?tenant=acme&tenant=rival", "tenant"), ("/usage?tennant=acme", "tennant"), ("/usage.csv?limit=5", "limit"),
    ("/usage.csv?since=x", "since"), ("/usage/totals?by=prompt", "by"), ("/usage/totals?by=", "by"),
    ("/usage/totals?by=day,day", "by"), ("/usage/totals?until=x", "until"), ("/autoscale?x=1", "x"),
    ("/tenants?key=1", "key"), ("/replicas?drain=1", "drain"), ("/health?verbose", "verbose"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "name"), BAD)
def test_bad_parameters_are_400_and_named(ask: Ask, path: str, name: str) -> None:
    """Unknown, repeated, malformed or out of bounds: the message names the parameter."""
    refused(ask("GET", path), 400, name)


def test_pages_lead_to_the_end(ask: Ask) -> None:
    """Following ``next`` gives every row once, in order; the last page has none."""
    seen, path = [], "/usage?limit=10"
    while True:
        body = ask("GET", path).json()
        seen += [row["id"] for row in body["data"]]
        if body["next"] is None:
            break
        assert len(body["data"]) == 10
        path = f"/usage?limit=10&after={body['next']}"
    assert seen == [f"id-{n}" for n in range(25)]
    exact = ask("GET", "/usage?limit=25").json()
    assert (len(exact["data"]), exact["next"]) == (25, None)


def test_bounds_and_tenant_filter(ask: Ask) -> None:
    """From and including `since`, up to and without `until`; UTC."""
    path = "/usage?since=2026-11-21T12:00:05Z&until=2026-11-21T12:00:10&tenant=rival"
    assert [row["id"] for row in ask("GET", path).json()["data"]] == ["id-5"]


def test_totals_by_what_is_asked(ask: Ask) -> None:
    """Sums by tenant unless said otherwise, by several in their order."""
    assert [(t["tenant"], t["requests"], t["prompt_tokens"]) for t in ask("GET", "/usage/totals").json()["data"]] == [
        ("acme", 20, 40), ("rival", 5, 10),
    ]  # fmt: skip
    body = ask("GET", "/usage/totals?by=day,tenant&tenant=acme").json()
    assert body["by"] == ["day", "tenant"]
    assert body["data"] == [
        {"day": "2026-11-21", "tenant": "acme", "requests": 20, "prompt_tokens": 40, "completion_tokens": 20,
         "cached_tokens": 0},
    ]  # fmt: skip


def test_csv_is_a_download_without_formulas(ask: Ask) -> None:
    """All rows, a file name, the key's name quoted."""
    answer = ask("GET", "/usage.csv")
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    assert "attachment" in answer.headers["content-disposition"]
    rows = list(csv.DictReader(io.StringIO(answer.text, newline="")))
    assert [row["id"] for row in rows] == [f"id-{n}" for n in range(25)]
    assert {row["key"] for row in rows} == {"'=k"}


def test_what_is_shown_is_what_the_state_says(ask: Ask) -> None:
    """Metrics in Prometheus' type, the rest as JSON that nobody caches."""
    metrics = ask("GET", "/metrics?name[]=x")
    assert (metrics.text, metrics.headers["content-type"][:25]) == (
        "# TYPE x counter\nx 1\n",
        "text/plain; version=0.0.4",
    )
    for path, body in {
        "/health": {"status": "ok"},
        "/autoscale": {"replicas_wanted": 2},
        "/tenants": {"data": [{"name": "acme"}]},
        "/replicas": {"data": [{"name": "r1", "state": "serving"}]},
    }.items():
        answer = ask("GET", path)
        assert answer.json() == body
        assert answer.headers["cache-control"] == "no-store"


def test_replicas_go_and_come(world: SimpleNamespace, ask: Ask) -> None:
    """By name; an unknown one is a 404 that says so; a GET does nothing."""
    assert ask("POST", "/replicas/r1/drain").json() == {"name": "r1", "state": "draining"}
    assert ask("POST", "/replicas/r1/resume").json() == {"name": "r1", "state": "serving"}
    assert world.calls == [("drain", "r1"), ("resume", "r1")]
    answer = ask("POST", "/replicas/r9/drain")
    refused(answer, 404, "r9")
    assert answer.json()["error"]["code"] == "not-found"
    refused(ask("GET", "/replicas/r1/drain"), 405)
    assert len(world.calls) == 2


def test_an_endpoint_without_usage_and_replicas_says_so() -> None:
    """What is not kept here is a 404 with a hint, for an operator only."""
    bare = asking(AdminState(authenticate, lambda: "", None, dict, list, None, None))
    for method, path in ROUTES:
        if path.startswith(("/usage", "/replicas")):
            refused(bare(method, path), 404, "(")
            refused(bare(method, path, "acme"), 403)


def test_failures_are_answered_without_their_text(world: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    """What is not ready is a 503, who must wait hears how long, what nobody foresaw is a 500 and a log line."""

    def broken() -> dict[str, Any]:
        raise RuntimeError("secret text")

    def starting() -> list[dict[str, Any]]:
        raise NotReady("no replica is known yet")

    state = AdminState(authenticate, lambda: "", world.state.usage, broken, starting, None, None)
    ask = asking(state)
    refused(ask("GET", "/tenants"), 503, "no replica")
    hasty = ask("GET", "/health", "hasty")
    refused(hasty, 429, "too many")
    assert hasty.headers["retry-after"] == "7"
    with caplog.at_level(logging.ERROR, "fedllm.serving.admin"):
        for answer in (ask("GET", "/autoscale"), ask("GET", "/health", "broken")):
            refused(answer, 500)
            assert "secret" not in answer.text
    assert [r.getMessage() for r in caplog.records] == ["admin request failed"] * 2
    assert "secret" not in caplog.text


def test_a_store_that_cannot_be_read_is_a_503(world: SimpleNamespace, tmp_path: Path) -> None:
    """Also for CSV: the status is known before the first line is sent."""
    ask = asking(replace(world.state, usage=filled(tmp_path / "usage.db")))
    assert ask("GET", "/usage").status_code == 200
    ask_again = asking(replace(world.state, usage=filled(tmp_path / "other.db")))
    (tmp_path / "other.db").write_bytes(b"not a database " * 1000)
    for path in ("/usage", "/usage.csv", "/usage/totals"):
        refused(ask_again("GET", path), 503, "cannot be read")
