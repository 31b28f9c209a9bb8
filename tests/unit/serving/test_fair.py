"""The fair queue against a naive twin, the paper's bound, the rule for places in flight, and what an engine does."""

from __future__ import annotations

from collections import Counter, deque
from itertools import cycle, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.serving.tiny_llama import BASE, running_engine

from fedllm.errors import Overloaded, RequestInvalid
from fedllm.serving import fair
from fedllm.serving.engine import GenerationRequest, SamplingParams
from fedllm.serving.fair import OUTPUT_WEIGHT, PROMPT_WEIGHT, FairQueue, Places

CLIENTS = "abcd"
WEIGHTS = {"a": 1.0, "b": 2.0, "c": 0.5, "d": 1.0}
"""Powers of two: sums are exact, and the twin's ties are the queue's."""
STEP = st.tuples(
    st.sampled_from(["push", "push", "push", "pop", "pop", "give back", "remove", "charge", "charge"]),
    st.sampled_from(CLIENTS),
    st.integers(0, 12),
)


class Twin:
    """The same order, computed from one flat list; it remembers everybody for ever."""

    def __init__(self) -> None:
        self.waiting: list[tuple[str, int, int]] = []
        self.counters: dict[str, float] = {}
        self.floor = 0.0
        self.last: str | None = None
        self.arrivals = self.returns = 0

    def counter(self, client: str) -> float:
        """Return service over weight, at least the floor."""
        return max(self.counters.get(client, 0.0), self.floor)

    def push(self, client: str, item: int) -> None:
        """Queue, lifting who has nothing queued."""
        queued = {entry[0] for entry in self.waiting}
        if client not in queued:
            if queued:
                self.floor = min(map(self.counter, queued))
            elif self.last is not None:
                self.floor = self.counter(self.last)
        self.arrivals += 1
        self.waiting.append((client, self.arrivals, item))

    def push_front(self, client: str, item: int) -> None:
        """Give back, before everything with the same counter."""
        self.returns -= 1
        self.waiting.append((client, self.returns, item))

    def order(self) -> list[tuple[str, int, int]]:
        """Return what waits in the order of taking."""
        return sorted(self.waiting, key=lambda entry: (self.counter(entry[0]), entry[1]))

    def pop(self) -> int:
        """Take the first."""
        entry = self.order()[0]
        self.waiting.remove(entry)
        self.last, self.floor = entry[0], self.counter(entry[0])
        return entry[2]

    def charge(self, client: str, tokens: float) -> None:
        """Count service."""
        self.counters[client] = self.counter(client) + tokens / WEIGHTS[client]


@pytest.mark.parametrize("rebase", [2.0**32, 1.0], ids=["", "numbers brought back often"])
@given(steps=st.lists(STEP, max_size=60))
@settings(deadline=None, max_examples=150)
def test_it_takes_what_a_naive_twin_takes(rebase: float, steps: list[tuple[str, str, int]]) -> None:
    """Pushes, takings, returns, removals and charges in any order: head, order and counters agree after each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fair, "_REBASE", rebase)
        patch.setattr(fair, "_FEW", 0)  # forget as early as can be
        queue: FairQueue[int] = FairQueue()
        twin = Twin()
        owner: dict[int, str] = {}
        taken: deque[int] = deque()
        for item, (what, client, number) in enumerate(steps):
            if what == "push":
                owner[item] = client
                queue.push(client, item, weight=WEIGHTS[client])
                twin.push(client, item)
            elif what == "pop" and len(queue):
                taken.append(queue.pop())
                assert taken[-1] == twin.pop()
            elif what == "give back" and taken:
                back = taken.pop() if number % 2 else taken.popleft()
                queue.push_front(owner[back], back)
                twin.push_front(owner[back], back)
            elif what == "remove":
                assert queue.remove(number) == any(entry[2] == number for entry in twin.waiting)
                twin.waiting = [entry for entry in twin.waiting if entry[2] != number]
            elif what == "charge":
                queue.charge(client, number)
                if client not in owner.values():  # its weight is not known yet
                    twin.counters[client] = twin.counter(client) + number
                else:
                    twin.charge(client, number)
            want = [entry[2] for entry in twin.order()]
            assert list(queue) == want
            assert queue.peek() == (want[0] if want else None)
            assert len(queue) == len(want)
            assert set(queue.clients()) == {entry[0] for entry in twin.waiting}
            above = {client: queue.counter(client) - queue._floor for client in CLIENTS}
            assert above == {client: twin.counter(client) - twin.floor for client in CLIENTS}


@given(st.lists(st.tuples(st.sampled_from(CLIENTS), st.integers(0, 20)), max_size=40))
@settings(deadline=None, max_examples=100)
def test_it_is_work_conserving_and_first_come_first_served_within_a_client(pushes: list[tuple[str, int]]) -> None:
    """As long as anything waits something is taken, each item once; nothing overtakes within a client."""
    queue: FairQueue[tuple[str, int]] = FairQueue()
    for number, (client, _) in enumerate(pushes):
        queue.push(client, (client, number))
    taken = []
    while queue:
        taken.append(queue.pop())
        queue.charge(taken[-1][0], pushes[taken[-1][1]][1])
    assert sorted(number for _, number in taken) == list(range(len(pushes)))
    for client in CLIENTS:
        own = [number for name, number in taken if name == client]
        assert own == sorted(own)
    assert queue.peek() is None
    with pytest.raises(IndexError):
        queue.pop()


@given(st.lists(st.integers(0, 9), max_size=30))
def test_one_client_alone_is_plain_first_come_first_served(charges: list[int]) -> None:
    """Whatever it is charged, and whatever is given back."""
    queue: FairQueue[int] = FairQueue()
    for number in range(len(charges)):
        queue.push("only", number)
    for number, charge in enumerate(charges):
        assert queue.pop() == number
        queue.push_front("only", number)
        queue.charge("only", charge)
        assert queue.pop() == number


@given(st.integers(1, 50), st.integers(0, 400), st.booleans())
def test_nobody_gains_by_having_been_idle(served: int, own: int, others_wait: bool) -> None:
    """Who comes back is not below the least of those that wait, or below who was taken last; debts stay."""
    queue: FairQueue[int] = FairQueue()
    queue.push("late", 0)
    queue.pop()
    queue.charge("late", own)
    for number in range(served):
        queue.push("busy", number)
    for _ in range(served):
        queue.pop()
        queue.charge("busy", 5)
    if others_wait:
        queue.push("busy", served)
    before = queue.counter("late")
    queue.push("late", 1)
    assert queue.counter("late") == max(before, queue.counter("busy"))
    assert before >= own


def test_what_was_just_taken_and_is_given_back_has_lost_nothing() -> None:
    """A router that finds no room puts the request back: its client's counter is what it was, and it is next."""
    queue: FairQueue[str] = FairQueue()
    queue.push("polite", "p")
    queue.push("flood", "f")
    queue.charge("flood", 100)
    assert queue.pop() == "p"
    queue.push_front("polite", "p")
    assert queue.counter("polite") == 0
    assert queue.peek() == "p"


