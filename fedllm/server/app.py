"""The coordinator process: reads its home, puts the pieces together, serves until it is told to stop."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from fedllm.basemodel.inspect import open_base
from fedllm.clock import Clock, SystemClock
from fedllm.config import TRANSPORTS, CoordinatorSettings, FederationSettings
from fedllm.errors import ConfigError, NotFound, PortBusy
from fedllm.identity import Roster, SigningIdentity
from fedllm.registry.store import Registry
from fedllm.relay.carrier import Carrier
from fedllm.relay.tls import PinnedOwners, TlsIdentity, pinned_folder, read_certificate
from fedllm.rng import OsRng, Rng
from fedllm.server.federation import Federation, adapter_spec
from fedllm.server.gate import ScoreGate
from fedllm.server.journal import Journal
from fedllm.server.ports import RoundEvent
from fedllm.server.roster import Roll
from fedllm.server.rounds.epsilon import advisory_epsilon
from fedllm.server.rounds.runner import RoundRunner
from fedllm.server.schedule import Schedule

if TYPE_CHECKING:
    import uvicorn

    from fedllm.server.api import ApiState

KEY_FILE = "coordinator.pem"
TOKEN_FILE = "operator.token"  # noqa: S105 - a file name
OBSERVER_FILE = "observer.token"
_TOKEN_BYTES = 32
_STOP_S = 5.0


def run(settings: CoordinatorSettings, federations: Sequence[FederationSettings]) -> None:
    """Run the coordinator until SIGTERM or Ctrl-C; unfinished rounds are resumed first.

    Without a federation it is a registry whose aliases the operator moves: nothing trains, no transport is opened.

    Raises
    ------
    ConfigError
        A setting that cannot work, or another coordinator on the same home.
    PortBusy
        Another program listens on the API's or the SuperLink's port, or on that of the direct transport.
    NotFound, AuthenticationError
        A key, certificate, roster or base model is missing, or a key can be read by others.
    KeyboardInterrupt
        After a clean stop by Ctrl-C.
    """
    with _locked(settings.home):
        asyncio.run(_serve(settings, federations))


def load_federation(settings: FederationSettings, home: Path) -> Federation:
    """Return a federation with the roster in `home` and the spec that its base model gives."""
    base = open_base(settings.base)
    spec = adapter_spec(
        settings,
        base=base.digest,
        num_layers=base.num_layers,
        shapes={module: base.module_shapes(module) for module in settings.target_modules},
    )
    return Federation(settings, spec, Roster.load(home / "rosters" / f"{settings.name}.json"))


async def _serve(settings: CoordinatorSettings, federations: Sequence[FederationSettings]) -> None:
    from fedllm.server.api import ApiState

    clock, rng = SystemClock(), OsRng()
    identity = SigningIdentity.load(settings.home / KEY_FILE)
    loaded = [load_federation(each, settings.home) for each in federations]
    async with AsyncExitStack() as stack:
        listener = stack.enter_context(_listen(settings.host, settings.port))
        token = read_token(settings.home / TOKEN_FILE, rng)
        observer = read_token(settings.home / OBSERVER_FILE, rng)
        registry = Registry(settings.home / "registry", identity.public, clock)
        stack.callback(registry.close)
        journal = Journal(settings.home / "journal.sqlite")
        stack.callback(journal.close)
        carriers = await _open_carriers(settings, loaded, clock, rng, stack)
        events: list[Schedule] = []

        def progress(event: RoundEvent) -> None:
            events[0].progress(event)

        runners = {
            federation.name: RoundRunner(
                federation,
                identity,
                Roll(federation.name, federation.roster, identity, carriers[federation.name], rng),
                journal,
                registry,
                gate=ScoreGate(federation.settings.gate_margin),
                epsilon_of=advisory_epsilon,
                clock=clock,
                rng=rng,
                progress=progress,
            )
            for federation in loaded
        }
        schedule = Schedule(runners, journal, clock)
        events.append(schedule)
        stopping = asyncio.Event()
        state = ApiState(registry, journal, schedule, identity, token, stopping, observer)
        await _until_stopped(schedule, state, listener)


async def _until_stopped(schedule: Schedule, state: ApiState, listener: socket.socket) -> None:
    from fedllm.server.api import make_api

    stopping = state.stopping
    signals: list[int] = []

    def stop(number: int) -> None:
        signals.append(number)
        stopping.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    server = _server(make_api(state))
    serving = asyncio.create_task(server.serve(sockets=[listener]), name="api")
    # a schedule of no federation ends at once, which is no reason to stop
    running = schedule.run() if schedule.federations else stopping.wait()
    rounds: asyncio.Task[object] = asyncio.create_task(running, name="rounds")
    waiting = asyncio.create_task(stopping.wait(), name="stop")
    try:
        await asyncio.wait({serving, rounds, waiting}, return_when=asyncio.FIRST_COMPLETED)
        for task in (serving, rounds):
            if task.done():
                task.result()  # neither ends by itself but by an error that nobody foresaw: fail loudly
    finally:
        stopping.set()
        rounds.cancel()
        waiting.cancel()
        server.should_exit = True
        await asyncio.wait({serving, rounds}, timeout=_STOP_S)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
    if signal.SIGINT in signals:
        raise KeyboardInterrupt


def _server(app: object) -> uvicorn.Server:
    import uvicorn

    class Server(uvicorn.Server):
        def capture_signals(self) -> nullcontext[None]:  # type: ignore[override]
            """Leave signals alone: the process handles them, for more than this server."""
            return nullcontext()

    return Server(
        uvicorn.Config(
            app,  # type: ignore[arg-type]
            http="h11",  # bounds a request's head; httptools, which would be taken where it is installed, does not
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=int(_STOP_S) - 2,
        )
    )


async def _open_carriers(
    settings: CoordinatorSettings,
    federations: Sequence[Federation],
    clock: Clock,
    rng: Rng,
    stack: AsyncExitStack,
) -> dict[str, Carrier]:
    """Return a carrier for each federation: one SuperLink for all on Flower, one listener for all direct ones."""
    by_transport: dict[str, list[Federation]] = {transport: [] for transport in TRANSPORTS}
    for each in federations:
        check_transport(each, settings.home, clock)
        by_transport[each.settings.transport].append(each)
    carriers: dict[str, Carrier] = {}
    if by_transport["flower"]:
        from fedllm.relay.flower import FlowerCarrier

        flower = await FlowerCarrier.open(
            settings.home / "flower",
            host=settings.flower_host,
            port=settings.flower_port,
            clock=clock,
            rng=rng,
            environ=os.environ,
        )
        stack.push_async_callback(flower.close)
        carriers |= {each.name: flower for each in by_transport["flower"]}
    if by_transport["direct"]:
        from fedllm.relay.direct import DirectCarrier

        direct = await DirectCarrier.open(
            host=settings.direct_host,
            port=settings.direct_port,
            identity=TlsIdentity.load(settings.home, clock),
            pinned=PinnedOwners([pinned_folder(settings.home, each.name) for each in by_transport["direct"]], clock),
            clock=clock,
        )
        stack.push_async_callback(direct.close)
        carriers |= {each.name: direct for each in by_transport["direct"]}
    for each in by_transport["local"]:
        from fedllm.relay.local import LocalCarrier

        local = LocalCarrier({owner: Path(path) for owner, path in each.settings.sockets.items()}, clock=clock)
        stack.push_async_callback(local.close)
        carriers[each.name] = local
    return carriers


def check_transport(federation: Federation, home: Path, clock: Clock) -> None:
    """Raise unless a federation's messages have a way: a transport that exists and, if direct, all certificates.

    Raises
    ------
    ConfigError
        Another transport, or a certificate that is not usable.
    NotFound
        A certificate is missing; names the owner.
    """
    transport = federation.settings.transport
    if transport not in TRANSPORTS:
        raise ConfigError(f"federation {federation.name}: transport {transport!r}: {', '.join(TRANSPORTS)} allowed")
    if transport != "direct":
        return
    TlsIdentity.load(home, clock)
    for member in federation.roster.members:
        path = pinned_folder(home, federation.name) / f"{member.owner}.pem"
        if not path.is_file():
            raise NotFound(
                f"no TLS certificate of owner {member.owner!r} at {path}",
                hint=f"fedllm owner certificate {member.owner} FILE --federation {federation.name}, with the tls.pem "
                "of that owner's folder",
            )
        read_certificate(path, clock)


def read_token(path: Path, rng: Rng) -> str:
    """Return a token, making it (mode 0600) when there is none."""
    if not path.exists():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(rng.token(_TOKEN_BYTES).hex() + "\n")
    token = path.read_text(encoding="utf-8").strip()
    if not token:
        raise ConfigError(f"{path} is empty", hint="remove it; the coordinator writes a new one")
    return token


@contextmanager
def _listen(host: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # accepted sockets inherit it; asyncio sets it only where the protocol is named, and a short reply waits 40 ms
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortBusy(
                    f"{host}:{port} is taken by another program", hint="set [coordinator] port, or --port"
                ) from None
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from None
        yield listener


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    """Hold the home: two coordinators on one journal would both resume the same round."""
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (home / "coordinator.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another coordinator runs on {home}", hint="stop it, or give this one a home of its own"
            ) from None
        yield
