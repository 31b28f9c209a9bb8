"""Reports of endpoints: read strictly, added up once, shown as unverified, and able to move nothing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.adapter import AdapterSpec, AdapterState
from fedllm.clock import FakeClock
from fedllm.errors import NotFound, RequestInvalid
from fedllm.identity import SigningIdentity
from fedllm.ids import AliasName, Digest
from fedllm.messages.plan import Recipe
from fedllm.registry.model import AdapterVersion, PrivacyRecord
from fedllm.registry.observed import (
    MAX_OBSERVATIONS,
    TTFT_BOUNDS_S,
    Observation,
    Report,
    ttft_bucket,
    ttft_quantile,
)
from fedllm.registry.store import Registry, VersionDraft
from fedllm.rng import SeededRng
from fedllm.server.api import ApiState, make_api
from fedllm.server.journal import Journal
from fedllm.server.observations import MAX_BODY_BYTES, read_report
from fedllm.server.schedule import Schedule

KEY = SigningIdentity.from_seed(b"\x01" * 32)
SPEC = AdapterSpec(Digest("ab" * 32), 2, 4, {"q_proj": (6, 4)}, (0, 1))
ALIAS = AliasName("acme/tools")
OPERATOR = {"Authorization": "Bearer of-the-operator"}
OBSERVER = {"Authorization": "Bearer of-the-observer"}
VERSION = Digest("cd" * 32)


def seen(version: Digest = VERSION, **changed: Any) -> Observation:
    """Return what an endpoint may have seen in half a minute: ten requests, one of them failed, eight answered."""
    ttft = [0] * (len(TTFT_BOUNDS_S) + 1)
    ttft[ttft_bucket(0.12)] = 8
    made = Observation(version, ALIAS, 100.0, 130.0, 10, 1, 1, tuple(ttft), 500, 80, 3, 1)
    return replace(made, **changed)


def report(*observations: Observation, sequence: int = 1, run: str = "0" * 16, endpoint: str = "north") -> Report:
    """Return a report."""
    return Report(endpoint, run, sequence, observations or (seen(),))


def body(**changed: Any) -> dict[str, Any]:
    """Return a good report's body with one observation changed."""
    made: dict[str, Any] = json.loads(json.dumps(report().to_json()))
    made["observations"][0] |= changed
    return made


