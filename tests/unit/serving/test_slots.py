"""The slot table's rules and the queue's promises, without a model and in virtual time."""

from __future__ import annotations

import asyncio
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.errors import AdapterInvalid, NotFound, Overloaded
from fedllm.ids import Digest, sha256
from fedllm.serving.native.admission import SlotQueue
from fedllm.serving.native.slots import SlotTable

A, B, C = (sha256(name) for name in (b"a", b"b", b"c"))


def loaded(table: SlotTable, digest) -> int:
    """Reserve and commit."""
    slot = table.reserve(digest)
    table.commit(digest)
    return slot


def test_least_recently_used_idle_slot_is_evicted() -> None:
    """Using a version protects it for a while; the other goes."""
    table = SlotTable(2)
    loaded(table, A)
    slot_b = loaded(table, B)
    table.acquire(A, 0.0)
    table.release(A)
    assert loaded(table, C) == slot_b
    assert set(table.ready()) == {A, C}


def test_loading_pinned_and_busy_slots_stay() -> None:
    """None of the three can be taken, and the refusal names the limit."""
    for keep in ("loading", "pinned", "busy"):
        table = SlotTable(1)
        table.reserve(A)
        if keep != "loading":
            table.commit(A)
        if keep == "pinned":
            table.pin(A)
        if keep == "busy":
            table.acquire(A, 0.0)
        with pytest.raises(Overloaded, match="all 1 adapter slots"):
            table.reserve(B)


def test_a_version_that_is_loading_cannot_be_used() -> None:
    """Half a copy is never served."""
    table = SlotTable(1)
    table.reserve(A)
    with pytest.raises(NotFound):
        table.acquire(A, 0.0)


def test_misuse_is_refused() -> None:
    """Freeing what is used, releasing what is not, loading twice."""
    table = SlotTable(2)
    loaded(table, A)
    with pytest.raises(ValueError, match="no request uses it"):
        table.release(A)
    table.acquire(A, 0.0)
    with pytest.raises(ValueError, match="used by 1"):
        table.free(A)
    with pytest.raises(ValueError, match="slot already"):
        table.reserve(A)


PATIENCE_S, LONGEST_S, COPY_S = 4.0, 8.0, 1.0
REQUEST = st.tuples(
    st.integers(0, 30),  # arrives
    st.integers(0, 5),  # version
    st.integers(1, int(LONGEST_S)),  # runs for
    st.one_of(st.none(), st.integers(0, 20)),  # its client leaves after
)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to whatever is next: hours of waiting take no time."""

    now_s = 0.0

    def time(self) -> float:
        """Return virtual seconds."""
        return self.now_s

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:
            self.now_s = max(self.now_s, self._scheduled[0]._when)
        super()._run_once()


class Bench:
    """Slots that remember what was copied into them, and a record of who waited how long, from which place."""

    def __init__(self, count: int, **patience: float) -> None:
        self.table = SlotTable(count, **patience)
        self.queue = SlotQueue(self.table)
        self.content: dict[int, Digest] = {}
        self.waits: list[tuple[float, int]] = []
        self.copies = 0

    async def write(self, digest: Digest, index: int) -> None:
        """Copy for a second, into a slot that nobody uses."""
        self.content.pop(index, None)
        await asyncio.sleep(COPY_S)
        self.content[index] = digest
        self.copies += 1

    async def request(self, digest: Digest, seconds: float) -> None:
        """Hold a version for a while; it must stay where it is."""
        loop = asyncio.get_running_loop()
        waiting = self.table.waiting()
        place = waiting.index(digest) if digest in waiting else len(waiting)
        came_s = loop.time()
        index = await self.queue.acquire(digest, lambda slot: self.write(digest, slot))
        try:
            self.waits.append((loop.time() - came_s, place))
            assert self.content[index] == digest
            await asyncio.sleep(seconds)
            assert self.content[index] == digest
        finally:
            self.queue.release(digest)

    def assert_empty(self) -> None:
        """Nobody waits, nothing is counted, nothing is closed."""
        assert self.table.waiting() == ()
        assert self.queue._waiters == self.queue._writes == {}
        assert not self.queue._copies
        assert all(not (s.requests or s.closed) for s in self.table._slots.values())
        assert self.table.used + len(self.table._free) == self.table.count


async def arrive(bench: Bench, after_s: float, digest: Digest, seconds: float, leaves_s: float | None = None) -> None:
    """Be a client that comes after a while, and may leave."""
    await asyncio.sleep(after_s)
    try:
        await asyncio.wait_for(bench.request(digest, seconds), leaves_s)
    except TimeoutError:
        assert leaves_s is not None


def in_virtual_time(body) -> float:
    """Run a coroutine function and return the virtual seconds that passed."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(body())
        return runner.get_loop().time()


