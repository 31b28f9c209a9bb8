"""The HTTP line: signed reads for endpoints, a token for control, long-poll, errors with their codes."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from patience import NEVER_S, PATIENCE_S
from round_world import World

from fedllm.errors import DigestMismatch, IntegrityError, NotFound, PeerUnavailable, SignatureInvalid
from fedllm.identity import SigningIdentity
from fedllm.registry.remote import HttpVersionSource
from fedllm.server import api
from fedllm.server.api import ApiState, make_api
from fedllm.server.schedule import Schedule

TOKEN = {"Authorization": "Bearer secret-of-the-operator"}
OTHER = SigningIdentity.from_seed(b"\x07" * 32)


class Desk:
    """An API over a federation in memory that has run two rounds."""

    def __init__(self, world: World, client: httpx.AsyncClient, schedule: Schedule, stopping: asyncio.Event) -> None:
        self.world, self.client, self.schedule, self.stopping = world, client, schedule, stopping
        self.rounds = "/v1/federations/tools/rounds"

    def source(self, key: Any = None) -> HttpVersionSource:
        """Return an endpoint's view of the registry, by default with the right key pinned."""
        return HttpVersionSource("http://test", key or self.world.identity.public, client=self.client)


def with_api(tmp_path: Path, test: Callable[[Desk], Awaitable[None]], *, rounds: int = 2) -> None:
    """Run a test against the API."""

    async def scenario() -> None:
        world = World(tmp_path)
        runner = world.runner()
        schedule = Schedule({"tools": runner}, world.journal, world.clock)
        world.events = _Forward(schedule)  # type: ignore[assignment]
        await runner.run(rounds)
        stopping = asyncio.Event()
        token = TOKEN["Authorization"].partition(" ")[2]
        state = ApiState(world.registry, world.journal, schedule, world.identity, token, stopping)
        transport = httpx.ASGITransport(make_api(state))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            await test(Desk(world, client, schedule, stopping))

    asyncio.run(scenario())


class _Forward(list[Any]):
    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        self.append = schedule.progress  # type: ignore[method-assign, assignment]


def test_an_endpoint_reads_versions_and_believes_nothing(tmp_path: Path) -> None:
    """Manifest, files and alias table verify against the pinned key; against another, nothing does."""

    async def test(desk: Desk) -> None:
        source = desk.source()
        table = await source.aliases(-1, 0.0)
        (digest,) = table.aliases.values()
        fetched = await source.fetch(digest)
        assert fetched.version == desk.world.registry.get(digest)
        assert fetched.files == desk.world.registry.fetch(digest).files
        assert [v.number for v in await source.versions()] == [1, 2]
        with pytest.raises(NotFound):
            await source.fetch("00" * 32)
        for ask in (desk.source(OTHER.public).fetch(digest), desk.source(OTHER.public).aliases(-1, 0.0)):
            with pytest.raises(SignatureInvalid):
                await ask

    with_api(tmp_path, test)


def test_a_proxy_can_neither_swap_nor_roll_back(tmp_path: Path) -> None:
    """Other bytes under a blob's name, another version under a digest, an older alias table: each is raised."""

    async def test(desk: Desk) -> None:
        one, two = (v.digest for v in desk.world.registry.versions())
        honest = {p: (await desk.client.get(p)).json() for p in (f"/v1/versions/{one}", "/v1/aliases")}

        def evil(request: httpx.Request) -> httpx.Response:
            if request.url.path.startswith("/v1/versions"):
                return httpx.Response(200, json=honest[f"/v1/versions/{one}"])
            if request.url.path.startswith("/v1/aliases"):
                return httpx.Response(200, json=honest["/v1/aliases"])
            return httpx.Response(200, content=b"not the file")

        async with httpx.AsyncClient(transport=httpx.MockTransport(evil), base_url="http://test") as client:
            source = HttpVersionSource("http://test", desk.world.identity.public, client=client)
            with pytest.raises(DigestMismatch, match="asked for"):
                await source.fetch(two)
            with pytest.raises(DigestMismatch, match="after download"):
                await source.fetch(one)
            alias = desk.world.federation.alias
            desk.world.registry.rollback(alias, actor="operator", reason="odd")
            source._epoch = (await desk.source().aliases(-1, 0.0)).epoch
            with pytest.raises(IntegrityError, match="after one of epoch 3"):
                await source.aliases(-1, 0.0)

    with_api(tmp_path, test)