def add_version(registry: Registry, number: int) -> AdapterVersion:
    """Add some version."""
    draft = VersionDraft(
        federation="tools", base_name="base", parent=None, round=number, method="ffa",
        recipe=Recipe("sgd", 1.0, 2, 8, 8, 160), metrics={},
        privacy=PrivacyRecord("record", "add-or-remove-one", None, 1e-5, "all", "advisory"),
        cohort_size=4, survivors=3, plan=VERSION,
    )  # fmt: skip
    return registry.add(AdapterState.initial(SPEC, SeededRng(number)), draft, KEY)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Return an empty registry."""
    return Registry(tmp_path / "registry", KEY.public, FakeClock())


def with_api(tmp_path: Path, registry: Registry, test: Callable[[httpx.AsyncClient], Awaitable[None]]) -> None:
    """Run a test against the API of a coordinator without any federation."""

    async def scenario() -> None:
        journal = Journal(tmp_path / "journal.sqlite")
        schedule = Schedule({}, journal, FakeClock())
        tokens = ("of-the-operator", asyncio.Event(), "of-the-observer")
        transport = httpx.ASGITransport(make_api(ApiState(registry, journal, schedule, KEY, *tokens)))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            await test(client)

    asyncio.run(scenario())


def test_a_report_is_read_as_it_was_written() -> None:
    """Reading is the inverse of writing."""
    made = report(seen(), seen(Digest("ef" * 32), up=-1, down=2), sequence=7)
    assert read_report(json.dumps(made.to_json()).encode()) == made


@pytest.mark.parametrize(
    ("changed", "where"),
    [
        ({"text": "hello"}, "observations.0: unexpected_keyword"),
        ({"tenant": "acme"}, "unexpected_keyword"),
        ({"requests": True}, "requests"),
        ({"requests": 1.5}, "requests"),
        ({"requests": "10"}, "requests"),
        ({"requests": -1}, "requests is -1"),
        ({"requests": 10**13}, "requests"),
        ({"errors_4xx": 10}, "errors is 11: 0 to 10"),
        ({"prompt_tokens": -1}, "prompt_tokens is -1"),
        ({"version": "CD" * 32}, "version is not a SHA-256 digest"),
        ({"alias": "acme"}, "alias"),
        ({"alias": "acme/Tools"}, "alias name"),
        ({"start": 131.0}, "start first"),
        ({"start": None}, "start"),
        ({"ttft": [0] * 3}, "ttft has 3 counts"),
        ({"ttft": [11] + [0] * len(TTFT_BOUNDS_S)}, "sum of ttft is 11: 0 to 10"),
        ({"ttft": [-1] + [0] * len(TTFT_BOUNDS_S)}, "ttft is -1"),
        ({"up": -2, "down": 1}, "up [+] down is -1"),
        ({"up": 10**400}, "up"),
    ],
)
def test_what_is_no_report_is_refused_by_field(changed: dict[str, Any], where: str) -> None:
    """Unknown fields, wrong types, and counts that cannot be: each is refused, and the message names the field."""
    with pytest.raises(RequestInvalid, match=where):
        read_report(json.dumps(body(**changed)).encode())


@pytest.mark.parametrize(
    "changed",
    [
        {"endpoint": "North"}, {"endpoint": ""}, {"run": "x" * 16}, {"run": "0" * 65}, {"sequence": 0},
        {"sequence": "1"}, {"observations": []}, {"observations": {}}, {"more": 1},
        {"observations": [body()["observations"][0]] * 2},
        {"observations": [{**body()["observations"][0], "alias": f"a/n{i}"} for i in range(MAX_OBSERVATIONS + 1)]},
    ],
    ids=str,
)  # fmt: skip
def test_a_report_has_one_name_one_number_and_bounded_parts(changed: dict[str, Any]) -> None:
    """Names, run, sequence, the number of observations and their keys are checked; so is a field too many."""
    with pytest.raises(RequestInvalid):
        read_report(json.dumps({**body(), **changed}).encode())


@pytest.mark.parametrize("key", ["my secret field", "observations\n"])
def test_an_unknown_field_is_not_said_again(key: str) -> None:
    """What a sender wrote goes into no message: not a value, and not a field that it made up."""
    with pytest.raises(RequestInvalid) as caught:
        read_report(json.dumps({**body(), key: "my secret value"}).encode())
    assert key not in caught.value.message
    assert "secret" not in caught.value.message


@given(st.binary(max_size=64) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps))
def test_no_bytes_break_the_reader(data: bytes | str) -> None:
    """Anything that is no report raises `RequestInvalid` and nothing else."""
    with pytest.raises(RequestInvalid):
        read_report(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize("data", [b"[" * 100_000, b'{"sequence": 1e999}', b'{"sequence": NaN}', b"\xff\xfe", b""])
def test_hostile_json_is_refused(data: bytes) -> None:
    """Deep nesting, infinities and other encodings are refused like any other nonsense."""
    with pytest.raises(RequestInvalid):
        read_report(data)


@given(st.lists(st.floats(0.0, 100.0), min_size=1, max_size=60), st.sampled_from([0.5, 0.9, 0.99]))
def test_a_quantile_is_off_by_no_more_than_its_bucket(times: list[float], share: float) -> None:
    """Against sorting all times: the quantile lies in the bucket that the sorted list's does."""
    ttft = [0] * (len(TTFT_BOUNDS_S) + 1)
    for seconds in times:
        ttft[ttft_bucket(seconds)] += 1
    rank = next(n for n in range(1, len(times) + 1) if n >= share * len(times))
    exact = sorted(times)[rank - 1]
    bounds = (0.0, *TTFT_BOUNDS_S)
    found = ttft_quantile(tuple(ttft), share)
    assert found is not None
    if exact > TTFT_BOUNDS_S[-1]:
        assert found == TTFT_BOUNDS_S[-1]
    else:
        at = ttft_bucket(exact)
        assert bounds[at] <= found <= bounds[at + 1] * (1 + 1e-9)


