"""One ticket a request: its quota is freed, its record told once, and a router is believed only by a router's key."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.clock import FakeClock
from fedllm.errors import AuthenticationError, QuotaExceeded
from fedllm.ids import sha256
from fedllm.serving.access import Access, Caller
from fedllm.serving.quota import Limits
from fedllm.serving.records import RequestRecord
from fedllm.serving.tenants import Tenant, TenantFile, create_tenant
from fedllm.serving.usage_rows import account

ROUTE = "/v1/completions"
VERSION = sha256(b"version")
LIMITS = Limits(requests_per_minute=3, tokens_per_minute=100, concurrent=2, tokens_per_month=150)


class Records:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[RequestRecord] = []

    def observe(self, record: RequestRecord) -> None:
        """Keep it."""
        self.told.append(record)


class Scene:
    """A door with tenants acme (limited), free (not) and front (a router)."""

    def __init__(self, folder, **options) -> None:
        path = folder / "tenants.toml"
        self.path = path
        self.clock, self.records = FakeClock(), Records()
        self.keys = {
            "acme": create_tenant(path, "acme", ["acme/tools"], limits=LIMITS, weight=2.5),
            "free": create_tenant(path, "free", ["acme/tools"], share_cache=True),
            "front": create_tenant(path, "front", ["*"], router=True),
        }
        self.access = Access(TenantFile(path), self.clock, observers=[self.records], **options)

    def headers(self, who: str, **more: str) -> dict[str, str]:
        """Return the headers of a request."""
        return {"authorization": f"Bearer {self.keys[who]}", **{f"x-fedllm-{k}": v for k, v in more.items()}}

    def caller(self, who: str, **more: str) -> Caller:
        """Return who asks."""
        return self.access.caller(self.headers(who, **more))

    def open(self, who: str, **more: str):
        """Return a ticket."""
        return self.access.open(self.caller(who, **more), route=ROUTE, headers=self.headers(who, **more))


@pytest.fixture
def scene(tmp_path) -> Scene:
    """Return a door without usage store and traces."""
    return Scene(tmp_path)


def test_a_record_says_what_the_request_was(scene) -> None:
    """Times are from arrival, the first token's is kept, and only the first end counts."""
    ticket = scene.open("acme")
    assert ticket.weight == 2.5
    assert ticket.trace == {}
    ticket.reserve(40)
    ticket.bound("cmpl-1", "acme/tools", VERSION, prompt_tokens=10)
    scene.clock.advance(0.25)
    ticket.token(2)
    scene.clock.advance(0.5)
    ticket.token()
    ticket.cached(8)
    record = ticket.end(200)
    assert record == RequestRecord(
        id="cmpl-1", tenant="acme", key="key-1", route=ROUTE, alias="acme/tools", version=VERSION, status=200,
        prompt_tokens=10, completion_tokens=3, cached_tokens=8, started=1_700_000_000.0, ttft_s=0.25, seconds=0.75,
    )  # fmt: skip
    assert ticket.end(500) is record
    assert scene.records.told == [record]


def test_the_end_frees_the_place_and_gives_back_what_was_not_used(scene) -> None:
    """Two run at once, not three; of forty reserved tokens thirteen were computed, and that is what is gone."""
    tickets = [scene.open("acme"), scene.open("acme")]
    with pytest.raises(QuotaExceeded) as caught:
        scene.open("acme")
    assert caught.value.limit == "concurrent"
    tickets[0].reserve(40)
    assert tickets[0].headers()["x-ratelimit-remaining-tokens"] == "60"
    tickets[0].bound("a", "acme/tools", VERSION, prompt_tokens=10)
    tickets[0].token(3)
    for _ in range(2):
        tickets[0].end(499)
    assert scene.access.headers(scene.caller("acme"))["x-ratelimit-remaining-tokens"] == "87"
    scene.open("acme")
    with pytest.raises(QuotaExceeded):
        scene.open("acme")


def test_more_than_was_reserved_is_owed(scene) -> None:
    """Tokens beyond the reservation come off what is left."""
    ticket = scene.open("acme")
    ticket.bound("a", "acme/tools", VERSION, prompt_tokens=120)
    ticket.end(200)
    assert scene.access.headers(scene.caller("acme"))["x-ratelimit-remaining-tokens"] == "0"
    scene.clock.advance(12)
    scene.open("acme").reserve(0)
    with pytest.raises(QuotaExceeded):
        scene.open("acme").reserve(1)


