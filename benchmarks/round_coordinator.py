"""The real coordinator's round loop for `benchmarks.round`: ``python -m benchmarks.round_coordinator``, with a watch.

Carrier, journal, registry, roll and rounds are put together as in `fedllm.server.app`; there is no control API.
"""

from __future__ import annotations

import asyncio
import logging
import os
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from benchmarks.round_federation import (
    FACTORS,
    KEY_FILE,
    NAME,
    NAMES,
    PINNED_DIR,
    ROSTER_FILE,
    make_settings,
    make_spec,
)
from benchmarks.round_updates import Recorder
from fedllm import telemetry
from fedllm.clock import Clock, SystemClock
from fedllm.errors import NotReady
from fedllm.identity import Roster, SigningIdentity
from fedllm.registry.store import Registry
from fedllm.relay.carrier import Carrier
from fedllm.relay.direct import DirectCarrier
from fedllm.relay.flower import FlowerCarrier
from fedllm.relay.tls import PinnedOwners, TlsIdentity
from fedllm.rng import OsRng
from fedllm.server.federation import Federation
from fedllm.server.gate import ScoreGate
from fedllm.server.journal import Journal
from fedllm.server.ports import RoundEvent, RoundState
from fedllm.server.roster import Roll
from fedllm.server.rounds.epsilon import advisory_epsilon
from fedllm.server.rounds.runner import RoundRunner

HOST = "127.0.0.1"
READY_S = 150.0


class Exchanges(logging.Handler):
    """Counts the exchanges that a carrier logs."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Take one log record in."""
        self.count += record.getMessage() == "exchange"


class Watch:
    """Times rounds of a runner: to the new model, and to the end.

    Parameters
    ----------
    recorder : Recorder
    exchanges : Exchanges
    """

    def __init__(self, recorder: Recorder, exchanges: Exchanges) -> None:
        self._recorder = recorder
        self._exchanges = exchanges
        self._model: tuple[float, int] | None = None

    def progress(self, event: RoundEvent) -> None:
        """Note when a new model exists: the round says so by entering the state that follows."""
        if event.state is RoundState.EVALUATING and self._model is None:
            self._model = (self._recorder.lap(), self._exchanges.count)

    async def round(self, runner: RoundRunner, registry: Registry) -> None:
        """Run one round and write it down.

        Raises
        ------
        NotReady
            If it did not end in a version that was published.
        """
        self._model, before = None, self._exchanges.count
        self._recorder.begin()
        record = await runner.run_one()
        whole_s, exchanges = self._recorder.lap(), self._exchanges.count - before
        if record.state is not RoundState.JUDGED or self._model is None:
            raise NotReady(f"round {record.number} ended {record.state}: {record.reason}")
        seconds, count = self._model
        head = runner.federation.head(registry)
        if head.version != record.version:
            raise NotReady(f"round {record.number} was not published: {record.verdict}")
        self._recorder.end(
            head.state.spec.layout(FACTORS).flatten(head.state.factors), seconds, with_scores_s=whole_s,
            phases=record.measures["timings"], exchanges=count - before, exchanges_with_scores=exchanges,
            upload_bytes=max(record.measures["bytes_up"].values()),
        )  # fmt: skip


async def open_carrier(options: Namespace, home: Path, clock: Clock) -> Carrier:
    """Return the carrier of a transport, listening on loopback."""
    if options.transport == "flower":
        return await FlowerCarrier.open(
            home / "flower", host=HOST, port=options.port, clock=clock, rng=OsRng(), environ=os.environ
        )
    pinned = PinnedOwners([home / PINNED_DIR], clock)
    identity = TlsIdentity.load(home, clock)
    return await DirectCarrier.open(host=HOST, port=options.port, identity=identity, pinned=pinned, clock=clock)


async def serve(options: Namespace, exchanges: Exchanges) -> None:
    """Wait for all owners, run the rounds, end."""
    clock, rng, home = SystemClock(), OsRng(), options.root / "coordinator"
    identity = SigningIdentity.load(home / KEY_FILE)
    federation = Federation(make_settings(), make_spec(options.dim), Roster.load(options.root / ROSTER_FILE))
    registry, journal = Registry(home / "registry", identity.public, clock), Journal(home / "journal.sqlite")
    carrier = await open_carrier(options, home, clock)
    watch = Watch(Recorder(options.root), exchanges)
    arguments: dict[str, Any] = {
        "gate": ScoreGate(0.0), "epsilon_of": advisory_epsilon, "clock": clock, "rng": rng, "progress": watch.progress,
    }  # fmt: skip
    roll = Roll(NAME, federation.roster, identity, carrier, rng)
    runner = RoundRunner(federation, identity, roll, journal, registry, **arguments)
    try:
        end_s = clock.monotonic() + READY_S
        while len(await roll.call(deadline_s=30.0)) < len(NAMES):
            if clock.monotonic() > end_s:
                raise NotReady(f"only {', '.join(roll.present) or 'nobody'} connected within {READY_S:g} s")
            await clock.sleep(0.5)
        journal.set_wanted(NAME, options.rounds)
        for _ in range(options.rounds):
            await watch.round(runner, registry)
    finally:
        await carrier.close()
        journal.close()
        registry.close()


def main() -> None:
    """Run from the command line."""
    parser = ArgumentParser(prog="python -m benchmarks.round_coordinator", description=__doc__)
    parser.add_argument("root", type=Path)
    parser.add_argument("--transport", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dim", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    options = parser.parse_args()
    telemetry.configure(SystemClock())
    exchanges = Exchanges()
    logging.getLogger("fedllm").addHandler(exchanges)
    asyncio.run(serve(options, exchanges))


if __name__ == "__main__":
    main()
