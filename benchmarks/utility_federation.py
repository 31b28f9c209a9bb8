"""Training for `benchmarks.utility`: rounds over silos with the product's own clip, noise, accountant and methods.

A bound is a federation of one silo: an owner `alone` has its own records in it, `central` has everybody's. Sums are
plain here: secure aggregation opens the same sum exactly, which its own tests show.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from benchmarks.utility_model import F64, SPEC, Records, World, gradients
from fedllm.adapter import AdapterState
from fedllm.aggregation.methods import get_method
from fedllm.messages.mechanism import (
    DP_SGD,
    RELATION_ADD_REMOVE,
    RELATION_ZERO_OUT,
    SKELLAM,
    UNIT_OWNER,
    UNIT_RECORD,
    Mechanism,
    NoiseShares,
)  # fmt: skip
from fedllm.privacy import accountant
from fedllm.privacy.calibrate import solve
from fedllm.privacy.clip import SLACK, clip_l2
from fedllm.privacy.noise import GaussianGrid
from fedllm.privacy.skellam import SumGrid
from fedllm.rng import Rng, SeededRng, uniform_floats

DELTA = 1e-5
RECORDS = 200
"""Of one owner."""
ABSENT_OR_COLLUDING = 0.2
"""Share of owners whose noise is not counted on: a tenth may drop out, a tenth may side with the coordinator."""
ROUNDS, SAMPLE_RATE = 4, 0.25
LOCAL_STEPS = {UNIT_RECORD: 4, UNIT_OWNER: 10}
"""A step costs epsilon where the unit is a record, and none where it is an owner."""
CLIP_STEPS = 1 << 15
_SILOS_WITHOUT = 200


@dataclass(frozen=True)
class Case:
    """One cell of the grid.

    Attributes
    ----------
    arm : str
        ``federated``, ``alone`` or ``central``.
    owners : int
        Whose records are in it.
    method, unit : str
    epsilon : float
        Over all rounds, at `DELTA`; ``inf`` for no noise.
    clipped : bool
        False for the product's ``privacy = false``: no noise and no clip either. Clipping is a way of normalising, so
        that what noise costs is told from training that is clipped and not noised.
    thinned : float
        Factor on the noise. Below 1 in tuning only, where a few public silos stand for more, and their mean is to
        have the noise that the mean of all has.
    """

    arm: str
    owners: int
    method: str
    unit: str
    epsilon: float
    clipped: bool = True
    thinned: float = 1.0

    @property
    def private(self) -> bool:
        """Whether there is a mechanism at all."""
        return math.isfinite(self.epsilon)

    @property
    def honest(self) -> int:
        """Noise shares that are counted on."""
        return self.owners - math.ceil(ABSENT_OR_COLLUDING * self.owners)

    @property
    def dimension(self) -> int:
        """Entries of an update."""
        return SPEC.layout(get_method(self.method).trainable(1)).size


@dataclass(frozen=True)
class Knobs:
    """What is tuned, on public records only.

    Attributes
    ----------
    clip : float
        L2 norm of a record's gradient or of an owner's update; ``inf`` for none.
    rate : float
        Learning rate. Of clipped gradients: in clip norms, as the product's DP-SGD has it.
    """

    clip: float
    rate: float


def mechanism(case: Case, clip: float) -> Mechanism:
    """Return the mechanism of one round, with the noise that all rounds together need; the clip norm cancels in it."""
    if not case.private:
        return Mechanism.none()
    if case.unit == UNIT_RECORD:
        steps = LOCAL_STEPS[UNIT_RECORD]
        template = Mechanism(DP_SGD, UNIT_RECORD, RELATION_ADD_REMOVE, 1.0, 1.0, SAMPLE_RATE, steps, DELTA)
    else:
        shares = NoiseShares(case.honest, case.dimension, CLIP_STEPS)
        template = Mechanism(SKELLAM, UNIT_OWNER, RELATION_ZERO_OUT, 1.0, 1.0, 1.0, 1, DELTA, shares=shares)
    noise = case.thinned * _noise(template, case.epsilon)
    return replace(template, noise_multiplier=noise, clip_norm=clip)


@cache
def _noise(template: Mechanism, epsilon: float) -> float:
    return solve(template, epsilon=epsilon, delta=DELTA, rounds=ROUNDS, unit=template.unit)


def priced(case: Case) -> float:
    """Return the epsilon that the ledger's accountant finds for all rounds."""
    if not case.private:
        return math.inf
    return accountant.epsilon([mechanism(case, 1.0)] * ROUNDS, DELTA, unit=case.unit)