def test_nothing_counted_has_no_quantile() -> None:
    """Zero requests have no median."""
    assert ttft_quantile((0,) * (len(TTFT_BOUNDS_S) + 1), 0.5) is None


def test_a_report_counts_once_however_often_it_arrives(registry: Registry) -> None:
    """The same number twice, and an older one, change nothing; another run or endpoint counts for itself."""
    version = add_version(registry, 1).digest
    assert registry.observe(report(seen(version), sequence=5))
    before = registry.observed()
    assert not registry.observe(report(seen(version), sequence=5))
    assert not registry.observe(report(seen(version, requests=99), sequence=4))
    assert registry.observed() == before
    assert registry.observe(report(seen(version), sequence=1, run="1" * 16))
    assert registry.observe(report(seen(version), sequence=1, endpoint="south"))
    assert {name: [s.requests for s in sums] for name, sums in registry.observed()[version].items()} == {
        "north": [20],
        "south": [10],
    }


@given(st.lists(st.tuples(st.sampled_from([0, 1]), st.sampled_from(["a/b", "a/c"]), st.integers(1, 9)), max_size=8))
def test_sums_are_the_sums_of_the_reports(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    """Against adding up in a dictionary: every count, the histogram, and the widest window."""
    registry = Registry(tmp_path_factory.mktemp("r"), KEY.public, FakeClock())
    versions = [add_version(registry, n).digest for n in (1, 2)]
    expected: dict[tuple[Digest, str], int] = {}
    for sequence, (which, alias, times) in enumerate(rows, start=1):
        made = seen(versions[which], alias=alias, requests=10 * times, start=float(sequence), end=float(sequence + 1))
        assert registry.observe(report(made, sequence=sequence))
        expected[versions[which], alias] = expected.get((versions[which], alias), 0) + 10 * times
    found = {(s.version, s.alias): s for sums in registry.observed().values() for each in sums.values() for s in each}
    assert {key: s.requests for key, s in found.items()} == expected
    for (digest, alias), s in found.items():
        mine = [n for n, (which, name, _) in enumerate(rows, 1) if (versions[which], name) == (digest, alias)]
        assert (s.start, s.end, sum(s.ttft), s.up) == (mine[0], mine[-1] + 1, 8 * len(mine), 3 * len(mine))
    registry.close()


def test_an_unknown_version_is_refused_with_its_whole_report(registry: Registry) -> None:
    """Half a report is never taken in, and its number stays free."""
    version = add_version(registry, 1).digest
    with pytest.raises(NotFound, match=r"no version cdcdcd.* \(1 such"):
        registry.observe(report(seen(version), seen(VERSION)))
    assert registry.observed() == {}
    assert registry.observe(report(seen(version)))


def test_the_observers_token_reports_and_does_nothing_else(tmp_path: Path, registry: Registry) -> None:
    """It posts; every other door that needs a token stays shut to it, and no token opens nothing."""
    version = add_version(registry, 1).digest

    async def test(client: httpx.AsyncClient) -> None:
        made = report(seen(version)).to_json()
        for headers in ({}, {"Authorization": "Bearer "}, {"Authorization": "Bearer wrong"}):
            answer = await client.post("/v1/observations", json=made, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "authentication")
        assert (await client.post("/v1/observations", json=made, headers=OBSERVER)).json() == {"new": True}
        assert (await client.post("/v1/observations", json=made, headers=OPERATOR)).json() == {"new": False}
        doors = [
            ("GET", "/v1/observations"), ("GET", f"/v1/versions/{version}/observations"), ("GET", "/v1/status"),
            ("GET", "/v1/lines"), ("POST", "/v1/aliases/acme/tools"), ("GET", "/v1/aliases/acme/tools/history"),
            ("POST", "/v1/federations/tools/rounds"),
        ]  # fmt: skip
        for method, path in doors:
            sent = {"json": {"rounds": 1} if path.endswith("rounds") else {}} if method == "POST" else {}
            answer = await client.request(method, path, headers=OBSERVER, **sent)  # type: ignore[arg-type]
            assert answer.status_code == 401, path
        assert registry.aliases().epoch == 0

    with_api(tmp_path, registry, test)


def test_without_an_observers_token_an_empty_one_is_nobodys(tmp_path: Path, registry: Registry) -> None:
    """A coordinator that was given none takes reports from the operator only."""

    async def scenario() -> None:
        journal = Journal(tmp_path / "journal.sqlite")
        state = ApiState(registry, journal, Schedule({}, journal, FakeClock()), KEY, "operators", asyncio.Event())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(make_api(state)), base_url="http://test") as client:
            answer = await client.post("/v1/observations", content=b"{}", headers={"Authorization": "Bearer "})
            assert answer.status_code == 401

    asyncio.run(scenario())


