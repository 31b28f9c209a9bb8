"""What `benchmarks.utility` trains on: public owners, on whom clip and rate are tuned, and private ones.

Tuning sees public owners only, who are no part of any federation measured, so that it costs no epsilon. There are
fewer of them than a large federation has: their noise is scaled so that their mean has as much as the mean of all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from benchmarks.utility_federation import RECORDS, Case, Knobs, train
from benchmarks.utility_model import Records, World, score
from fedllm.errors import AdapterInvalid, NonFiniteUpdate
from fedllm.messages.mechanism import UNIT_OWNER, UNIT_RECORD

PUBLIC_OWNERS, PUBLIC_HELD = 40, 100
HELD = 20
"""Held-out records of each private owner; all owners' together are the common held-out set."""
MOST_ALONE = 20
_PUBLIC, _PRIVATE = 0, 1
CLIPS: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
RATES: dict[str, tuple[float, ...]] = {UNIT_RECORD: (0.3, 1.0, 3.0, 10.0, 30.0), UNIT_OWNER: (0.3, 1.0, 3.0, 10.0)}
PLAIN_RATES: tuple[float, ...] = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True)
class Data:
    """Owners' training records, and each one's held-out records."""

    silos: tuple[Records, ...]
    held: tuple[Records, ...]

    @property
    def common(self) -> Records:
        """Everybody's held-out records."""
        return Records.joined(list(self.held))


@dataclass(frozen=True)
class Score:
    """Held-out accuracy and loss (nats): on everybody's records, and on those of the owners trained on alone."""

    accuracy: float
    loss: float
    at_home: float


def public_data(world: World) -> Data:
    """Return the public owners."""
    return _draw(world, _PUBLIC, 0, PUBLIC_OWNERS, PUBLIC_HELD)


def private_data(world: World, seed: int, owners: int) -> Data:
    """Return the private owners of one seed."""
    return _draw(world, _PRIVATE, seed, owners, HELD)


def _draw(world: World, split: int, seed: int, owners: int, held: int) -> Data:
    parts = [world.owner((split, seed, owner), RECORDS + held).split(RECORDS) for owner in range(owners)]
    return Data(tuple(train for train, _ in parts), tuple(held for _, held in parts))


def groups(case: Case, available: int) -> list[list[int]]:
    """Return which owners are trained on, experiment by experiment: small federations and owners alone have several."""
    size = min(case.owners, available)
    whole = [list(range(at, at + size)) for at in range(0, available - size + 1, size)]
    return whole[: MOST_ALONE if size == 1 else 3]


def thinned(case: Case, available: int) -> Case:
    """Return the case for a federation of `available` silos that stands for one of `case.owners`.

    In one place noise is added once, so that its share of the mean falls with the number of records and not its root.
    """
    share = min(1.0, available / case.owners)
    return replace(case, thinned=share if case.arm == "central" else math.sqrt(share))


def outcome(world: World, data: Data, case: Case, knobs: Knobs, seed: str) -> Score:
    """Train by `case` on `data` and return the mean score over its groups.

    A model that is not finite has nothing right and an infinite loss.
    """
    common = data.common
    rows: list[tuple[float, float, float]] = []
    for group in groups(case, len(data.silos)):
        silos = [data.silos[index] for index in group]
        if case.arm == "central":
            silos = [Records.joined(silos)]
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            try:
                state = train(world, silos, case, knobs, f"{seed}/{group[0]}")
            except (AdapterInvalid, NonFiniteUpdate):
                rows.append((0.0, math.inf, 0.0))
                continue
            home = Records.joined([data.held[index] for index in sorted(set(group))])
            rows.append((*score(world, state.factors, common), score(world, state.factors, home)[0]))
    means = np.mean(rows, axis=0)
    return Score(float(means[0]), float(means[1]), float(means[2]))


def grid(case: Case, *, quick: bool = False) -> list[Knobs]:
    """Return the settings that tuning tries."""
    # every second setting; the smallest rate under a clip is kept, without it the owner unit learns nothing
    some, least = (slice(1, None, 2), slice(0, None, 2)) if quick else (slice(None), slice(None))
    if not case.clipped:
        return [Knobs(math.inf, rate) for rate in PLAIN_RATES[some]]
    return [Knobs(clip, rate) for clip, rate in product(CLIPS[some], RATES[case.unit][least])]


def tune(world: World, public: Data, case: Case, tries: Sequence[Knobs]) -> Knobs:
    """Return the setting of `tries` with the best accuracy on the public held-out records."""
    case = thinned(case, len(public.silos))
    return max(tries, key=lambda knobs: outcome(world, public, case, knobs, "tune").accuracy)