def serve(loads: dict, room: int, steps: int, name=lambda client: client) -> list[Counter]:
    """Serve as in the paper, with `room` tokens of memory; return every client's service after each step.

    `loads` has the requests, (prompt, output), of clients that always have more waiting; `name` is what the queue is
    told that a client is called.
    """
    queue: FairQueue[tuple[str, int, int]] = FairQueue()
    service: Counter[str] = Counter()
    waiting: Counter[str] = Counter()
    turns = {client: cycle(sizes) for client, sizes in loads.items()}
    history, running = [], []

    def count(client: str, cost: float) -> None:
        service[client] += cost
        queue.charge(name(client), cost)

    def refill() -> None:
        for client in loads:
            while waiting[client] < 2:
                queue.push(name(client), (client, *next(turns[client])), weight=WEIGHTS[client])
                waiting[client] += 1

    for _ in range(steps):
        refill()
        while (head := queue.peek()) is not None and sum(p + o for _, p, o, _ in running) + sum(head[1:]) <= room:
            client, prompt, output = queue.pop()
            waiting[client] -= 1
            refill()
            count(client, PROMPT_WEIGHT * prompt)
            running.append([client, prompt, output, output])
        for entry in running:
            count(entry[0], OUTPUT_WEIGHT)
            entry[3] -= 1
        running = [entry for entry in running if entry[3]]
        history.append(Counter(service))
    return history


def spread(history: list[Counter], one: str, other: str) -> float:
    """Return the largest difference of two clients' service over weight, over all intervals."""
    gaps = [step[one] / WEIGHTS[one] - step[other] / WEIGHTS[other] for step in history]
    return max(gaps) - min(gaps)


SIZES = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=1, max_size=4)


@given(st.dictionaries(st.sampled_from(CLIENTS), SIZES, min_size=2), st.integers(32, 90))
@settings(deadline=None, max_examples=80)
def test_two_that_always_wait_are_served_alike_within_the_papers_bound(loads: dict, room: int) -> None:
    """Any sizes, weights and memory: service over weight differs by 2 max(w_p L, w_q M) / w at most, at all times."""
    history = serve(loads, room, 100)
    longest = max(prompt for sizes in loads.values() for prompt, _ in sizes)
    names = sorted(loads)
    for one, other in pairwise(names):
        bound = 2 * max(PROMPT_WEIGHT * longest, OUTPUT_WEIGHT * room) / min(WEIGHTS[one], WEIGHTS[other])
        assert spread(history, one, other) <= bound


def test_first_come_first_served_breaks_that_bound() -> None:
    """The same server under one client's name gives the one with long requests ever more: the bound can be missed."""
    loads = {"a": [(20, 12)], "d": [(1, 1)]}
    bound = 2 * max(PROMPT_WEIGHT * 20, OUTPUT_WEIGHT * 40)
    assert spread(serve(loads, 40, 400, lambda _: "a"), "a", "d") > 2 * bound
    assert spread(serve(loads, 40, 400), "a", "d") <= bound


