"""Secure aggregation: whoever is lost and whenever, the sum is exact or the round aborts; never wrong."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from secagg_world import NAMES, World

from fedllm.aggregation.plain import plain_sum
from fedllm.aggregation.secagg.recover import recover
from fedllm.aggregation.secagg.shamir import PRIME, combine, interpolate, split
from fedllm.aggregation.secagg.terms import MIN_PUBLISHED
from fedllm.errors import IntegrityError, RoundAborted
from fedllm.messages.plan import honest_threshold
from fedllm.rng import OsRng, SeededRng

ARROWS = ("advertise", "share", "mask", "confirm", "unmask")


@st.composite
def losses(draw: st.DrawFn) -> tuple[int, dict[str, list[str]]]:
    """Draw a cohort size and, for every owner, the arrow at which it is lost (or none)."""
    n = draw(st.integers(3, 7))
    spare = n - honest_threshold(n)
    # One more loss than the threshold allows, so that aborts are drawn too.
    lost = draw(st.lists(st.sampled_from(NAMES[:n]), unique=True, max_size=min(n, spare + 1)))
    drops: dict[str, list[str]] = {}
    for owner in lost:
        drops.setdefault(draw(st.sampled_from(ARROWS)), []).append(owner)
    return n, drops


@settings(max_examples=60, deadline=None)
@given(losses(), st.sampled_from([8, 16, 24, 32]), st.integers(1, 40))
def test_the_sum_is_exact_or_the_round_aborts(lost: tuple[int, dict[str, list[str]]], bits: int, entries: int) -> None:
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
