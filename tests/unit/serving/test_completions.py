"""A completion between its ticket and an engine made of queues: what is computed is counted, read or not."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, Self, cast

import pytest

from fedllm.clock import FakeClock
from fedllm.errors import FedllmError, NotFound, Overloaded, QuotaExceeded
from fedllm.ids import sha256
from fedllm.rng import SeededRng
from fedllm.serving.access import Access, Ticket
from fedllm.serving.completions import Completion, complete, score
from fedllm.serving.endpoint import Endpoint
from fedllm.serving.engine import Chunk, GenerationRequest
from fedllm.serving.intake import ClientGone, Guard, unless_gone
from fedllm.serving.metrics import Counters
from fedllm.serving.openai import ScoreRequest, read_chat, read_completion
from fedllm.serving.quota import Limits
from fedllm.serving.records import RequestRecord
from fedllm.serving.structured import Grammars
from fedllm.serving.tenants import TenantFile, create_tenant
from fedllm.serving.text import TextCodec

ALIAS = "acme/tools"
VERSION = sha256(b"version")
LIMITS = Limits(tokens_per_minute=1000, concurrent=2)


async def here() -> bool:
    """Say that the client is there."""
    return False


async def left() -> bool:
    """Say that the client has left."""
    return True


class Stream:
    """A token stream that a test fills."""

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self.cached_tokens = 0
        self.queue: asyncio.Queue[Chunk | FedllmError] = asyncio.Queue()
        self.closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        if self.closed:
            raise StopAsyncIteration
        item = await self.queue.get()
        if isinstance(item, FedllmError):
            raise item
        self.closed = item.finish_reason is not None
        return item

    async def aclose(self) -> None:
        """Close."""
        self.closed = True


class World:
    """An endpoint whose engine is this object, and what it did."""

    base_digest, digest, max_model_tokens = sha256(b"base"), VERSION, 512

    def __init__(self, folder, tenants, **options: Any) -> None:
        self.key = create_tenant(tenants, "acme", [ALIAS], limits=LIMITS, weight=2.0, **options)
        self.records: list[RequestRecord] = []
        self.notes: list[tuple[object, ...]] = []
        self.streams: list[Stream] = []
        self.leases = 0
        self.refuse: FedllmError | None = None
        clock = FakeClock()
        self.access = Access(TenantFile(tenants), clock, observers=[self])
        parts = (self, SimpleNamespace(base_name="tiny"), self, TextCodec(folder), self.access, Counters(), clock)
        self.endpoint = Endpoint(*cast("tuple[Any, ...]", parts), SeededRng(1), prompt_log=self)
        self.grammars = Grammars(self.endpoint.codec)

    def observe(self, record: RequestRecord) -> None:
        """Keep a record."""
        self.records.append(record)

    def note(self, tenant, record_id: str, asked: str, answered: str) -> None:
        """Keep a note."""
        self.notes.append((tenant.name, record_id, asked, answered))

    async def lease(self, model: str, _tenant: object) -> World:
        """Lease the one version."""
        if model.partition("@")[0] != ALIAS:
            raise NotFound("no such model")
        self.leases += 1
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.leases -= 1

    def generate(self, _lease: object, request: GenerationRequest) -> Stream:
        """Open a stream."""
        if self.refuse is not None and len(self.streams) == 1:
            raise self.refuse
        self.streams.append(Stream(request))
        return self.streams[-1]

    async def score(self, *_: object) -> list[Any]:
        """Score one token."""
        if self.refuse is not None:
            raise self.refuse
        return [SimpleNamespace(regret=0.0, logprob=-1.0)]

    def ticket(self) -> Ticket:
        """Return a new request's ticket."""
        caller = self.access.caller({"authorization": f"Bearer {self.key}"})
        return self.access.open(caller, route="/v1/completions", headers={})

    async def start(self, *, chat: bool = False, **body: object) -> tuple[Ticket, Completion]:
        """Admit a completion."""
        ticket = self.ticket()
        read = read_chat if chat else read_completion
        content = {"messages": [{"role": "user", "content": "hello"}]} if chat else {"prompt": [1, 2, 3]}
        asked = read({"model": ALIAS, "max_tokens": 10, **content, **body}, stop_token_ids=frozenset())
        return ticket, await complete(self.endpoint, self.grammars, ticket, asked, (1, 2, 3), here, chat=chat)

    def left(self) -> int:
        """Return acme's remaining tokens."""
        caller = self.access.caller({"authorization": f"Bearer {self.key}"})
        return int(self.access.headers(caller)["x-ratelimit-remaining-tokens"])


@pytest.fixture
def world(tiny_folder, tmp_path) -> World:
    """Return an endpoint."""
    return World(tiny_folder, tmp_path / "tenants.toml")


def test_the_engine_is_told_whose_request_it_is(world) -> None:
    """Client, weight and scope of every continuation are the ticket's; all of them are reserved."""

    async def body() -> None:
        ticket, completion = await world.start(n=3)
        asked = [stream.request for stream in world.streams]
        assert [(r.client, r.weight, r.scope) for r in asked] == [("acme", 2.0, "acme")] * 3
        assert world.left() == 1000 - 33
        for stream in world.streams:
            stream.queue.put_nowait(Chunk((66,), "length"))
        world.streams[0].cached_tokens = 2
        answer = await completion.body(here)
        assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
        ticket.end(200)
        assert world.left() == 1000 - 6
        assert (world.records[0].cached_tokens, world.records[0].alias) == (2, ALIAS)

    asyncio.run(body())


