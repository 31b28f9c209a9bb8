"""Flower as a carrier: a supervised SuperLink, a relay run that is started again when its stream ends.

Flower pushes one message at a time to an owner's SuperNode, which starts a process for it; that costs seconds
(docs/adr/0002). A ServerApp cannot be resumed, so nothing of a round lives in it: the relay run is disposable,
and an exchange that was under way is sent again on the next run. Owners answer a repeated request from their
record.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import shutil
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio

from fedllm import telemetry
from fedllm.clock import Clock
from fedllm.errors import DecodeError, PeerUnavailable, PortBusy
from fedllm.relay.processes import Supervised
from fedllm.relay.service import EnvelopeServer, pack_frame, serve_link, unpack_frame
from fedllm.rng import Rng

_LOG = logging.getLogger(__name__)
_BUNDLE = Path(__file__).with_name("bundle")
_CONNECTION = "fedllm"
SUPEREXEC_POLL_S = 0.25
"""Flower's own default is 1 s; below 0.2 s the polling competes with the processes it waits for."""
LAUNCH_TIMEOUT_S = 60.0
FAILED_LAUNCHES = 6
"""So many relay runs in a row that never connect mean that the carrier is lost beyond restart."""
NODE_UNAVAILABLE = 5
"""Flower's error code for a node whose heartbeat stopped: final for an exchange, unlike a crashed app."""
RESENDS = 2


def flower_environment(base: Mapping[str, str], home: Path) -> dict[str, str]:
    """Return the environment of a Flower process: own home, no telemetry, this Python's programs first.

    Parameters
    ----------
    base : Mapping[str, str]
        The parent's environment.
    home : Path
        ``FLWR_HOME``; made if missing.
    """
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    return {
        **base,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": str(SUPEREXEC_POLL_S),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{base.get('PATH', os.defpath)}",
        "PYTHONUNBUFFERED": "1",
    }


def flower_program(name: str) -> str:
    """Return the path of one of Flower's programs, which lie beside this Python."""
    return str(Path(sys.executable).parent / name)


def supernode_command(superlink: str, port: int, daemon_socket: Path) -> list[str]:
    """Return the command of an owner's SuperNode.

    Parameters
    ----------
    superlink : str
        ``host:port`` of the federation's SuperLink.
    port : int
        Loopback port for the SuperNode's own processes.
    daemon_socket : Path
        The daemon's socket; reaches the relay app as node configuration.
    """
    return [
        flower_program("flower-supernode"), "--insecure", "--superlink", superlink, "--host", "127.0.0.1",
        "--port", str(port), "--node-config", f"socket={json.dumps(str(daemon_socket))}",
    ]  # fmt: skip


@dataclass
class _Parcel:
    """One request of one exchange on its way; `sent_on` is the run that it was last given to, 0 for none."""

    tag: str
    node: str
    data: bytes
    until_s: float
    answer: asyncio.Future[bytes | None]
    resends: int = 0
    sent_on: int = 0


@dataclass
class _Run:
    """A connected relay run."""

    write: Callable[[bytes], Awaitable[None]]
    nodes: tuple[str, ...] = ()
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)


