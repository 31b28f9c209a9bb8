"""The composition root of ``fedllm client start``: everything the daemon is handed is made here."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from fedllm import telemetry
from fedllm.client.daemon import Daemon, check_own_key
from fedllm.client.policy import OwnerPolicy
from fedllm.client.sandbox import Isolation, confined, probe, python_reads
from fedllm.client.status import Status, write_status
from fedllm.client.trainer import Trainer
from fedllm.clock import Clock, SystemClock, iso_utc
from fedllm.config import TRANSPORTS, ClientSettings
from fedllm.errors import ConfigError
from fedllm.identity import Roster, SigningIdentity, VerifyKey
from fedllm.ids import FederationName, OwnerId, check_name
from fedllm.messages.mechanism import UNIT_PERSON
from fedllm.privacy.ledger import Ledger
from fedllm.relay.node import dial_process, owner_processes, programs_dir
from fedllm.relay.processes import Supervised
from fedllm.relay.service import serve_deliver
from fedllm.relay.tls import TlsIdentity, read_certificate
from fedllm.rng import OsRng

_LOG = logging.getLogger(__name__)
KEY_FILE = "owner.pem"
POLICY_FILE = "policy.toml"
LEDGER_FILE = "ledger.jsonl"
SOCKET = Path("relay") / "relay.sock"
"""Below the owner's folder; in a folder of its own, so that its user alone can reach it."""
RUN_DIR = "flower"
"""Below the owner's folder: all that SuperNode and relay may write."""
STREAMS_DIR = "streams"
"""Below the owner's folder: state of DP-FTRL streams, kept over rounds and restarts."""
DIRECT_DIR = "direct"
"""Below the owner's folder: where the dialling process runs; it writes nothing."""
COORDINATOR_CERTIFICATE = "coordinator.pem"
"""Below the owner's folder: the one certificate that the dialling process accepts."""
HOLD_S = 20.0
"""A request for unfinished work waits so long before it is put off: training that ends meanwhile saves an exchange."""
_PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "SSL_CERT_FILE", "no_proxy", "NO_PROXY")
"""Environment of the relay's processes; nothing else of this process's goes to it."""


