"""The scheduler finishes everything, within its limits, and leaks no block."""

from __future__ import annotations

from collections import Counter
from itertools import cycle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.ids import sha256
from fedllm.serving.engine import SamplingParams
from fedllm.serving.fair import OUTPUT_WEIGHT, PROMPT_WEIGHT
from fedllm.serving.native.blocks import BlockPool
from fedllm.serving.native.scheduler import Scheduler, Work
from fedllm.serving.native.sequence import Sequence

VERSIONS = (sha256(b"a"), sha256(b"b"))
REQUEST = st.tuples(
    st.integers(1, 14),  # prompt
    st.integers(1, 8),  # output
    st.integers(0, 1),  # version
    st.booleans(),  # scoring
    st.one_of(st.none(), st.integers(0, 12)),  # cancelled at this step
    st.integers(0, 5),  # arrives at this step
    st.sampled_from(["", "acme", "zeta"]),  # client
)
LONGEST_PROMPT, LONGEST = 14 + 8, 14 + 8  # what is to be scored is given like a prompt


def make(index: int, prompt: int, output: int, version: int, scoring: bool, client: str = "") -> Sequence:
    """Return a sequence whose text is often the beginning of another's."""
    tokens = [i % 3 for i in range(prompt + (output if scoring else 0))]
    params = SamplingParams(max_tokens=1 if scoring else output)
    return Sequence(index, version, VERSIONS[version], tokens, prompt, params, scoring, client=client)


def bound(max_running: int) -> float:
    """Return U of `fedllm.serving.fair` for the requests of this file."""
    return max(PROMPT_WEIGHT * LONGEST_PROMPT, OUTPUT_WEIGHT * LONGEST * max_running)


def count_service(scheduler: Scheduler) -> Counter[str]:
    """Return what each client has been charged, counted from now on."""
    service: Counter[str] = Counter()
    charge = scheduler.waiting.charge

    def counted(client: str, tokens: float) -> None:
        service[client] += tokens
        charge(client, tokens)

    scheduler.waiting.charge = counted
    return service


def compute(item: Work, token: int) -> None:
    """Stand in for the model: a completed sequence gets a token, or ends if it is scored."""
    if item.completes and item.sequence.scoring:
        item.sequence.finish_reason = "stop"
    elif item.completes:
        item.sequence.append(token)


@given(st.lists(REQUEST, max_size=8), st.integers(1, 4), st.integers(0, 6), st.integers(8, 14))
@settings(deadline=None, max_examples=200)
def test_everything_finishes_and_no_block_leaks(requests, max_running, extra_budget, blocks) -> None:
    """Whatever arrives, is preempted or cancelled: budgets hold, all others end complete, all blocks return."""
    pool = BlockPool(blocks, 3)
    scheduler = Scheduler(pool, max_running=max_running, max_step_tokens=max_running + extra_budget)
    sequences = [make(i, *request[:4], request[6]) for i, request in enumerate(requests)]
    cancelled: set[int] = set()
    for step in range(1000):
        for sequence, request in zip(sequences, requests, strict=True):
            if request[5] == step:
                scheduler.add(sequence)
            if request[4] == step and not sequence.ended:
                cancelled.add(sequence.id)
                scheduler.cancel(sequence)
        work = scheduler.schedule()
        assert sum(item.count for item in work) <= scheduler.max_step_tokens
        assert len(scheduler.running) <= max_running
        held = Counter(block for s in scheduler.running for block in s.blocks)
        assert [held[b] for b in range(blocks)] == pool._users
        for item in work:
            assert 1 <= item.count <= item.sequence.pending
            assert len(item.sequence.blocks) * 3 >= item.sequence.computed + item.count
            compute(item, step % 3)
        scheduler.finish(work)
        if step > 12 and not scheduler.running and not scheduler.waiting:
            break
        assert work or step <= 12
    assert pool.free == blocks
    for sequence, request in zip(sequences, requests, strict=True):
        late_cancel = request[4] is not None and request[4] < request[5]
        if sequence.id not in cancelled or late_cancel:
            assert sequence.finish_reason is not None
            assert sequence.scoring or sequence.generated == request[1]