class FlowerCarrier:
    """Reaches owners through a Flower SuperLink that it supervises; construct with `open`.

    Parameters
    ----------
    home : Path
        Private folder for the bundle, Flower's state, logs and the link's socket.
    host, port
        Where the SuperLink listens.
    clock, rng
    environ : Mapping[str, str]
        Environment that Flower's processes inherit.
    """

    def __init__(self, home: Path, *, host: str, port: int, clock: Clock, rng: Rng, environ: Mapping[str, str]) -> None:
        self._home = home
        self._host = host
        self._port = port
        self._clock = clock
        self._rng = rng
        self._environ = flower_environment(environ, home / "flwr")
        self.superlink = Supervised(
            "superlink",
            [
                flower_program("flower-superlink"), "--insecure", "--host", host, "--port", str(port),
                "--database", str(home / "superlink.db"), "--disable-runtime-dependency-installation",
            ],
            env=self._environ, log=home / "superlink.log", cwd=home,
        )  # fmt: skip
        self._run: _Run | None = None
        self._token = ""
        self._connected = asyncio.Event()
        self._lost: str | None = None
        self._parcels: dict[str, _Parcel] = {}
        self._tags = itertools.count()
        self._tasks: list[asyncio.Task[None]] = []
        self._server: EnvelopeServer | None = None
        self.runs = 0

    @classmethod
    async def open(
        cls, home: Path, *, host: str, port: int, clock: Clock, rng: Rng, environ: Mapping[str, str]
    ) -> FlowerCarrier:
        """Start the SuperLink and the first relay run in the background.

        Raises
        ------
        PortBusy
            If another program listens on the port.
        """
        _make_private(home)
        await _wait_until_free(host, port)
        carrier = cls(home, host=host, port=port, clock=clock, rng=rng, environ=environ)
        await carrier._start()
        return carrier

    async def _start(self) -> None:
        bundle = self._home / "bundle"
        shutil.rmtree(bundle, ignore_errors=True)
        shutil.copytree(_BUNDLE, bundle, ignore=shutil.ignore_patterns("__pycache__"))
        connection = f'[superlink]\ndefault = "{_CONNECTION}"\n\n[superlink.{_CONNECTION}]\n'
        connection += f'address = "{self._host}:{self._port}"\ninsecure = true\n'
        (self._home / "flwr" / "config.toml").write_text(connection, encoding="utf-8")
        self._server = await serve_link(self._home / "link.sock", self._serve)
        self._tasks = [
            asyncio.create_task(self.superlink.keep(self._clock), name="superlink"),
            asyncio.create_task(self._keep_run(), name="relay-run"),
        ]

    @property
    def patience_s(self) -> float:
        """SuperNodes that lost their SuperLink try again with pauses of up to 20 s, and some took 50 s to be back."""
        return 75.0

    async def nodes(self) -> tuple[str, ...]:
        """Return the ids of the connected SuperNodes; waits for a relay run to be there."""
        await self._wait_connected(LAUNCH_TIMEOUT_S)
        return self._run.nodes if self._run else ()

    async def exchange(self, outbound: Mapping[str, bytes], *, deadline_s: float) -> dict[str, bytes]:
        """Send a request to each node and return the replies that came in time; see `Carrier`."""
        if self._lost:
            raise PeerUnavailable(self._lost, hint=f"see {self._home / 'superlink.log'}")
        began_s, until_s = self._clock.monotonic(), self._clock.monotonic() + deadline_s
        future = asyncio.get_running_loop().create_future
        parcels = [_Parcel(f"x{next(self._tags)}", n, d, until_s, future()) for n, d in sorted(outbound.items())]
        self._parcels.update((p.tag, p) for p in parcels)
        run_before = self.runs
        try:
            await self._send(parcels)
            if parcels:
                await asyncio.wait([p.answer for p in parcels], timeout=deadline_s)
            if self._lost:
                raise PeerUnavailable(self._lost, hint=f"see {self._home / 'superlink.log'}")
        finally:
            for parcel in parcels:
                self._parcels.pop(parcel.tag, None)
        replies = {p.node: p.answer.result() for p in parcels if p.answer.done()}
        answered = {node: reply for node, reply in replies.items() if reply is not None}
        telemetry.event(
            _LOG, "exchange", nodes=len(parcels), answered=len(answered), run=self.runs,
            restarted=self.runs - run_before,
            bytes_out=sum(map(len, outbound.values())), bytes_in=sum(map(len, answered.values())),
            seconds=round(self._clock.monotonic() - began_s, 3),
        )  # fmt: skip
        return answered

    async def close(self) -> None:
        """Stop relay run, SuperLink and socket."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._server is not None:
            await self._server.stop(0)
        await asyncio.to_thread(self.superlink.terminate)

    async def _send(self, parcels: list[_Parcel]) -> None:
        run = self._run
        if run is None or not parcels:
            return  # the next run sends everything that is pending when it connects
        for parcel in parcels:
            parcel.sent_on = self.runs
        now_s = self._clock.monotonic()
        items = [{"node": p.node, "tag": p.tag, "ttl_s": max(1.0, p.until_s - now_s)} for p in parcels]
        frame = pack_frame({"op": "send", "items": items}, *(p.data for p in parcels))
        with contextlib.suppress(
            grpc.RpcError, grpc.aio.BaseError
        ):  # a broken stream ends the run, whose successor sends again
            async with run.writing:
                await run.write(frame)

    async def _wait_connected(self, timeout_s: float) -> None:
        if self._lost:
            raise PeerUnavailable(self._lost, hint=f"see {self._home / 'superlink.log'}")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._connected.wait(), timeout_s)

    async def _serve(self, frames: AsyncIterator[bytes], write: Callable[[bytes], Awaitable[None]]) -> None:
        """Speak with one relay run until its stream ends."""
        run = _Run(write)
        try:
            async for frame in frames:
                header, parts = unpack_frame(frame)
                if header["op"] == "hello":
                    if header["token"] != self._token:
                        return  # a run of an earlier coordinator
                    self._run = run
                    self.runs += 1
                    telemetry.event(_LOG, "relay run connected", run=self.runs)
                elif self._run is not run:
                    return
                else:
                    await self._receive(run, header, parts)
        except DecodeError as error:
            telemetry.event(_LOG, "relay run sent nonsense", level=logging.WARNING, error=error.message)
        finally:
            run.ended.set()
            if self._run is run:
                self._run = None
                self._connected.clear()

    async def _receive(self, run: _Run, header: dict[str, object], parts: list[bytes]) -> None:
        if header["op"] == "nodes":
            first = not run.nodes and not self._connected.is_set()
            run.nodes = tuple(str(n) for n in header["nodes"])  # type: ignore[attr-defined]
            telemetry.event(_LOG, "nodes", count=len(run.nodes))
            if first:
                self._connected.set()
                await self._send([p for p in self._parcels.values() if not p.answer.done() and p.sent_on < self.runs])
            return
        parcel = self._parcels.get(str(header.get("tag")))
        if parcel is None or parcel.answer.done():
            return
        if header["op"] == "reply":
            parcel.answer.set_result(parts[0])
        elif header["op"] == "failed":
            telemetry.event(_LOG, "node did not answer", level=logging.WARNING, node=parcel.node, code=header["code"])
            if header["code"] == NODE_UNAVAILABLE or parcel.resends >= RESENDS:
                parcel.answer.set_result(None)
            else:
                parcel.resends += 1
                await self._send([parcel])

    async def _keep_run(self) -> None:
        """Keep one relay run connected; the end of its stream, not Flower's run state, tells that it is lost."""
        failed = 0
        while failed < FAILED_LAUNCHES:
            if await self._launch():
                failed = 0
                run = self._run
                if run is not None:
                    await run.ended.wait()
                    telemetry.event(_LOG, "relay run lost, starting another", level=logging.WARNING, run=self.runs)
            else:
                failed += 1
                telemetry.event(_LOG, "relay run did not connect", level=logging.WARNING, failed=failed)
                await self._clock.sleep(min(2.0**failed, 15.0))
        self._lost = f"{failed} Flower runs in a row did not connect to {self._home / 'link.sock'}"
        for parcel in self._parcels.values():
            if not parcel.answer.done():
                parcel.answer.set_result(None)

    async def _launch(self) -> bool:
        """Start one relay run; return whether it connected in time."""
        if not await _listening(self._host, self._port, LAUNCH_TIMEOUT_S):
            return False
        self._token = self._rng.token(16).hex()
        override = f'socket="{self._home / "link.sock"}" run-token="{self._token}"'
        with (self._home / "flwr-run.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                flower_program("flwr"), "run", str(self._home / "bundle"), _CONNECTION, "-c", override,
                env=self._environ, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        try:
            code = await asyncio.wait_for(process.wait(), LAUNCH_TIMEOUT_S)
        except (TimeoutError, asyncio.CancelledError) as stopped:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            if isinstance(stopped, asyncio.CancelledError):
                raise
            return False
        if code != 0:
            return False
        await self._wait_run(LAUNCH_TIMEOUT_S)
        return self._run is not None

    async def _wait_run(self, timeout_s: float) -> None:
        until_s = self._clock.monotonic() + timeout_s
        # several things can end this wait, one of them a process
        while self._run is None and self.superlink.alive() and self._clock.monotonic() < until_s:  # noqa: ASYNC110
            await asyncio.sleep(0.1)


def _make_private(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.chmod(0o700)


def _accepts(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1" if host == "0.0.0.0" else host, port)) == 0  # noqa: S104


async def _listening(host: str, port: int, timeout_s: float) -> bool:
    for _ in range(int(timeout_s / 0.2)):
        if _accepts(host, port):
            return True
        await asyncio.sleep(0.2)
    return False


async def _wait_until_free(host: str, port: int) -> None:
    # a SuperLink of a coordinator that was killed takes a moment to go
    for _ in range(50):
        if not _accepts(host, port):
            return
        await asyncio.sleep(0.2)
    raise PortBusy(f"another program listens on {host}:{port}", hint="choose another flower_port")