@pytest.mark.parametrize("n", [1, 3])
def test_what_a_stalled_reader_never_read_is_counted(world, n: int) -> None:
    """A reader takes one event and stands still; what was delivered until it is cut off is on its account."""

    async def body() -> None:
        _, completion = await world.start(n=n, stream=True)
        taken, stalled = asyncio.Event(), asyncio.Event()

        async def receive() -> dict[str, str]:
            await stalled.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                taken.set()
                await asyncio.Event().wait()

        sending = asyncio.create_task(completion.stream(receive, send))
        for stream in world.streams:
            stream.queue.put_nowait(Chunk((66,)))
        await taken.wait()
        for stream in world.streams:
            for _ in range(5):
                stream.queue.put_nowait(Chunk((66, 67)))
        stalled.set()
        await sending
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(body())
    (record,) = world.records
    assert (record.status, record.completion_tokens) == (499, 11 * n)
    assert world.leases == 0
    assert world.left() == 1000 - 3 - 11 * n


def test_a_client_that_leaves_before_the_first_byte_holds_nothing(world) -> None:
    """The events were never begun; ticket, lease and streams end all the same."""

    async def body() -> None:
        _, completion = await world.start(stream=True)

        async def receive() -> dict[str, str]:
            await asyncio.sleep(0)
            return {"type": "http.disconnect"}

        async def send(_: Any) -> None:
            await asyncio.Event().wait()

        await completion.stream(receive, send)

    asyncio.run(body())
    assert [record.status for record in world.records] == [499]
    assert world.leases == 0
    assert world.streams[0].closed


@pytest.mark.parametrize("act", ["body", "score"])
def test_who_does_not_wait_for_the_answer_holds_nothing(world, act: str) -> None:
    """A client that left is noticed while it is computed for; its lease and its tokens are let go."""

    async def body() -> None:
        if act == "body":
            ticket, completion = await world.start()
            world.streams[0].queue.put_nowait(Chunk((66,)))
            with pytest.raises(ClientGone):
                await completion.body(left)
            assert ticket.end(499).completion_tokens == 1
        else:
            with pytest.raises(ClientGone):
                await unless_gone(left, asyncio.Event().wait())
        assert world.leases == 0

    asyncio.run(body())


def test_a_refused_admission_holds_and_counts_nothing(world) -> None:
    """The second continuation finds the queue full: the first is closed, the lease let go, no token is counted."""

    async def body() -> None:
        world.refuse = Overloaded("full")
        with pytest.raises(Overloaded):
            await world.start(n=2)
        assert world.streams[0].closed
        with pytest.raises(Overloaded):
            await score(world.endpoint, world.ticket(), ScoreRequest(ALIAS, (1,), (2,)), here)
        with pytest.raises(QuotaExceeded):
            world.ticket()

    asyncio.run(body())
    assert world.leases == 0


def test_scores_count_prompt_and_answer(world) -> None:
    """Every token is computed once; the ticket knows the version."""

    async def body() -> None:
        ticket = world.ticket()
        answer = await score(world.endpoint, ticket, ScoreRequest(ALIAS, (1, 2), (3,)), here)
        assert answer["logprobs"] == [-1.0]
        record = ticket.end(200)
        assert (record.prompt_tokens, record.completion_tokens, record.version) == (3, 0, VERSION)

    asyncio.run(body())


@pytest.mark.parametrize("opted_in", [True, False])
@pytest.mark.parametrize("chat", [True, False])
def test_exchanges_are_noted_for_who_has_opted_in_only(tiny_folder, tmp_path, chat: bool, opted_in: bool) -> None:
    """One note for each continuation, under the answer's id; without the tenant's word no text is even kept."""
    world = World(tiny_folder, tmp_path / "tenants.toml", log_prompts=opted_in)

    async def body() -> None:
        _, completion = await world.start(chat=chat, n=2, **({} if chat else {"prompt": "hi"}))
        for stream in world.streams:
            stream.queue.put_nowait(Chunk(tuple(world.endpoint.codec.encode("BB")), "length"))
        answer = await completion.body(here)
        asked = "user: hello" if chat else "hi"
        assert world.notes == [("acme", answer["id"], asked, "BB")] * (2 if opted_in else 0)

    asyncio.run(body())


def test_a_request_that_is_cancelled_ends_its_ticket(world) -> None:
    """Whatever ends a request, the outermost layer frees its place: two may run, and after a hundred two still may."""

    async def app(scope: Any, _receive: Any, _send: Any) -> None:
        scope["fedllm.visit"].enter({"authorization": f"Bearer {world.key}"})
        await asyncio.Event().wait()

    async def body() -> None:
        guard = Guard(app, access=world.access, routes=set())
        for _ in range(100):
            task = asyncio.create_task(guard({"path": "/x"}, cast("Any", None), cast("Any", None)))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(body())
    assert [record.status for record in world.records] == [499] * 100
    assert {record.route for record in world.records} == {"other"}