def test_decodes_are_not_held_up_by_a_long_prompt() -> None:
    """While a long prompt is computed in chunks, a decoding stream gets its token in every step."""
    scheduler = Scheduler(BlockPool(100, 4), max_running=4, max_step_tokens=8)
    short, long = make(0, 1, 20, 0, scoring=False), make(1, 60, 1, 1, scoring=False)
    for sequence in (short, long):
        scheduler.add(sequence)
    for step in range(8):
        work = scheduler.schedule()
        assert short in [item.sequence for item in work]
        for item in work:
            if item.completes:
                item.sequence.append(step)
        scheduler.finish(work)
    assert short.generated == 8
    assert long.computed >= 8 * 6


def test_a_request_that_can_never_fit_is_refused() -> None:
    """It would otherwise wait for ever and block the queue."""
    scheduler = Scheduler(BlockPool(2, 4), max_running=1, max_step_tokens=4)
    with pytest.raises(ValueError, match="needs 3 blocks, there are 2"):
        scheduler.add(make(0, 5, 4, 0, scoring=False))


@given(st.lists(REQUEST, min_size=1, max_size=10), st.integers(1, 4), st.integers(0, 6), st.integers(8, 14))
@settings(deadline=None, max_examples=150)
def test_one_client_alone_is_plain_first_come_first_served(requests, max_running, extra_budget, blocks) -> None:
    """Its sequences start as they came, at the latest after as many steps as the older ones have tokens."""
    scheduler = Scheduler(BlockPool(blocks, 3), max_running=max_running, max_step_tokens=max_running + extra_budget)
    sequences = [make(i, *request[:4]) for i, request in enumerate(requests)]
    for sequence in sequences:
        scheduler.add(sequence)
    older_tokens = [0]
    for _, sequence in zip(requests, sequences, strict=True):
        output = 0 if sequence.scoring else sequence.params.max_tokens
        older_tokens.append(older_tokens[-1] + len(sequence.tokens) + output)
    started: list[int] = []
    step = 0
    while scheduler.running or scheduler.waiting:
        work = scheduler.schedule()
        for item in work:
            if item.sequence.id not in started:
                assert step <= older_tokens[item.sequence.id]
                started.append(item.sequence.id)
        for item in work:
            compute(item, step % 3)
        scheduler.finish(work)
        # Preempted ones come back to their place, too.
        order = [sequence.id for sequence in (*scheduler.running, *scheduler.waiting)]
        assert order == sorted(order)
        step += 1
    assert started == sorted(started) == list(range(len(requests)))


@given(st.lists(REQUEST, min_size=1, max_size=12), st.integers(1, 4), st.integers(0, 6), st.integers(8, 14))
@settings(deadline=None, max_examples=150)
def test_of_many_clients_none_starves_and_none_overtakes_itself(requests, max_running, extra_budget, blocks) -> None:
    """First starts are in order within a client, and late by no more than others may be served meanwhile.

    That is: steps waited are at most the tokens of what was taken before, and no other client is served
    more in the meantime than the one that waits, and 2 U.
    """
    scheduler = Scheduler(BlockPool(blocks, 3), max_running=max_running, max_step_tokens=max_running + extra_budget)
    service = count_service(scheduler)
    sequences = [make(i, *request[:4], request[6]) for i, request in enumerate(requests)]
    added: dict[int, tuple[int, Counter[str]]] = {}
    started: list[Sequence] = []
    take, step = scheduler.waiting.pop, 0

    def checked() -> Sequence:
        sequence = take()
        if sequence not in started:
            since, before = added[sequence.id]
            ahead = sum(len(s.tokens) + (0 if s.scoring else s.params.max_tokens - s.generated) for s in started)
            assert step - since <= ahead
            had = {client: service[client] - before[client] for client in service}
            own = had.get(sequence.client, 0)
            assert all(other <= own + 2 * bound(max_running) for other in had.values())
            started.append(sequence)
        return sequence

    scheduler.waiting.pop = checked
    while step <= 5 or scheduler.running or scheduler.waiting:
        for sequence, request in zip(sequences, requests, strict=True):
            if request[5] == step:
                scheduler.add(sequence)
                added[sequence.id] = step, Counter(service)
        work = scheduler.schedule()
        for item in work:
            compute(item, step % 3)
        scheduler.finish(work)
        step += 1
        assert step < 1000
    for client in {sequence.client for sequence in sequences}:
        own = [sequence.id for sequence in started if sequence.client == client]
        assert own == sorted((i for i in own), key=lambda i: (added[i][0], i))
    assert len(started) == len(requests)


