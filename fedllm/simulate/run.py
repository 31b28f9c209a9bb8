"""Run a simulation and check every sum it opens against the plain sum of what exactly the survivors masked."""

from __future__ import annotations

import asyncio
import math
import resource
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedllm.aggregation.plain import plain_sum
from fedllm.clock import Clock, FakeClock
from fedllm.config import FederationSettings
from fedllm.ids import OwnerId
from fedllm.messages.plan import RoundPlan
from fedllm.registry.store import Registry
from fedllm.relay.memory import MemoryCarrier
from fedllm.rng import SeededRng
from fedllm.server.gate import ScoreGate
from fedllm.server.journal import Journal, RoundRecord
from fedllm.server.ports import RoundEvent
from fedllm.server.roster import Roll
from fedllm.server.rounds.epsilon import advisory_epsilon
from fedllm.server.rounds.runner import RoundRunner
from fedllm.simulate.fates import Draw, Weather
from fedllm.simulate.report import SimulatedRound, SimulationReport
from fedllm.simulate.world import Cast, SimulatedOwner, whole_plan

RingVector = NDArray[np.uint32]
Watch = Callable[[RoundEvent], None]
_MEMORY = Path("/dev/shm")  # noqa: S108 - a folder of this run's own is made in it
_GIB = 2**30
_ANY_LOSS = 1e6


class ExactSums:
    """Everybody's vectors as they are masked, and whether each opened sum is theirs.

    Holds one vector of each owner, shape ``(entries,)``: no copy, the daemons hold the same arrays.
    """

    def __init__(self) -> None:
        self._masked: dict[OwnerId, RingVector] = {}
        self.exact: bool | None = None

    def begin(self) -> None:
        """Forget the round before."""
        self._masked.clear()
        self.exact = None

    def masked(self, owner: OwnerId, values: RingVector) -> None:
        """Note what an owner masked; an attempt replaces the one before."""
        self._masked[owner] = values

    def opened(self, plan: RoundPlan, survivors: Sequence[OwnerId], total: RingVector) -> None:
        """Compare an opened sum, all of it, with the sum without masks."""
        mine = plain_sum([self._masked[owner] for owner in survivors], plan.ring.bits)
        self.exact = self.exact is not False and np.array_equal(mine, total)


def simulate(
    settings: FederationSettings,
    *,
    dim: int,
    rounds: int,
    fates: Draw,
    seed: int,
    clock: Clock,
    watch: Watch,
) -> SimulationReport:
    """Run `rounds` rounds of a federation in this process, training a toy.

    Parameters
    ----------
    settings : FederationSettings
        As a coordinator has them; `declared_records` says who the owners are. Base, rank and modules are replaced.
    dim : int
        Entries of the update that is summed.
    fates : Draw
        What goes wrong in each round; `fedllm.simulate.fates.drawn` draws it.
    seed : int
        Repeats keys, masks, data and noise.
    clock : Clock
        Of the machine: the federation's own clock is a fake.
    watch : Watch
        Called with every event of a round.

    Raises
    ------
    ConfigError
        If there can be no such federation.
    PolicyRefused
        If its settings allow no round.
    """
    began_s = clock.monotonic()
    cast = Cast.of(settings, dim, seed)
    with tempfile.TemporaryDirectory(prefix="fedllm-simulate-", dir=_MEMORY if _MEMORY.is_dir() else None) as folder:
        stage = _Stage(cast, Path(folder), seed, watch)
        try:
            done = asyncio.run(stage.run(rounds, fates, clock))
            return stage.report(done, dim, seconds=clock.monotonic() - began_s)
        finally:
            stage.close()


class _Stage:
    """One coordinator and all owners over one folder, in memory where the system has such a place."""

    def __init__(self, cast: Cast, folder: Path, seed: int, watch: Watch) -> None:
        self._cast, self._seed, self._folder, self._watch = cast, seed, folder, watch
        self._sums, self._weather, self._fake = ExactSums(), Weather(), FakeClock()
        self._peak_bytes = 0
        self._most_up = self._most_down = 0
        self.owners: dict[OwnerId, SimulatedOwner] = cast.daemons(
            folder / "owners", clock=self._fake, seed=seed, observer=self._sums.masked
        )
        self._journal = Journal(folder / "journal.sqlite")
        self._registry = Registry(folder / "registry", cast.coordinator.public, self._fake)
        handlers = {str(owner): each.handler(self._weather) for owner, each in self.owners.items()}
        carrier = MemoryCarrier(handlers, faults=self._weather.faults())
        rng = SeededRng(f"simulate/{seed}/coordinator")
        federation = cast.federation
        self._runner = RoundRunner(
            federation, cast.coordinator, Roll(federation.name, federation.roster, cast.coordinator, carrier, rng),
            self._journal, self._registry, gate=ScoreGate(_ANY_LOSS), epsilon_of=advisory_epsilon,
            clock=self._fake, rng=rng, progress=self._event, opened=self._sums.opened,
        )  # fmt: skip

    async def run(self, rounds: int, fates: Draw, clock: Clock) -> list[SimulatedRound]:
        """Run the rounds, each under fates of its own."""
        done: list[SimulatedRound] = []
        self._journal.set_wanted(self._cast.federation.name, rounds)  # what follows a round decides how it is closed
        for number in range(1, rounds + 1):
            began_s = clock.monotonic()
            self._sums.begin()
            self._weather.fates = fates(number, tuple(self.owners))
            record = await self._runner.run_one()
            self._count(record)
            done.append(
                SimulatedRound.of(
                    record, self._weather.fates, exact=self._sums.exact, seconds=clock.monotonic() - began_s
                )
            )
        return done

    def report(self, done: list[SimulatedRound], dim: int, *, seconds: float) -> SimulationReport:
        """Return what was found."""
        settings = self._cast.federation.settings
        plan = whole_plan(self._cast.federation)
        spent = max(each.ledger.spent() for each in self.owners.values())
        return SimulationReport(
            owners=len(self.owners),
            dim=dim,
            seed=self._seed,
            complete=plan.neighbours == len(self.owners) - 1,
            neighbours=plan.neighbours,
            threshold=plan.threshold,
            ring_bits=plan.ring.bits,
            value_bits=plan.ring.value_bits,
            privacy={
                "epsilon": None if math.isinf(spent) else spent,
                "unit": plan.mechanism.unit,
                "relation": plan.mechanism.relation,
                "delta": settings.delta,
                "noise_over_signal": (
                    None if plan.mechanism.shares is None else plan.mechanism.noise_over_signal(len(self.owners))
                ),
            },
            upload_bytes=self._most_up,
            download_bytes=self._most_down,
            seconds=seconds,
            peak_gib=self._peak_bytes / _GIB,
            rounds=done,
        )

    def close(self) -> None:
        """Close the databases."""
        self._registry.close()
        self._journal.close()

    def _event(self, event: RoundEvent) -> None:
        if event.owner is None and event.done == 0:
            self._measure()
        self._watch(event)

    def _measure(self) -> None:
        files = sum(path.stat().st_size for path in self._folder.rglob("*") if path.is_file())
        self._peak_bytes = max(self._peak_bytes, _resident_bytes() + files)

    def _count(self, record: RoundRecord) -> None:
        self._measure()
        self._most_up = max([self._most_up, *record.measures.get("bytes_up", {}).values()])
        self._most_down = max([self._most_down, *record.measures.get("bytes_down", {}).values()])


def _resident_bytes() -> int:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
