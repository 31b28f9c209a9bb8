"""One owner's real daemon for `benchmarks.round`: ``python -m benchmarks.round_owner``; only training is stubbed out.

Daemon, ledger, policy, confinement and the relay's processes are put together as in `fedllm.client.app`.
"""

from __future__ import annotations

import asyncio
import os
import signal
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.round_federation import BASE, KEY_FILE, NAME, NAMES, RECORDS, ROSTER_FILE
from benchmarks.round_updates import update
from fedllm import telemetry
from fedllm.adapter import AdapterState, Factor
from fedllm.client.app import DIRECT_DIR, HOLD_S, LEDGER_FILE, RUN_DIR, SOCKET
from fedllm.client.daemon import Daemon
from fedllm.client.policy import OwnerPolicy
from fedllm.client.sandbox import confined, probe, python_reads
from fedllm.client.trainer import Progress, Scores, Trained
from fedllm.clock import Clock, SystemClock
from fedllm.identity import Roster, SigningIdentity
from fedllm.ids import Digest, FederationName, sha256
from fedllm.messages.plan import RoundPlan
from fedllm.privacy.ledger import Ledger
from fedllm.relay.node import dial_process, owner_processes, programs_dir
from fedllm.relay.processes import Supervised
from fedllm.relay.service import serve_deliver
from fedllm.relay.tls import CERTIFICATE_FILE, TlsIdentity, read_certificate
from fedllm.rng import OsRng, Rng


@dataclass(frozen=True)
class KnownUpdate:
    """A trainer that adds a known update at once; implements `fedllm.client.trainer.Trainer`.

    Parameters
    ----------
    owner : int
        Number of the update.
    """

    owner: int
    base: Digest = BASE
    records: int = RECORDS

    @property
    def dataset(self) -> Digest:
        """Digest of the owner's number."""
        return sha256(f"known/{self.owner}".encode())

    def fit(
        self,
        head: AdapterState,
        plan: RoundPlan,
        factors: tuple[Factor, ...],
        rng: Rng,
        progress: Progress,
        *,
        charged: int = 0,  # noqa: ARG002 - as the port has it
    ) -> Trained:
        """Return the head moved by the known update."""
        del rng
        layout = head.spec.layout(factors)
        trained = layout.flatten(head.factors) + update(self.owner, layout.size)
        progress(plan.recipe.steps, plan.recipe.steps)
        return Trained(head.replace(layout.unflatten(trained)), self.records, 1.0, plan.recipe.steps, 0.0)

    def score(self, state: AdapterState) -> Scores:
        """Return the same scores for every adapter, so that each round's is published."""
        del state
        return Scores(1.0, 8, 8)


async def serve(options: Namespace) -> None:
    """Serve until SIGTERM."""
    clock, name = SystemClock(), NAMES[options.number]
    home: Path = options.root / name
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    identity = SigningIdentity.load(home / KEY_FILE)
    trainer = KnownUpdate(options.number)
    policy = OwnerPolicy(max_epsilon=8.0, delta=1e-5, allowed_bases=(BASE,), allow_without_dp=True)
    daemon = Daemon(
        owner=name, federation=FederationName(NAME), home=home, identity=identity,
        roster=Roster.load(options.root / ROSTER_FILE),
        coordinator=SigningIdentity.load(options.root / "coordinator" / KEY_FILE).public,
        policy=policy,
        ledger=Ledger.open(
            home / LEDGER_FILE, identity, clock, dataset=trainer.dataset, limit_epsilon=policy.limit_epsilon,
            delta=policy.delta,
        ),
        trainer=trainer, clock=clock, rng=OsRng(), release="benchmark", hold_s=HOLD_S,
    )  # fmt: skip
    server = await serve_deliver(home / SOCKET, daemon.handle)
    relay = relay_processes(options, home, clock)
    keeping = [asyncio.create_task(process.keep(clock)) for process in relay]
    try:
        await stop.wait()
    finally:
        await asyncio.gather(*(asyncio.to_thread(process.terminate) for process in relay))
        await asyncio.gather(*keeping, return_exceptions=True)
        await server.stop()
        await daemon.close()


def relay_processes(options: Namespace, home: Path, clock: Clock) -> tuple[Supervised, ...]:
    """Return what carries bytes between the coordinator and the daemon's socket, confined where the system can."""
    flower = options.transport == "flower"
    run_dir = home / (RUN_DIR if flower else DIRECT_DIR)

    def confine(command: list[str]) -> list[str]:
        if probe([home]).kind != "landlock":
            return command
        return confined(command, read=[*python_reads(), programs_dir(run_dir)], write=[run_dir] if flower else [])

    shared: dict[str, Any] = {"daemon_socket": home / SOCKET, "environ": dict(os.environ), "log": home / "relay.log"}
    if flower:
        return owner_processes(run_dir, superlink=options.address, port=options.node_port, confine=confine, **shared)
    certificate = read_certificate(options.root / "coordinator" / CERTIFICATE_FILE, clock)
    return (
        dial_process(
            run_dir, address=options.address, identity=TlsIdentity.load(home, clock), coordinator=certificate,
            confine=confine, **shared,
        ),
    )  # fmt: skip


def main() -> None:
    """Run from the command line."""
    parser = ArgumentParser(prog="python -m benchmarks.round_owner", description=__doc__)
    parser.add_argument("root", type=Path)
    parser.add_argument("number", type=int)
    parser.add_argument("--transport", required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--node-port", type=int, required=True)
    options = parser.parse_args()
    telemetry.configure(SystemClock())
    asyncio.run(serve(options))


if __name__ == "__main__":
    main()