@given(
    st.lists(st.tuples(st.integers(1, 14), st.integers(1, 8)), min_size=2, max_size=5),
    st.integers(1, 4),
    st.integers(0, 30),
    st.integers(8, 40),
    st.sampled_from([(1.0, 1.0), (2.0, 1.0), (0.5, 2.0)]),
)
@settings(deadline=None, max_examples=60)
def test_two_that_always_wait_are_served_alike(sizes, max_running, extra_budget, blocks, weights) -> None:
    """One takes the odd sizes and one the even ones: service over weight never differs by more than 2 U / weight."""
    scheduler = Scheduler(BlockPool(blocks, 3), max_running=max_running, max_step_tokens=max_running + extra_budget)
    service = count_service(scheduler)
    made, gaps = 0, [0.0]
    turns = [cycle(sizes[::2]), cycle(sizes[1::2])]
    for step in range(120):
        for who in (0, 1):
            # More than can be taken in one step, so that it waits at every moment.
            while sum(sequence.client == str(who) for sequence in scheduler.waiting) <= max_running:
                prompt, output = next(turns[who])
                made += 1
                tokens = [(made * 7 + i) % 50 for i in range(prompt)]
                sequence = Sequence(made, 0, VERSIONS[0], tokens, prompt, SamplingParams(max_tokens=output))
                sequence.client, sequence.weight = str(who), weights[who]
                scheduler.add(sequence)
        work = scheduler.schedule()
        for item in work:
            compute(item, step % 3)
        scheduler.finish(work)
        gaps.append(service["0"] / weights[0] - service["1"] / weights[1])
    assert max(gaps) - min(gaps) <= 2 * bound(max_running) / min(weights)


@given(st.lists(REQUEST, max_size=10), st.integers(1, 4), st.integers(0, 6), st.integers(8, 14))
@settings(deadline=None, max_examples=150)
def test_each_token_is_charged_once_and_cached_ones_are_not(requests, max_running, extra_budget, blocks) -> None:
    """Preempted and computed again or not: prompt less what the cache had at first, and the output, at their price."""
    scheduler = Scheduler(BlockPool(blocks, 3), max_running=max_running, max_step_tokens=max_running + extra_budget)
    service = count_service(scheduler)
    sequences = [make(i, *request[:4], request[6]) for i, request in enumerate(requests)]
    for sequence in sequences:
        scheduler.add(sequence)
    run_to_end(scheduler)
    want: Counter[str] = Counter()
    least: Counter[str] = Counter()
    for sequence in sequences:
        output = 0 if sequence.scoring else OUTPUT_WEIGHT * sequence.generated
        want[sequence.client] += PROMPT_WEIGHT * (sequence.given - sequence.prompt_cached) + output
        least[sequence.client] += PROMPT_WEIGHT + output
    if not scheduler.preemptions:
        assert service == want
    # One that is preempted in its prompt may find more in the cache when it comes again.
    assert all(least[client] <= service[client] <= want[client] for client in want)


@given(st.lists(REQUEST, max_size=10), st.integers(1, 4), st.integers(0, 6))
@settings(deadline=None, max_examples=150)
def test_a_decoding_stream_gets_its_token_in_every_step(requests, max_running, extra_budget) -> None:
    """However long the prompts beside it, a stream waits for one chunk at most; only a preempted one waits longer."""
    scheduler = Scheduler(BlockPool(14, 3), max_running=max_running, max_step_tokens=max_running + extra_budget)
    for i, request in enumerate(requests):
        scheduler.add(make(i, *request[:4], request[6]))
    step = 0
    while scheduler.running or scheduler.waiting:
        decoding = [sequence for sequence in scheduler.running if sequence.pending == 1]
        work = scheduler.schedule()
        chosen = [item.sequence for item in work]
        assert all(sequence in chosen for sequence in decoding if sequence in scheduler.running)
        assert all(sequence in scheduler.waiting for sequence in decoding if sequence not in scheduler.running)
        for item in work:
            compute(item, step % 3)
        scheduler.finish(work)
        step += 1


@given(st.lists(REQUEST, max_size=10), st.integers(0, 12), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=100)
def test_cancelling_all_in_any_order_frees_all_blocks(requests, steps, random) -> None:
    """At any moment, running, preempted or still waiting: nothing is held afterwards."""
    scheduler = Scheduler(BlockPool(10, 3), max_running=3, max_step_tokens=6)
    sequences = [make(i, *request[:4], request[6]) for i, request in enumerate(requests)]
    for sequence in sequences:
        scheduler.add(sequence)
    for step in range(steps):
        work = scheduler.schedule()
        for item in work:
            compute(item, step % 3)
        scheduler.finish(work)
    random.shuffle(sequences)
    for sequence in sequences:
        scheduler.cancel(sequence)
    assert scheduler.pool.free == scheduler.pool.count
    assert not scheduler.running
    assert not scheduler.waiting
    assert scheduler.schedule() == []