def test_bad_reports_over_http(tmp_path: Path, registry: Registry) -> None:
    """An unknown version is 404, nonsense 400, too long a body 400."""

    async def test(client: httpx.AsyncClient) -> None:
        unknown = await client.post("/v1/observations", json=body(), headers=OBSERVER)
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "not-found")
        wrong = await client.post("/v1/observations", content=b"{", headers=OBSERVER)
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "request-invalid")
        long = await client.post("/v1/observations", content=b" " * (MAX_BODY_BYTES + 1), headers=OBSERVER)
        assert str(MAX_BODY_BYTES) in long.json()["error"]["message"]
        assert long.status_code == 400

    with_api(tmp_path, registry, test)


def test_what_is_shown_is_said_to_be_unverified(tmp_path: Path, registry: Registry) -> None:
    """Sums over endpoints with rates and quantiles; a version nobody reported has none; no alias has moved."""
    one, two = add_version(registry, 1).digest, add_version(registry, 2).digest

    async def test(client: httpx.AsyncClient) -> None:
        for endpoint in ("north", "south"):
            made = report(seen(one), seen(one, alias="acme/other", requests=30), endpoint=endpoint)
            assert (await client.post("/v1/observations", json=made.to_json(), headers=OBSERVER)).status_code == 200
        shown = (await client.get(f"/v1/versions/{one}/observations", headers=OPERATOR)).json()
        assert shown["source"] == "reported by endpoints, not verified"
        total = shown["total"]
        assert (total["requests"], total["errors_5xx"], total["error_rate"]) == (80, 4, 0.05)
        assert (total["up"], total["down"], total["up_share"]) == (12, 4, 0.75)
        assert 0.1 <= total["ttft_p50_s"] <= total["ttft_p99_s"] <= 0.15
        assert [(e["endpoint"], e["alias"]) for e in shown["endpoints"]] == [
            (endpoint, alias) for endpoint in ("north", "south") for alias in ("acme/other", "acme/tools")
        ]
        none = (await client.get(f"/v1/versions/{two}/observations", headers=OPERATOR)).json()
        assert (none["total"], none["endpoints"]) == (None, [])
        every = (await client.get("/v1/observations", headers=OPERATOR)).json()["versions"]
        assert every == {one: shown}
        missing = await client.get(f"/v1/versions/{VERSION}/observations", headers=OPERATOR)
        assert missing.status_code == 404
        assert registry.aliases().epoch == 0

    with_api(tmp_path, registry, test)