def test_an_unreachable_registry_says_so() -> None:
    """Nothing listens: exit code 69, with the address."""

    async def scenario() -> None:
        def refuse(request: httpx.Request) -> httpx.Response:
            raise httpx.ConnectError("refused", request=request)

        async with httpx.AsyncClient(transport=httpx.MockTransport(refuse), base_url="http://test") as client:
            with pytest.raises(PeerUnavailable, match="http://test"):
                await HttpVersionSource("http://test", OTHER.public, client=client).aliases(0, 1.0)

    asyncio.run(scenario())


def test_long_poll_ends_with_the_move_and_with_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A poll waits, wakes on an alias move at once, and never holds up a coordinator that stops."""
    monkeypatch.setattr(api, "MAX_WAIT_S", NEVER_S)

    async def test(desk: Desk) -> None:
        epoch = (await desk.source().aliases(-1, 0.0)).epoch
        poll = asyncio.create_task(desk.source().aliases(epoch, NEVER_S))
        await asyncio.sleep(0.05)
        assert not poll.done()
        desk.world.registry.rollback(desk.world.federation.alias, actor="operator", reason="odd")
        assert (await asyncio.wait_for(poll, PATIENCE_S)).epoch == epoch + 1
        poll = asyncio.create_task(desk.source().aliases(epoch + 1, NEVER_S))
        await asyncio.sleep(0.05)
        desk.stopping.set()
        assert (await asyncio.wait_for(poll, PATIENCE_S)).epoch == epoch + 1

    with_api(tmp_path, test)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/status"),
        ("GET", "/v1/federations/tools/rounds"),
        ("POST", "/v1/federations/tools/rounds"),
        ("POST", "/v1/federations/tools/rounds/1/abort"),
        ("POST", "/v1/aliases/acme/tools"),
        ("GET", "/v1/aliases/acme/tools/history"),
    ],
)
def test_control_needs_the_operators_token(tmp_path: Path, method: str, path: str) -> None:
    """Without the token, or with another, control answers 401 and does nothing."""

    async def test(desk: Desk) -> None:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret-of-the-operator"}):
            body = {"rounds": 1} if path.endswith("rounds") and method == "POST" else {}
            answer = await desk.client.request(method, path, headers=headers, json=body if method == "POST" else None)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "authentication"
        assert desk.world.journal.wanted("tools") == 0

    with_api(tmp_path, test, rounds=0)


def test_rounds_are_listed_with_numbers_and_no_names_of_data(tmp_path: Path) -> None:
    """A round shows state, verdict, version, seconds by phase and bytes by owner."""

    async def test(desk: Desk) -> None:
        rounds = (await desk.client.get(desk.rounds, headers=TOKEN)).json()["rounds"]
        assert [(r["number"], r["state"], r["promoted"], r["secagg"]) for r in rounds] == [
            (1, "JUDGED", True, True),
            (2, "JUDGED", True, True),
        ]
        assert rounds[0]["version"] == desk.world.registry.versions()[0].digest
        assert set(rounds[0]["bytes_up"]) == set(rounds[0]["cohort"])
        assert rounds[0]["overhead_s"] == pytest.approx(rounds[0]["wall_s"] - rounds[0]["train_s"])
        one = (await desk.client.get(f"{desk.rounds}/2", headers=TOKEN)).json()
        assert one == rounds[1]
        assert (one["attempt"], one["attempts"], one["neighbours"], one["saturated"]) == (1, [], 3, 0.0)
        assert (await desk.client.get(f"{desk.rounds}/9", headers=TOKEN)).status_code == 404
        missing = await desk.client.get("/v1/federations/nope/rounds", headers=TOKEN)
        assert missing.status_code == 404
        assert "known: tools" in missing.json()["error"]["message"]

    with_api(tmp_path, test)


def test_asked_rounds_are_queued_and_run(tmp_path: Path) -> None:
    """Two rounds asked for are two rounds run, status counts down, and nonsense is refused."""

    async def test(desk: Desk) -> None:
        answer = await desk.client.post(desk.rounds, headers=TOKEN, json={"rounds": 2})
        assert (answer.status_code, answer.json()["wanted"]) == (202, 2)
        for wrong in ({"rounds": 0}, {"rounds": 100_000}):
            assert (await desk.client.post(desk.rounds, headers=TOKEN, json=wrong)).status_code == 400
        for wrong in ({"rounds": "two"}, {"round": 1}, {}):
            assert (await desk.client.post(desk.rounds, headers=TOKEN, json=wrong)).status_code == 422
        working = asyncio.create_task(desk.schedule.run())
        async with asyncio.timeout(PATIENCE_S):
            while len([r for r in desk.world.journal.rounds("tools") if r.ended]) < 4:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        working.cancel()
        (federation,) = (await desk.client.get("/v1/status", headers=TOKEN)).json()["federations"]
        assert (federation["wanted"], federation["round"], federation["state"]) == (0, None, "IDLE")
        assert all(owner["connected"] for owner in federation["owners"])

    with_api(tmp_path, test)


def test_aliases_move_back_and_by_compare_and_swap(tmp_path: Path) -> None:
    """An empty body rolls back; a stale expectation is 409 with both digests; history names the operator."""

    async def test(desk: Desk) -> None:
        one, two = (v.digest for v in desk.world.registry.versions())
        path = "/v1/aliases/acme/tools"
        back = await desk.client.post(path, headers=TOKEN, json={"reason": "odd answers"})
        assert back.json()["aliases"] == {"acme/tools": one}
        stale = await desk.client.post(path, headers=TOKEN, json={"digest": two, "expected": two})
        assert (stale.status_code, stale.json()["error"]["code"]) == (409, "alias-conflict")
        assert one[:16] in stale.json()["error"]["message"]
        good = await desk.client.post(path, headers=TOKEN, json={"digest": two, "expected": one})
        assert good.json()["aliases"] == {"acme/tools": two}
        moves = (await desk.client.get(f"{path}/history", headers=TOKEN)).json()["moves"]
        assert [m["actor"] for m in moves][-2:] == ["operator", "operator"]
        assert base64.b64decode(good.json()["signature"])

    with_api(tmp_path, test)


def test_blobs_are_served_by_digest_only(tmp_path: Path) -> None:
    """Right bytes for a digest; 404 for an unknown one; a path is not a digest; nobody needs a token."""

    async def test(desk: Desk) -> None:
        version = desk.world.registry.versions()[0]
        record = version.manifest.files["adapter_config.json"]
        assert len((await desk.client.get(f"/v1/blobs/{record.sha256}")).content) == record.size
        assert (await desk.client.get(f"/v1/blobs/{'0' * 64}")).status_code == 404
        assert (await desk.client.get("/v1/blobs/registry.sqlite")).status_code == 400
        assert (await desk.client.get("/health")).json() == {"status": "ok"}

    with_api(tmp_path, test)


@pytest.mark.parametrize("wait", ["nan", "inf", "-inf"])
def test_no_wait_without_an_end_is_taken(tmp_path: Path, wait: str) -> None:
    """A timer that is due at no time would stand before everybody's, and anyone may ask for the table."""

    async def test(desk: Desk) -> None:
        answer = await desk.client.get(f"/v1/aliases?since=1000&wait_s={wait}", timeout=PATIENCE_S)
        assert answer.status_code == 422
        assert "wait_s" in answer.json()["error"]["message"]

    with_api(tmp_path, test)


def test_tokens_are_in_no_repr() -> None:
    """A state that is printed by mistake shows neither token."""
    nothing: Any = None
    state = ApiState(nothing, nothing, nothing, nothing, "secret", nothing, "hidden")
    assert "secret" not in repr(state)
    assert "hidden" not in repr(state)


def test_a_blob_is_read_beside_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one reader's blob comes from a slow disk, another is answered."""

    async def test(desk: Desk) -> None:
        begun, answered = threading.Event(), threading.Event()

        def slow(digest: str) -> bytes:
            begun.set()
            assert answered.wait(PATIENCE_S)
            return b"blob"

        monkeypatch.setattr(desk.world.registry.blobs, "get", slow)
        reading = asyncio.create_task(desk.client.get(f"/v1/blobs/{'0' * 64}"))
        await asyncio.to_thread(begun.wait, PATIENCE_S)
        assert (await desk.client.get("/health")).status_code == 200
        answered.set()
        assert (await reading).content == b"blob"

    with_api(tmp_path, test)