@pytest.mark.parametrize("stored", [True, False])
def test_the_month_is_counted_by_the_store_or_here(tmp_path, stored: bool) -> None:
    """What ended this month counts, as the usage store knows if there is one."""
    spent = {"acme": 140}
    scene = Scene(tmp_path, spent=(lambda name: spent.get(name, 0)) if stored else None)
    if not stored:
        first = scene.open("acme")
        first.bound("a", "acme/tools", VERSION, prompt_tokens=140)
        first.end(200)
        scene.clock.advance(600)
    with pytest.raises(QuotaExceeded, match="150 allowed, 140 used, 0 held, 20 asked for") as caught:
        scene.open("acme").reserve(20)
    assert caught.value.limit == "tokens_per_month"


def test_a_changed_file_changes_limits_at_the_next_request(scene) -> None:
    """What is lifted is no limit any more, what is new holds at once."""
    for _ in range(2):
        scene.open("acme")
    text = scene.path.read_text()
    scene.path.write_text(text.replace("concurrent = 2", "concurrent = 3"))
    scene.open("acme")
    scene.path.write_text(text.replace("concurrent = 2", "concurrent = 9").replace("requests_per_minute = 3\n", ""))
    scene.open("acme")


def test_scopes_are_a_tenants_own_unless_both_sides_share(scene) -> None:
    """The alias's word alone shares nothing, nor does the tenant's; nobody else's alias is concerned."""
    assert [scene.open(who).scope("acme/tools") for who in ("acme", "free")] == ["acme", "free"]
    scene.path.write_text(scene.path.read_text() + '\n[aliases."acme/tools"]\nshare_cache = true\n')
    assert scene.open("acme").scope("acme/tools") == "acme"
    assert scene.open("free").scope("acme/tools") == "shared:acme/tools"
    assert scene.open("free").scope("acme/other") == "free"


def test_a_router_speaks_for_its_tenants(scene) -> None:
    """Name, weight and scope are its word; nothing is limited, nothing told, and the tenant is no operator."""
    caller = scene.caller("front", tenant="far", weight="2.5", scope="shared:acme/tools")
    assert (caller.tenant.name, caller.key, caller.delegated) == ("far", "key-1", True)
    assert not caller.tenant.operator
    assert caller.tenant.limits == Limits()
    assert caller.tenant.may_use("acme/tools")
    ticket = scene.access.open(caller, route=ROUTE, headers={})
    ticket.reserve(10**9)
    assert (ticket.weight, ticket.scope("acme/tools"), ticket.headers()) == (2.5, "shared:acme/tools", {})
    assert ticket.end(200).tenant == "far"
    scene.access.refused(route=ROUTE, status=429, caller=caller)
    assert scene.records.told == []
    assert scene.open("front", tenant="far").scope("acme/tools") == "far"
    own = scene.caller("front")
    assert (own.tenant.name, own.delegated) == ("front", False)


def test_a_router_reaches_for_its_tenants_what_it_may_use_itself(tmp_path) -> None:
    """Default-deny holds behind a router too."""
    scene = Scene(tmp_path)
    scene.keys["narrow"] = create_tenant(scene.path, "narrow", ["acme/tools"], router=True, operator=True)
    tenant = scene.caller("narrow", tenant="far").tenant
    assert tenant.may_use("acme/tools")
    assert not tenant.may_use("base")
    assert not tenant.operator


@pytest.mark.parametrize(
    ("who", "headers", "words"),
    [
        ("acme", {"tenant": "free"}, "may not speak for another"),
        ("acme", {"tenant": "acme"}, "may not speak for another"),
        ("acme", {"weight": "10"}, "may not speak for another"),
        ("acme", {"scope": "free"}, "may not speak for another"),
        ("front", {"weight": "2"}, "x-fedllm-tenant: tenant '' is not a name"),
        ("front", {"tenant": "A"}, "is not a name"),
        ("front", {"tenant": "far", "weight": "0"}, "0.1 to 10"),
        ("front", {"tenant": "far", "weight": "nan"}, "0.1 to 10"),
        ("front", {"tenant": "far", "weight": "1e1"}, "0.1 to 10"),
        ("front", {"tenant": "far", "weight": "11"}, "0.1 to 10"),
        ("front", {"tenant": "far", "scope": "a b"}, "x-fedllm-scope"),
        ("front", {"tenant": "far", "scope": "a" * 201}, "x-fedllm-scope"),
    ],
)
def test_a_delegation_that_is_none_is_refused(scene, who, headers, words) -> None:
    """It is not passed over: whoever sends it means something by it."""
    with pytest.raises(AuthenticationError, match=words):
        scene.caller(who, **headers)


def test_refusals_are_told_with_what_is_known(scene) -> None:
    """Of a stranger nothing but route and status, of a tenant its name and key's name."""
    scene.access.refused(route="other", status=401, caller=None)
    scene.access.refused(route=ROUTE, status=429, caller=scene.caller("acme"))
    stranger, known = scene.records.told
    assert (stranger.tenant, stranger.key, stranger.route, stranger.status) == ("", "", "other", 401)
    assert (known.tenant, known.key, known.route, known.status) == ("acme", "key-1", ROUTE, 429)
    assert known.version is None
    assert known.prompt_tokens == known.completion_tokens == 0