def run_to_end(scheduler: Scheduler) -> int:
    """Compute everything and return the number of tokens that the model was given."""
    given_tokens = 0
    while scheduler.running or scheduler.waiting:
        work = scheduler.schedule()
        given_tokens += sum(item.count for item in work)
        for item in work:
            compute(item, 7)
        scheduler.finish(work)
    return given_tokens


def test_continuations_of_one_prompt_compute_it_once() -> None:
    """Eight that wait together: the first computes 40 prompt tokens, the others take 39 // 4 * 4 from its blocks."""
    scheduler = Scheduler(BlockPool(100, 4), max_running=8, max_step_tokens=16)
    for i in range(8):
        scheduler.add(Sequence(i, 0, VERSIONS[0], list(range(40)), 40, SamplingParams(max_tokens=3)))
    assert run_to_end(scheduler) == 40 + 7 * (40 - 36) + 8 * 2
    assert scheduler.prefix_hit_tokens == 7 * 36


def test_a_shared_beginning_is_waited_for_only_within_a_version() -> None:
    """Equal text of two versions is computed twice, in the same step; the same of one version, once."""
    for versions, first_step in (((0, 1), 2), ((0, 0), 1)):
        scheduler = Scheduler(BlockPool(100, 4), max_running=4, max_step_tokens=64)
        for i, version in enumerate(versions):
            tokens = [*range(16), 20 + i, 30 + i]
            scheduler.add(Sequence(i, version, VERSIONS[version], tokens, 18, SamplingParams(max_tokens=2)))
        assert len(scheduler.schedule()) == first_step


def test_a_flood_does_not_hold_up_another_client() -> None:
    """Two of forty long requests run, 38 wait; a short one of another client is taken next, or next but one."""
    scheduler = Scheduler(BlockPool(100, 4), max_running=2, max_step_tokens=16)
    for i in range(40):
        flood = Sequence(i, 0, VERSIONS[0], [i, *range(9)], 10, SamplingParams(max_tokens=10), client="flood")
        scheduler.add(flood)
    for _ in range(5):
        work = scheduler.schedule()
        for item in work:
            compute(item, 7)
        scheduler.finish(work)
    polite = Sequence(40, 0, VERSIONS[0], [50, 51], 2, SamplingParams(max_tokens=2), client="polite")
    scheduler.add(polite)
    while polite in scheduler.waiting:
        work = scheduler.schedule()
        for item in work:
            compute(item, 7)
        scheduler.finish(work)
    assert len(scheduler.waiting) >= 37


def test_a_preempted_sequence_comes_back_before_its_clients_others() -> None:
    """Blocks run out while two run: the younger goes back to where it was, before the next of its client."""
    scheduler = Scheduler(BlockPool(6, 2), max_running=2, max_step_tokens=8)
    first = Sequence(0, 0, VERSIONS[0], [1, 2], 2, SamplingParams(max_tokens=10), client="a")
    second = Sequence(1, 0, VERSIONS[0], [3, 4], 2, SamplingParams(max_tokens=8), client="b")
    third = Sequence(2, 0, VERSIONS[0], [5, 6], 2, SamplingParams(max_tokens=2), client="b")
    for sequence in (first, second, third):
        scheduler.add(sequence)
    while not scheduler.preemptions:
        work = scheduler.schedule()
        for item in work:
            compute(item, 7)
        scheduler.finish(work)
    assert scheduler.running == [first]
    assert list(scheduler.waiting) == [second, third]
    run_to_end(scheduler)
    assert (second.generated, third.generated) == (8, 2)


def test_what_the_cache_had_at_first_is_remembered() -> None:
    """The second of two equal prompts finds 8 of 10 tokens; release and recomputation do not change what it says."""
    scheduler = Scheduler(BlockPool(20, 4), max_running=1, max_step_tokens=8)
    both = [Sequence(i, 0, VERSIONS[0], list(range(10)), 10, SamplingParams(max_tokens=2)) for i in range(2)]
    for sequence in both:
        scheduler.add(sequence)
    assert both[1].prompt_cached is None
    run_to_end(scheduler)
    assert [sequence.prompt_cached for sequence in both] == [0, 8]
    assert both[1].cached == 0