def test_memory_does_not_grow_with_clients_that_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty thousand clients, one after another and then so that two always wait: a bounded number is remembered."""
    monkeypatch.setattr(fair, "MOST_IDLE", 200)
    queue: FairQueue[int] = FairQueue()
    for number in range(10_000):
        queue.push(f"one{number}", number)
        queue.charge(f"one{queue.pop()}", 10)
    assert len(queue._counters) <= 66
    queue.push("patient", 0)
    queue.charge("patient", 5)
    served = False
    queue.push("two0", 0)
    for number in range(1, 10_000):
        queue.push(f"two{number}", number)
        item = queue.pop()
        served = served or "patient" not in queue.clients()
        queue.charge(f"two{item}", 10)
        assert len(queue._counters) <= 2 * 200 + 66
    assert served


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_is_positive_and_finite(weight: float) -> None:
    """Anything else would make a counter stand still, go back, or be no number."""
    with pytest.raises(ValueError, match="weight is"):
        FairQueue().push("a", 1, weight=weight)


def refused(places: Places, client: str) -> bool:
    """Try to take a place."""
    try:
        places.take(client)
    except Overloaded:
        return True
    return False


def test_a_flood_fills_the_places_and_the_polite_one_gets_its_share() -> None:
    """One of 8 + 4: the flood has 8 and is refused; the other gets 4 of the reserve; then it is full for all."""
    places = Places(8, 4)
    assert [refused(places, "flood") for _ in range(9)] == [False] * 8 + [True]
    with pytest.raises(Overloaded, match=r"8 requests are in flight, which is the limit, and this client holds.*: 8"):
        places.take("flood")
    assert [refused(places, "polite") for _ in range(5)] == [False] * 4 + [True]
    with pytest.raises(Overloaded, match="12 requests are in flight, which is the limit with its reserve"):
        places.take("third")
    for _ in range(4):
        places.release("flood")
    assert refused(places, "flood")  # 4 and 4 of 8
    places.release("polite")
    assert not refused(places, "flood")


@given(st.lists(st.tuples(st.booleans(), st.sampled_from(CLIENTS)), max_size=80), st.integers(1, 9), st.integers(0, 5))
def test_places_are_never_more_and_who_is_below_its_share_is_refused_only_when_all_are_taken(
    steps: list[tuple[bool, str]], limit: int, reserve: int
) -> None:
    """Counted beside: the hard limit holds; below the limit nobody is refused; above it only who has its share."""
    places, held = Places(limit, reserve), Counter()
    for take, client in steps:
        if not take:
            if held[client]:
                places.release(client)
                held[client] -= 1
        else:
            sharers = len({name for name in CLIENTS if held[name]} | {client})
            over = held[client] >= limit / sharers
            taken = held.total()
            full = taken >= limit + reserve or (taken >= limit and over)
            assert refused(places, client) == full
            held[client] += not full
        assert len(places) == held.total() <= limit + reserve


def ask(engine, prompt: list[int], client: str, count: int = 4):
    """Start one request of a client; the lease is the base's and needs no end."""
    request = GenerationRequest(tuple(prompt), SamplingParams(max_tokens=count), client, client)
    return engine.generate(engine.lease(BASE), request)


def test_a_stream_says_what_the_prefix_cache_had_from_its_first_chunk_on(tiny_folder, drive) -> None:
    """0 before it; then the whole blocks of the prompt that the tenant had asked before, also after the end."""

    async def body():
        async with running_engine(tiny_folder) as engine:
            found = []
            for client in ("acme", "acme", "zeta"):
                stream = ask(engine, list(range(1, 14)), client)
                assert stream.cached_tokens == 0
                await anext(stream)
                assert stream.cached_tokens == (stream.sequence.prompt_cached or 0)
                tokens = [token async for chunk in stream for token in chunk.token_ids]
                assert len(tokens) == 3
                found.append(stream.cached_tokens)
                await stream.aclose()
            assert found == [0, 12, 0]

    drive(body())


def test_the_engine_keeps_places_for_whoever_does_not_flood(tiny_folder, drive) -> None:
    """One client fills running and queue and is refused; another is served; places come back by end and by cancel."""

    async def body():
        async with running_engine(tiny_folder, max_running=2, max_waiting=2) as engine:
            flood = [ask(engine, [i + 1], "flood", 40) for i in range(4)]
            with pytest.raises(Overloaded, match="and this client holds its share: 4"):
                ask(engine, [9], "flood")
            polite = ask(engine, [7], "polite")
            assert sum([len(chunk.token_ids) async for chunk in polite]) == 4
            for stream in flood[:2]:
                await stream.aclose()
            for stream in flood[2:]:
                assert sum([len(chunk.token_ids) async for chunk in stream]) == 40
            assert len(engine._places) == 0
            with pytest.raises(RequestInvalid, match="weight is 0"):
                engine.generate(engine.lease(BASE), GenerationRequest((1,), SamplingParams(max_tokens=1), weight=0.0))
            assert len(engine._places) == 0

    drive(body())
