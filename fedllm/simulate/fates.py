"""What goes wrong in a simulated round, drawn before it: who is lost, who is late, who misbehaves, and where."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from fedllm import wire
from fedllm.errors import ConfigError
from fedllm.ids import OwnerId
from fedllm.messages.envelope import Envelope, Sealed
from fedllm.messages.round import Confirm, Unmask, decode_body
from fedllm.relay.memory import Direction, Faults, Passage
from fedllm.rng import Rng, SeededRng, uniform_floats

_STEPS = {
    "Begin": 0, "Retry": 0, "FetchAdvertise": 0, "ShareKeys": 1, "SendMasked": 2, "Confirm/update": 3,
    "Unmask/update": 4, "Evaluate": 5, "FetchScores": 5, "Confirm/evaluation": 6, "Unmask/evaluation": 7,
}  # fmt: skip
"""Place in the round of each request; its reply is the arrow after it."""
ARROWS = 2 * len(set(_STEPS.values()))


class Misdeed(StrEnum):
    """How an owner misbehaves. The protocol must name it, or end in the right sum all the same."""

    BAD_SHARES = "bad-shares"
    """Deals sealed shares that do not open."""
    WRONG_SHARES = "wrong-shares"
    """Answers unmask with shares it was never dealt."""
    SHORT_VECTOR = "short-vector"
    """Sends a masked vector of another length than its head says."""
    OTHER_SIGNATURE = "other-signature"
    """Signs its masked vector with a key that nobody pinned."""
    FALSE_COMPLAINT = "false-complaint"
    """Claims that good shares do not open."""


MISDEEDS = tuple(Misdeed)


@dataclass(frozen=True)
class Chances:
    """Probabilities for each owner in each round; an owner meets one fate at most.

    Attributes
    ----------
    dropout : float
        From a random arrow of the round on nothing reaches or leaves the owner.
    straggler : float
        One random arrow of the round takes longer than its phase may.
    corrupt : float
        It commits a random `Misdeed`.
    """

    dropout: float = 0.0
    straggler: float = 0.0
    corrupt: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what is no probability."""
        for name in ("dropout", "straggler", "corrupt"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ConfigError(f"{name} is {value:g}: a probability from 0 to 1 expected")
        total = self.dropout + self.straggler + self.corrupt
        if total > 1:
            raise ConfigError(f"dropout, straggler and corrupt add up to {total:g}: 1 at most, an owner has one fate")


@dataclass
class Fates:
    """Every owner's fate in one round, and how far each has come.

    Attributes
    ----------
    lost, late : dict[OwnerId, int]
        Owner to the arrow: even ones are requests, odd ones replies, `ARROWS` in a round.
    misdeeds : dict[OwnerId, Misdeed]
    """

    lost: dict[OwnerId, int] = field(default_factory=dict)
    late: dict[OwnerId, int] = field(default_factory=dict)
    misdeeds: dict[OwnerId, Misdeed] = field(default_factory=dict)
    _gone: set[OwnerId] = field(default_factory=set)
    _asked: dict[OwnerId, int] = field(default_factory=dict)

    @classmethod
    def draw(cls, owners: Sequence[OwnerId], chances: Chances, rng: Rng) -> Fates:
        """Draw a round's fates; the same source gives the same ones."""
        fates = cls()
        kinds = uniform_floats(rng, len(owners))
        places = uniform_floats(rng, len(owners))
        for owner, kind, place in zip(owners, kinds, places, strict=True):
            arrow = int(place * ARROWS)
            if kind < chances.dropout:
                fates.lost[owner] = arrow
            elif kind < chances.dropout + chances.straggler:
                fates.late[owner] = arrow
            elif kind < chances.dropout + chances.straggler + chances.corrupt:
                fates.misdeeds[owner] = MISDEEDS[int(place * len(MISDEEDS))]
        return fates

    def drops(self, passage: Passage) -> bool:
        """Whether a message is lost because its owner is: from its arrow on all are."""
        owner = OwnerId(passage.node)
        if owner not in self.lost:
            return False
        arrow = self._arrow(owner, passage)
        if arrow is not None and arrow >= self.lost[owner]:
            self._gone.add(owner)
        return owner in self._gone

    def delay_s(self, passage: Passage) -> float:
        """Return the seconds a message is late: more than any phase allows, or none."""
        owner = OwnerId(passage.node)
        return math.inf if owner in self.late and self._arrow(owner, passage) == self.late[owner] else 0.0

    def _arrow(self, owner: OwnerId, passage: Passage) -> int | None:
        if passage.direction is Direction.TO_COORDINATOR:
            return self._asked.get(owner)
        step = step_of(passage.data)
        if step is None:
            self._asked.pop(owner, None)
            return None
        self._asked[owner] = 2 * step + 1
        return 2 * step


class Weather:
    """The fates of the round under way, as the faults of a `MemoryCarrier` whose nodes have their owners' names."""

    def __init__(self) -> None:
        self.fates = Fates()

    def faults(self) -> Faults:
        """Return the predicates; they ask for the fates of the round that a message belongs to."""
        return Faults(drop=self._drops, delay_s=self._delay_s)

    def _drops(self, passage: Passage) -> bool:
        return self.fates.drops(passage)

    def _delay_s(self, passage: Passage) -> float:
        return self.fates.delay_s(passage)


Draw = Callable[[int, Sequence[OwnerId]], Fates]
"""(number of the round, everybody) to what happens to them in it."""


def drawn(seed: int, chances: Chances) -> Draw:
    """Return the source of a simulation's fates; every round has a stream of its own."""
    return lambda number, owners: Fates.draw(owners, chances, SeededRng(f"simulate/{seed}/fates/{number}"))


def request_in(data: bytes) -> Envelope:
    """Return the envelope in sealed bytes, unverified: the simulator stands beside the owner who verifies it."""
    return wire.decode(Envelope, wire.decode(Sealed, data).envelope)


def step_of(data: bytes) -> int | None:
    """Return the place in the round of a sealed request, None if it is outside one (``Hello``, ``Close``)."""
    envelope = request_in(data)
    name = envelope.kind
    if name in {Confirm.__name__, Unmask.__name__}:
        body = decode_body(name, envelope.body)
        purpose = body.purpose if isinstance(body, Confirm) else body.request.purpose  # type: ignore[union-attr]
        name = f"{name}/{purpose}"
    return _STEPS.get(name)
