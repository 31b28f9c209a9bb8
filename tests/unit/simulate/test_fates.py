"""What goes wrong in a simulated round: drawn repeatably, and done to exactly the messages it is drawn for."""

from __future__ import annotations

import math

import pytest

from fedllm import wire
from fedllm.errors import ConfigError
from fedllm.identity import SigningIdentity
from fedllm.ids import OwnerId
from fedllm.messages.envelope import COORDINATOR, ENVELOPE_VERSION, Envelope, seal
from fedllm.messages.round import Body, Close, Confirm, FetchAdvertise, Hello
from fedllm.messages.secagg import PURPOSE_EVALUATION, PURPOSE_UPDATE
from fedllm.relay.memory import Direction, Passage
from fedllm.rng import SeededRng
from fedllm.simulate.fates import ARROWS, MISDEEDS, Chances, Fates, drawn

OWNERS = [OwnerId(f"owner-{number:03d}") for number in range(400)]
EAST = OwnerId("east")
KEY = SigningIdentity.from_seed(b"c" * 32)


def request(body: Body) -> Passage:
    """Return a request of the coordinator on its way to east."""
    envelope = Envelope(
        ENVELOPE_VERSION, type(body).__name__, "tools", 1, COORDINATOR, EAST, bytes(16), wire.encode(body)
    )
    return Passage(0, EAST, Direction.TO_OWNER, seal(envelope, KEY))


REPLY = Passage(0, EAST, Direction.TO_COORDINATOR, b"unread")


def test_fates_come_as_often_as_their_chances_say() -> None:
    """Over 400 owners, within five standard deviations; every arrow and every misdeed occurs."""
    fates = Fates.draw(OWNERS, Chances(0.3, 0.2, 0.4), SeededRng(1))
    for found, chance in ((fates.lost, 0.3), (fates.late, 0.2), (fates.misdeeds, 0.4)):
        assert abs(len(found) - 400 * chance) < 5 * math.sqrt(400 * chance * (1 - chance))
    assert set(fates.lost.values()) == set(range(ARROWS))
    assert set(fates.misdeeds.values()) == set(MISDEEDS)
    assert not set(fates.lost) & set(fates.late) | set(fates.lost) & set(fates.misdeeds)


def test_every_round_has_its_own_fates_and_a_seed_repeats_them() -> None:
    """A round's fates do not depend on how many were drawn before."""
    draw, chances = drawn(7, Chances(0.2)), Chances(0.2)
    assert draw(2, OWNERS) == drawn(7, chances)(2, OWNERS)
    assert draw(1, OWNERS) != draw(2, OWNERS)
    assert draw(1, OWNERS) != drawn(8, chances)(1, OWNERS)
    assert drawn(7, Chances())(1, OWNERS) == Fates()


@pytest.mark.parametrize("wrong", [(-0.1, 0, 0), (0, 1.5, 0), (0, 0, float("nan")), (0.5, 0.5, 0.1)])
def test_what_is_no_probability_is_refused(wrong: tuple[float, float, float]) -> None:
    """Nor do three fates of one owner fit in more than one."""
    with pytest.raises(ConfigError, match=r"0 to 1|1 at most"):
        Chances(*wrong)


def test_a_lost_owner_is_heard_until_its_arrow_and_never_after() -> None:
    """Arrow 7 is the reply to the first confirm: the request comes, from then on nothing does, `Close` included."""
    fates = Fates(lost={EAST: 7})
    confirm = request(Confirm(PURPOSE_UPDATE, ()))
    before = [request(Hello(b"?")), request(FetchAdvertise()), REPLY, confirm]
    assert [fates.drops(each) for each in before] == [False] * 4
    after = [REPLY, request(Hello(b"?")), request(FetchAdvertise()), REPLY, request(Close("aborted", None))]
    assert [fates.drops(each) for each in after] == [True] * 5


def test_a_late_owner_is_late_at_one_arrow_and_only_there() -> None:
    """Arrow 12 is the request to confirm the scores; the same request of the update is in time."""
    fates = Fates(late={EAST: 12})
    assert fates.delay_s(request(Confirm(PURPOSE_EVALUATION, ()))) == math.inf
    others = [REPLY, request(Confirm(PURPOSE_UPDATE, ())), REPLY, request(Hello(b"?")), REPLY]
    assert [fates.delay_s(each) for each in others] == [0.0] * 5
    assert not fates.drops(request(Confirm(PURPOSE_EVALUATION, ())))


def test_other_owners_have_no_fate() -> None:
    """What is drawn for one happens to one."""
    fates = Fates(lost={OwnerId("west"): 0}, late={OwnerId("west"): 0})
    assert not fates.drops(request(FetchAdvertise()))
    assert fates.delay_s(request(FetchAdvertise())) == 0.0
