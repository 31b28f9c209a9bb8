"""Secure aggregation: whoever is lost and whenever, the sum is exact or the round aborts; never wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from secagg_world import MANY, U32, World

from fedllm.aggregation.plain import plain_sum
from fedllm.aggregation.secagg import graph
from fedllm.aggregation.secagg.recover import recover
from fedllm.aggregation.secagg.shamir import PRIME, combine, interpolate, split
from fedllm.aggregation.secagg.terms import MIN_PUBLISHED
from fedllm.errors import IntegrityError, ProtocolError, RoundAborted
from fedllm.ids import OwnerId
from fedllm.messages.plan import honest_threshold
from fedllm.rng import OsRng, SeededRng

T = TypeVar("T")
ARROWS = ("advertise", "share", "mask", "confirm", "unmask")
Drops = dict[str, list[OwnerId]]


def draw_drops(draw: st.DrawFn, n: int, most: int) -> Drops:
    """Draw owners to lose, and for each the arrow at which it is lost."""
    drops: Drops = {}
    for owner in draw(st.lists(st.sampled_from(MANY[:n]), unique=True, max_size=min(n, most))):
        drops.setdefault(draw(st.sampled_from(ARROWS)), []).append(owner)
    return drops


@st.composite
def losses(draw: st.DrawFn) -> tuple[int, Drops]:
    """Draw a cohort of the complete graph and its losses: one more than the threshold allows, so that some abort."""
    n = draw(st.integers(3, 12))
    return n, draw_drops(draw, n, n - honest_threshold(n) + 1)


@st.composite
def sparse_losses(draw: st.DrawFn) -> tuple[int, int, int, Drops]:
    """Draw a cohort, k and t of a sparse graph, and its losses."""
    n = draw(st.integers(4, 30))
    k = draw(st.integers(2, min(n - 2, 12)))
    t = draw(st.integers(k // 2 + 1, k))
    return n, k, t, draw_drops(draw, n, n - honest_threshold(n) + 1)


@settings(max_examples=60, deadline=None)
@given(losses(), st.sampled_from([8, 16, 24, 32]), st.integers(1, 40))
def test_the_sum_is_exact_or_the_round_aborts(lost: tuple[int, Drops], bits: int, entries: int) -> None:
    """Every owner may be lost at every arrow; enough left means the plain sum of U3 bit for bit, else an abort."""
    n, drops = lost
    world = World(n, bits, entries)
    t = honest_threshold(n)
    enough = n - sum(map(len, drops.values())) >= max(t, MIN_PUBLISHED)
    try:
        survivors, total = world.run(drops)
    except RoundAborted:
        assert not enough, "aborted although enough owners were left"
        return
    expected = set(world.names) - {o for arrow in ("advertise", "share", "mask") for o in drops.get(arrow, [])}
    assert set(survivors) == expected
    assert enough
    np.testing.assert_array_equal(total, plain_sum([world.values(o) for o in survivors], bits))


@settings(max_examples=60, deadline=None)
@given(sparse_losses(), st.sampled_from([8, 16, 24, 32]))
def test_on_a_sparse_graph_the_sum_is_exact_or_the_round_aborts(lost: tuple[int, int, int, Drops], bits: int) -> None:
    """Whoever is lost, and whoever refuses because too few of its neighbours are left: never a wrong sum."""
    n, k, t, drops = lost
    world = World(n, bits, 5, graph=(k, t))
    try:
        survivors, total = run_sparse(world, drops)
    except RoundAborted:
        assert drops, "aborted although nobody was lost"
        return
    assert len(survivors) >= honest_threshold(n)
    np.testing.assert_array_equal(total, plain_sum([world.values(o) for o in survivors], bits))


def run_sparse(world: World, drops: Drops) -> tuple[tuple[OwnerId, ...], U32]:
    """Run a sum in which an owner that refuses a step is lost from then on, as its daemon would be."""
    gone = set(drops.get("advertise", ()))
    bundles = world.advertise(gone)
    gone |= set(drops.get("share", ()))
    shared = answers((b.owner for b in bundles if b.owner not in gone), lambda o: world.owners[o].share_keys(bundles))
    deliveries = world.coordinator.shared(shared)
    gone |= set(drops.get("mask", ()))
    answers((o for o in deliveries if o not in gone), lambda o: world.send_masked(o, deliveries[o]))
    survivors = world.coordinator.masked()
    gone |= set(drops.get("confirm", ()))
    signed = answers((o for o in survivors if o not in gone), lambda o: world.owners[o].confirm(survivors))
    requests = world.coordinator.confirmed(signed)
    gone |= set(drops.get("unmask", ()))
    return survivors, world.unmask(requests, gone)


def answers(owners: Iterable[OwnerId], ask: Callable[[OwnerId], T]) -> dict[OwnerId, T]:
    """Return the answers of the owners that do not refuse; a refusal is about too few neighbours and nothing else."""
    found: dict[OwnerId, T] = {}
    for owner in owners:
        try:
            found[owner] = ask(owner)
        except ProtocolError as error:
            assert "neighbours, at least" in error.message
    return found


@settings(max_examples=25, deadline=None)
@given(st.integers(5, 20), st.data())
def test_on_a_sparse_graph_few_losses_are_always_withstood(n: int, data: st.DataObject) -> None:
    """With k - t lost at one arrow every owner still has t of its k neighbours, so nothing may abort."""
    k = data.draw(st.integers(3, n - 2))
    t = data.draw(st.integers(k // 2 + 1, k))
    spare = min(k - t, n - honest_threshold(n))
    lost = data.draw(st.lists(st.sampled_from(MANY[:n]), unique=True, max_size=spare))
    world = World(n, graph=(k, t))
    survivors, total = world.run({data.draw(st.sampled_from(ARROWS)): lost})
    np.testing.assert_array_equal(total, plain_sum([world.values(o) for o in survivors], world.bits))


@pytest.mark.parametrize("n", [3, 4, 5, 7])
@pytest.mark.parametrize("arrow", ARROWS)
def test_the_most_losses_allowed_at_each_arrow(n: int, arrow: str) -> None:
    """N - t owners lost at one arrow still open the sum; one more aborts."""
    spare = n - honest_threshold(n)
    world = World(n)
    survivors, total = world.run({arrow: world.names[:spare]})
    np.testing.assert_array_equal(total, plain_sum([world.values(o) for o in survivors], world.bits))
    with pytest.raises(RoundAborted, match="at least"):
        World(n).run({arrow: world.names[: spare + 1]})


@given(st.integers(3, 128))
def test_two_views_of_the_survivors_cannot_both_unmask(n: int) -> None:
    """Fewer than n/3 colluders give both kinds of share, everyone else one: together fewer than 2t."""
    colluders = -(-n // 3) - 1
    assert n + colluders < 2 * honest_threshold(n)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 60), st.data())
def test_two_views_cannot_both_unmask_on_a_sparse_graph_either(k: int, data: st.DataObject) -> None:
    """Fewer than 2t - k corrupt of k holders: both kinds of share together are fewer than 2t."""
    t = data.draw(st.integers(k // 2 + 1, k))
    corrupt = data.draw(st.integers(0, 2 * t - k - 1))
    assert k + corrupt < 2 * t


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.data())
def test_picks_are_a_sorted_subset(n: int, data: st.DataObject) -> None:
    """K distinct candidates, in order; k of k is everybody."""
    k = data.draw(st.integers(0, n))
    candidates = [OwnerId(f"o{i:02d}") for i in range(n)]
    picks = graph.pick(candidates, k, OsRng())
    assert list(picks) == sorted(set(picks))
    assert len(picks) == k
    assert set(picks) <= set(candidates)


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=32, max_size=32), st.integers(1, 12), st.data())
def test_any_threshold_many_shares_give_the_secret(secret: bytes, n: int, data: st.DataObject) -> None:
    """Shamir: whichever t of the n shares are combined, the secret comes back."""
    t = data.draw(st.integers(1, n))
    shares = split(secret, t, range(1, n + 1), OsRng())
    chosen = data.draw(st.permutations(sorted(shares)))[:t]
    assert combine({x: shares[x] for x in chosen}) == secret


@settings(max_examples=40, deadline=None)
@given(st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32), st.integers(2, 8))
def test_fewer_shares_than_the_threshold_fit_every_secret(secret: bytes, other: bytes, t: int) -> None:
    """T - 1 shares of one secret extend to a valid sharing of any other: they say nothing."""
    shares = split(secret, t, range(1, t + 1), OsRng())
    known = {x: shares[x] for x in range(1, t)}
    known[0] = int.from_bytes(other, "big")
    completed = {**{x: shares[x] for x in range(1, t)}, t: interpolate(known, t)}
    assert combine(completed) == other


@settings(max_examples=60, deadline=None)
@given(st.integers(3, 12), st.data())
def test_wrong_shares_are_worked_around_and_nobody_honest_is_named(n: int, data: st.DataObject) -> None:
    """While t right shares are there the secret opens; up to n/3 liars frame nobody, and one is always named."""
    t, colluders = honest_threshold(n), (n - 1) // 3
    secret = SeededRng(n).token(32)
    shares = split(secret, t, range(1, n + 1), OsRng())
    wrong = set(data.draw(st.lists(st.sampled_from(sorted(shares)), unique=True, max_size=min(n - t, colluders))))
    given_shares = {x: (y + (x in wrong)) % PRIME for x, y in shares.items()}
    found, named = recover(given_shares, t, lambda candidate: candidate == secret, colluders=colluders)
    assert found == secret
    assert set(named) <= wrong
    if len(wrong) <= n + 1 - t - colluders:
        assert set(named) == wrong
    too_few = {x: (y + 1) % PRIME if x > t - 1 else y for x, y in shares.items()}
    with pytest.raises(IntegrityError, match="open it"):
        recover(too_few, t, lambda candidate: candidate == secret, colluders=colluders)


def test_two_liars_whose_errors_cancel_frame_nobody() -> None:
    """Errors chosen to cancel at the secret open it and put honest shares off the line: nobody is named."""
    n, t = 7, 5
    secret = SeededRng("framed").token(32)
    shares = split(secret, t, range(1, n + 1), OsRng())
    liars = (1, 2)
    # The polynomial that is 0 at the secret's place and at 3, 4, 5 and not at 1, 2.
    error = {x: x * (x - 3) * (x - 4) * (x - 5) % PRIME for x in liars}
    lied = {x: (y + error.get(x, 0)) % PRIME for x, y in shares.items()}
    assert combine({x: lied[x] for x in range(1, t + 1)}) == secret
    assert interpolate({x: lied[x] for x in range(1, t + 1)}, 6) != shares[6]
    assert recover(lied, t, lambda candidate: candidate == secret, colluders=2) == (secret, ())