@given(st.lists(REQUEST, max_size=25), st.integers(1, 3), st.booleans())
@settings(deadline=None, max_examples=150)
def test_every_version_is_served_within_the_bound_and_nothing_leaks(requests, slots, hot) -> None:
    """Whatever arrives, under hot versions whose requests overlap for ever, the stated bound holds."""

    async def body() -> None:
        bench = Bench(slots, patience_s=PATIENCE_S)
        clients = [arrive(bench, a, sha256(b"%d" % v), s, leaves) for a, v, s, leaves in requests]
        if hot:
            times = range(0, 90, 3)
            clients += [arrive(bench, t, sha256(b"hot%d" % i), LONGEST_S) for t in times for i in range(slots)]
        await asyncio.gather(*clients)
        # of a version whose last client left meanwhile
        while bench.queue._copies:  # noqa: ASYNC110
            await asyncio.sleep(COPY_S)
        bench.assert_empty()
        for wait_s, place in bench.waits:
            assert wait_s <= (1 + place // slots) * (PATIENCE_S + 2 * LONGEST_S + COPY_S)

    in_virtual_time(body)


def test_without_patience_a_cold_version_starves() -> None:
    """The test that can fail: hot requests that overlap keep their slot until they stop, unless patience ends."""
    waited = {}
    for patience_s in (PATIENCE_S, math.inf):

        async def body(patience_s: float = patience_s) -> None:
            bench = Bench(1, patience_s=patience_s, patience_requests=10**9)
            hot = [arrive(bench, 3 * i, A, LONGEST_S) for i in range(100)]
            cold = asyncio.create_task(arrive(bench, 10, B, 1))
            everything = asyncio.gather(*hot)
            await cold
            waited[patience_s] = asyncio.get_running_loop().time() - 10
            await everything
            bench.assert_empty()

        in_virtual_time(body)
    assert waited[PATIENCE_S] <= PATIENCE_S + LONGEST_S + COPY_S + 1
    assert waited[math.inf] > 280


def test_patience_also_ends_by_requests() -> None:
    """After so many requests of the resident version, the next one waits behind the cold version."""
    table = SlotTable(1, patience_s=math.inf, patience_requests=5)
    loaded(table, A)
    table.acquire(A, 0.0)
    table.wait(B, 0.0)
    for _ in range(5):
        table.acquire(A, 0.0)
    with pytest.raises(Overloaded, match="gives its slot"):
        table.acquire(A, 0.0)
    for _ in range(6):
        assert table.grant() is None
        table.release(A)
    assert table.grant() == (B, 0)


def test_one_version_is_closed_for_one_that_waits_and_opened_when_it_leaves() -> None:
    """The least used of the residents gives way, the others go on; without the waiting one it is open again."""
    table = SlotTable(3, patience_s=1.0)
    for digest, requests in ((A, 3), (B, 1), (C, 2)):
        loaded(table, digest)
        for _ in range(requests):
            table.acquire(digest, 0.0)
    cold = sha256(b"cold")
    table.wait(cold, 0.0)
    assert [table.admits(d, 0.9) for d in (A, B, C)] == [True, True, True]
    assert [table.admits(d, 1.0) for d in (A, B, C)] == [True, False, True]
    table.leave(cold)
    assert [table.admits(d, 2.0) for d in (A, B, C)] == [True, True, True]


def test_a_pinned_version_is_never_closed_and_all_pinned_is_said() -> None:
    """Who waits for slots that can never fall free is told at once."""
    table = SlotTable(2, patience_s=0.0)
    for digest in (A, B):
        loaded(table, digest)
        table.acquire(digest, 0.0)
    table.pin(A)
    table.wait(C, 0.0)
    assert table.admits(A, 1.0)
    assert not table.admits(B, 1.0)
    table.leave(C)
    table.pin(B)
    with pytest.raises(Overloaded, match="all 2 adapter slots are pinned"):
        table.wait(C, 2.0)


def test_a_closed_version_whose_turn_comes_is_opened_not_copied_again() -> None:
    """Its weights are there. And as it needs no slot, no other version is closed for it."""
    table = SlotTable(2, patience_s=1.0)
    for digest in (A, B):
        loaded(table, digest)
        table.acquire(digest, 0.0)
    table.acquire(B, 0.0)
    table.wait(C, 0.0)
    assert not table.admits(A, 1.0)
    table.wait(A, 1.0)
    assert table.admits(B, 5.0)
    table.release(B)
    table.release(B)
    assert table.grant() == (C, 0 if table.requests(A) == 0 else 1)
    assert table.grant() == (A, None)
    assert table.admits(A, 9.0)
    table.wait(B, 9.0)
    assert not table.admits(A, 20.0)
    table.wait(A, 20.0)
    table.leave(B)
    assert table.grant() == (A, None)
    table.acquire(A, 20.0)


def test_the_first_in_the_queue_is_opened_if_it_is_there() -> None:
    """Two versions take turns in one slot; the one that is resident when its turn comes needs no copy."""
    table = SlotTable(1, patience_s=0.0)
    loaded(table, A)
    table.acquire(A, 0.0)
    table.wait(B, 0.0)
    assert not table.admits(A, 0.0)
    table.wait(A, 0.0)
    table.wait(C, 0.0)
    del table._waiting[B]  # what `leave` does, without its opening of A
    assert table.grant() == (A, None)
    assert table.waiting() == (C,)


def test_a_turn_that_comes_as_the_client_leaves_is_given_back() -> None:
    """The slot was granted in the same moment: it is counted, so it must be released."""

    async def body() -> None:
        bench = Bench(1)
        holder = asyncio.create_task(bench.request(A, 5))
        await asyncio.sleep(2)
        leaver = asyncio.create_task(bench.request(B, 5))
        await asyncio.sleep(0)
        await holder
        await asyncio.sleep(0.5)  # B is being copied
        (turn,) = bench.queue._waiters[B]
        turn.add_done_callback(lambda _: leaver.cancel())
        with pytest.raises(asyncio.CancelledError):
            await leaver
        assert not turn.cancelled()
        assert bench.table.ready() == (B,)
        bench.assert_empty()

    in_virtual_time(body)


def test_a_copy_that_fails_frees_the_slot_for_the_next() -> None:
    """All who waited for the broken one get its error; the version behind it is served."""

    async def body() -> None:
        bench = Bench(1)

        async def broken(slot: int) -> None:
            await asyncio.sleep(1)
            raise AdapterInvalid("torn")

        first, second = (asyncio.create_task(bench.queue.acquire(A, broken)) for _ in range(2))
        await asyncio.sleep(0)
        await bench.request(B, 1)
        for task in (first, second):
            with pytest.raises(AdapterInvalid, match="torn"):
                await task
        bench.assert_empty()
        assert bench.copies == 1

    assert in_virtual_time(body) == 3