def test_replicas_that_failed_are_counted(scene) -> None:
    """Binding again to the same replica is no retry, to another it is; the last one is in the record."""
    ticket = scene.open("free")
    for replica in ("", "r1", "r1", "r2", "r3"):
        ticket.bound("a", "acme/tools", VERSION, prompt_tokens=1, replica=replica)
    record = ticket.end(200)
    assert (record.replica, record.retries) == ("r3", 2)


class Tracing:
    """A tracer and its only span."""

    trace_id = "a" * 32

    def __init__(self) -> None:
        self.seen: list[object] = []

    def start(self, route: str, headers: Mapping[str, str]) -> Tracing:
        """Begin."""
        self.seen += [route, headers["authorization"].partition(" ")[0]]
        return self

    def headers(self) -> dict[str, str]:
        """Return what is passed on."""
        return {"traceparent": "b"}

    def end(self, record: RequestRecord) -> None:
        """End."""
        self.seen.append(record)


def test_a_traced_request_carries_its_trace(tmp_path) -> None:
    """The span begins with the ticket and ends once, with the record, which has its id; a router's requests too."""
    tracing = Tracing()
    scene = Scene(tmp_path, tracer=tracing)
    ticket = scene.open("acme")
    assert ticket.trace == {"traceparent": "b"}
    record = ticket.end(200)
    ticket.end(200)
    assert tracing.seen == [ROUTE, "Bearer", record]
    assert record.trace == tracing.trace_id
    scene.open("front", tenant="far").end(200)
    assert len(tracing.seen) == 6


def test_keys_are_in_no_text(scene) -> None:
    """Neither repr of callers, tickets and errors nor their hashes' show a key."""
    caller = scene.caller("front", tenant="far")
    ticket = scene.open("acme")
    with pytest.raises(AuthenticationError) as caught:
        scene.access.caller({"authorization": "Bearer secret-words"})
    texts = " ".join(map(repr, (caller, ticket, vars(ticket), scene.access, vars(scene.access), ticket.end(200))))
    texts += repr(caught.value) + str(caught.value.hint) + repr(scene.access.tenants.table)
    for key in (*scene.keys.values(), "secret-words"):
        assert key not in texts
    assert scene.access.tenants.table.tenants[0].keys[0].sha256 not in texts


@given(st.lists(st.tuples(st.sampled_from(["open", "reserve", "token", "end"]), st.integers(0, 5)), max_size=60))
def test_whatever_requests_do_nothing_stays_held(tmp_path_factory, acts) -> None:
    """After any order of opening, reserving, generating and ending, all is free when all have ended."""
    scene = Scene(tmp_path_factory.mktemp("t"))
    running = []
    for act, number in acts:
        if act == "open":
            try:
                running.append(scene.open("acme"))
            except QuotaExceeded as error:
                assert error.limit == ("concurrent" if len(running) == 2 else "requests_per_minute")
            assert len(running) <= 2
        elif running:
            ticket = running[number % len(running)]
            if act == "reserve":
                try:
                    ticket.reserve(5 * number)
                except QuotaExceeded as error:
                    assert error.limit.startswith("tokens")
            elif act == "token":
                ticket.token(number)
            else:
                ticket.end(200)
                running.remove(ticket)
    for ticket in running:
        ticket.end(499)
    scene.clock.advance(40 * 86_400)
    left = scene.access.headers(scene.caller("acme"))
    assert (left["x-ratelimit-remaining-requests"], left["x-ratelimit-remaining-tokens"]) == ("3", "100")
    tickets = [scene.open("acme"), scene.open("acme")]
    tickets[0].reserve(100)
    assert len({id(record) for record in scene.records.told}) == len(scene.records.told)


def test_a_tenant_made_by_hand_needs_only_a_name() -> None:
    """The defaults deny and limit nothing."""
    tenant = Tenant("acme")
    assert (tenant.allow, tenant.limits, tenant.weight, tenant.router, tenant.operator) == (
        (),
        Limits(),
        1.0,
        False,
        False,
    )


def test_door_and_store_charge_the_same_month(tmp_path) -> None:
    """A request that began before the month's end is that month's, wherever it is counted."""
    scene = Scene(tmp_path)
    scene.clock.advance(datetime(2026, 12, 1, tzinfo=UTC).timestamp() - scene.clock.now() - 1)
    ticket = scene.open("acme")
    ticket.bound("a", "acme/tools", VERSION, prompt_tokens=10)
    scene.clock.advance(2)
    charged = account(ticket.end(200))
    assert charged == (2026 * 12 + 10, "acme")
    assert scene.access.spent("acme") == 0