def run(settings: ClientSettings) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises
    ------
    FedllmError
        If anything that the daemon needs is missing or wrong; the status file says ``stopped`` then.
    """
    if settings.transport not in TRANSPORTS:
        raise ConfigError(f"transport {settings.transport!r}: {', '.join(TRANSPORTS)} allowed", hint="see client.toml")
    check_name(settings.owner, what="owner")
    # read by OpenMP when torch is first imported, which has not happened yet
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ["OMP_NUM_THREADS"] = str(settings.threads)
    asyncio.run(_serve(settings, SystemClock()))


@dataclass
class _Reporter:
    """Writes the status file at every change of state."""

    settings: ClientSettings
    isolation: Isolation
    clock: Clock

    def say(self, state: str, records: int | None = None) -> None:
        """Write one state."""
        s = self.settings
        write_status(
            s.home,
            Status(
                state=state, pid=os.getpid(), owner=s.owner, federation=s.federation, transport=s.transport,
                since=iso_utc(self.clock.now()), isolation=self.isolation.kind, isolation_why=self.isolation.why,
                records=records,
            ),
        )  # fmt: skip


async def _serve(settings: ClientSettings, clock: Clock) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    reporter = _Reporter(settings, probe([settings.home, settings.data]), clock)
    identity = SigningIdentity.load(settings.home / KEY_FILE)
    roster = Roster.load(settings.roster)
    check_own_key(roster, OwnerId(settings.owner), identity)  # before a model is loaded for nothing
    policy = OwnerPolicy.load(settings.home / POLICY_FILE)
    _check_unit(policy, settings)
    coordinator = VerifyKey.parse(settings.coordinator_key)
    relay = _relay_processes(settings, reporter.isolation, clock)
    reporter.say("loading")
    try:
        loading = asyncio.create_task(asyncio.to_thread(_load_trainer, settings))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
        if stop.is_set():
            return
        trainer = loading.result()
        daemon = Daemon(
            owner=OwnerId(settings.owner),
            federation=FederationName(settings.federation),
            home=settings.home,
            identity=identity,
            roster=roster,
            coordinator=coordinator,
            policy=policy,
            ledger=Ledger.open(
                settings.home / LEDGER_FILE, identity, clock, dataset=trainer.dataset,
                limit_epsilon=policy.limit_epsilon, delta=policy.delta, unit=policy.unit, column=settings.unit_column,
            ),
            trainer=trainer,
            clock=clock,
            rng=OsRng(),
            release=metadata.version("fedllm"),
            hold_s=0.0 if settings.transport == "local" else HOLD_S,
        )  # fmt: skip
        server = await serve_deliver(settings.home / SOCKET, daemon.handle)
        keeping = [asyncio.create_task(process.keep(clock)) for process in relay]
        try:
            reporter.say("ready", trainer.records)
            telemetry.event(
                _LOG, "ready", owner=settings.owner, federation=settings.federation, records=trainer.records,
                transport=settings.transport, isolation=reporter.isolation.kind,
            )  # fmt: skip
            await stopping
        finally:
            await asyncio.gather(*(asyncio.to_thread(process.terminate) for process in relay))
            await asyncio.gather(*keeping, return_exceptions=True)
            await server.stop()
            await daemon.close()
    finally:
        reporter.say("stopped")


def _check_unit(policy: OwnerPolicy, settings: ClientSettings) -> None:
    if (policy.unit == UNIT_PERSON) != bool(settings.unit_column):
        raise ConfigError(
            f"policy.toml counts by {policy.unit}, client.toml has unit_column {settings.unit_column!r}:"
            f" unit {UNIT_PERSON} needs a column, and a column means unit {UNIT_PERSON}",
            hint="set both: the column that names the person, and 'fedllm client policy set unit person'",
        )


def _load_trainer(settings: ClientSettings) -> Trainer:
    from fedllm.basemodel.inspect import open_base
    from fedllm.client.train import LoraTrainer

    base = open_base(settings.base)
    return LoraTrainer(
        settings.base, base.digest, settings.data, max_tokens=settings.max_tokens, owner=OwnerId(settings.owner),
        unit_column=settings.unit_column, streams=settings.home / STREAMS_DIR, checkpointing=settings.checkpointing,
    )  # fmt: skip


def _relay_processes(settings: ClientSettings, isolation: Isolation, clock: Clock) -> tuple[Supervised, ...]:
    """Return what carries messages for the daemon, not started: with read access to Python and its own only.

    Raises
    ------
    NotFound, ConfigError, AuthenticationError
        If a certificate or the TLS key that the direct transport needs is missing or wrong.
    """
    if settings.transport == "local":
        return ()
    run_dir = settings.home / (RUN_DIR if settings.transport == "flower" else DIRECT_DIR)
    write = [run_dir] if settings.transport == "flower" else []

    def confine(command: list[str]) -> list[str]:
        if isolation.kind != "landlock":
            return command
        return confined(command, read=[*python_reads(), programs_dir(run_dir)], write=write)

    if isolation.kind != "landlock":
        telemetry.event(_LOG, "relay not isolated", level=logging.WARNING, why=isolation.why)
    environ = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    if settings.transport == "direct":
        dialler = dial_process(
            run_dir, address=settings.direct, identity=TlsIdentity.load(settings.home, clock),
            coordinator=read_certificate(settings.home / COORDINATOR_CERTIFICATE, clock),
            daemon_socket=settings.home / SOCKET, environ=environ, log=settings.home / "dial.log", confine=confine,
        )  # fmt: skip
        return (dialler,)
    return owner_processes(
        run_dir, superlink=settings.superlink, port=settings.node_port, daemon_socket=settings.home / SOCKET,
        environ=environ, log=settings.home / "supernode.log", confine=confine,
    )  # fmt: skip