def noise_over_signal(case: Case) -> float:
    """Return the norm of the noise in a mean over the most that the mean can be: of a step, or of a round's updates.

    Unit record: ``z sqrt(d) / (q N sqrt(n))``, expected. Unit owner: about ``z sqrt(d) / n``.
    """
    if not case.private:
        return 0.0
    found = mechanism(case, 1.0)
    if case.unit == UNIT_OWNER:
        return found.noise_over_signal(case.owners)
    apart = math.sqrt(case.owners) if case.arm == "federated" else case.owners
    return found.noise_multiplier * math.sqrt(case.dimension) / (SAMPLE_RATE * RECORDS * apart)


def train(world: World, silos: list[Records], case: Case, knobs: Knobs, seed: str) -> AdapterState:
    """Run `ROUNDS` rounds over the silos from PEFT's start; return the adapter.

    Raises
    ------
    AdapterInvalid
        If training diverges beyond what an adapter may hold.
    """
    method, rng = get_method(case.method), SeededRng(f"utility/{seed}")
    state = AdapterState.initial(SPEC, SeededRng(f"utility/start/{seed}"))
    for number in range(1, ROUNDS + 1):
        total = np.zeros(case.dimension)
        for records in silos:
            total += update(world, state, records, case, knobs, number, rng)
        state = method.apply(state, (total / len(silos)).astype(np.float32), number)
    return state


def update(world: World, head: AdapterState, records: Records, case: Case, knobs: Knobs, number: int, rng: Rng) -> F64:
    """Return what one silo adds to a round's sum: local minus global factors, clipped and noised where owners are."""
    method = get_method(case.method)
    trained = fit(world, head, records, case, knobs, rng)
    moved = method.update(trained, head, number)
    if case.unit == UNIT_RECORD or math.isinf(knobs.clip):
        return moved.astype(np.float64)
    if not case.private:
        return clip_l2(moved.astype(np.float64), knobs.clip)[0]
    shared = mechanism(case, knobs.clip)
    grid = SumGrid.of(shared)
    return np.asarray(grid.noised(moved, shared, rng) * grid.step)


def fit(world: World, head: AdapterState, records: Records, case: Case, knobs: Knobs, rng: Rng) -> AdapterState:
    """Take a round's local steps: DP-SGD as `fedllm.client.dpsgd` has it, or plain steps on the same sampling.

    A silo's size is public; it is `declared` and not counted, so that a silo whose records are gone still has it.
    """
    layout = SPEC.layout(get_method(case.method).trainable(1))
    clipped = case.unit == UNIT_RECORD and math.isfinite(knobs.clip)
    grid = GaussianGrid(mechanism(case, knobs.clip).noise_multiplier * knobs.clip) if clipped and case.private else None
    if grid is not None:
        grid.check(layout.size, knobs.clip)
    expected = SAMPLE_RATE * records.declared
    adapter, position = dict(head.factors), layout.flatten(head.factors).astype(np.float64)
    for _ in range(LOCAL_STEPS[case.unit]):
        batch = records.pick(np.flatnonzero(uniform_floats(rng, len(records)) < SAMPLE_RATE))
        found = gradients(world, adapter, batch, layout)
        total, rate = found.total(np.ones(len(batch))), knobs.rate
        if clipped:
            within = knobs.clip * (1 - SLACK)
            total, rate = found.total(within / np.maximum(found.norms(), within)), knobs.rate / knobs.clip
        if grid is not None:
            total = grid.add_noise(total, rng)
        position -= rate * total / expected
        adapter |= layout.unflatten(position.astype(np.float32))
    return head.replace(adapter)


def noise_ratio(world: World, case: Case, seed: str) -> tuple[float, float]:
    """Return the variance of a round's updates without any gradient over what the mechanism says, and its error.

    Every silo is empty, and an empty sample is noised like any other. Unit record: a step moves an entry by
    ``rate * noise_multiplier / (sample_rate * declared)``, whatever the clip. Unit owner: a share is
    ``noise_multiplier * clip / sqrt(honest)``.

    Returns
    -------
    ratio : float
        1 if the noise is on and right.
    error : float
        Standard error of the ratio.
    """
    knobs, rng = Knobs(1.0, 1.0), SeededRng(f"utility/noise/{seed}")
    head = AdapterState.initial(SPEC, rng)
    empty = Records.empty(RECORDS)
    found = np.array([update(world, head, empty, case, knobs, 1, rng) for _ in range(_SILOS_WITHOUT)])
    noise = mechanism(case, knobs.clip).noise_multiplier
    if case.unit == UNIT_OWNER:
        expected = (noise * knobs.clip) ** 2 / case.honest
    else:
        expected = LOCAL_STEPS[UNIT_RECORD] * (knobs.rate * noise / (SAMPLE_RATE * RECORDS)) ** 2
    return float((found**2).mean() / expected), math.sqrt(2 / found.size)
