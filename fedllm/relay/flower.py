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
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from pathlib import Path

from fedllm import telemetry
from fedllm.clock import Clock
from fedllm.errors import DecodeError, PeerUnavailable
from fedllm.relay.carrier import Reply
from fedllm.relay.parcels import Arrivals, Assembly, Parcel, next_in_time
from fedllm.relay.ports import LOOPBACK, listening, new_port
from fedllm.relay.processes import Supervised
from fedllm.relay.proxy import FleetProxy, names_node
from fedllm.relay.runs import Run, Write
from fedllm.relay.service import EnvelopeServer, serve_link, unpack_frame
from fedllm.rng import Rng

_LOG = logging.getLogger(__name__)
_BUNDLE = Path(__file__).with_name("bundle")
_CONNECTION = "fedllm"
SUPEREXEC_POLL_S = 0.25
"""Flower's own default is 1 s; below 0.2 s the polling competes with the processes it waits for."""
LAUNCH_TIMEOUT_S = 60.0
FAILED_LAUNCHES = 6
"""So many relay runs in a row that never connect mean that the carrier is lost beyond restart."""
POLL_S = 0.25
"""Seconds between the relay's looks for one node's reply, as long as nothing tells it when to look."""
TOLD_POLL_S = 4.0
"""The same when something does; a look that comes in the middle of an upload makes Flower wait a second."""
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


class FlowerCarrier:
    """Reaches owners through a Flower SuperLink that it supervises; construct with `open`.

    Parameters
    ----------
    home : Path
        Private folder for the bundle, Flower's state, logs and the link's socket.
    host, port
        Where SuperNodes reach it: a `FleetProxy`, before the SuperLink.
    inner_port : int
        Loopback port of the SuperLink itself.
    clock, rng
    environ : Mapping[str, str]
        Environment that Flower's processes inherit.
    """

    def __init__(
        self,
        home: Path,
        *,
        host: str,
        port: int,
        inner_port: int,
        clock: Clock,
        rng: Rng,
        environ: Mapping[str, str],
    ) -> None:
        self._home = home
        self._host = host
        self._port = port
        self._inner_port = inner_port
        self._proxy = FleetProxy(inner_port, self._node_asked)
        self._clock = clock
        self._rng = rng
        self._environ = flower_environment(environ, home / "flwr")
        self.superlink = Supervised(
            "superlink",
            [
                flower_program("flower-superlink"), "--insecure", "--host", LOOPBACK, "--port", str(inner_port),
                "--database", str(home / "superlink.db"), "--disable-runtime-dependency-installation",
            ],
            env=self._environ, log=home / "superlink.log", cwd=home,
        )  # fmt: skip
        self._run: Run | None = None
        self._token = ""
        self._connected = asyncio.Event()
        self._lost: str | None = None
        self._told = False
        self._parcels: dict[str, Parcel] = {}
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
        inner_port = await new_port(home / "superlink.port")
        carrier = cls(home, host=host, port=port, inner_port=inner_port, clock=clock, rng=rng, environ=environ)
        await carrier._start()
        return carrier

    async def _start(self) -> None:
        await self._proxy.open(self._host, self._port)
        bundle = self._home / "bundle"
        shutil.rmtree(bundle, ignore_errors=True)
        shutil.copytree(_BUNDLE, bundle, ignore=shutil.ignore_patterns("__pycache__"))
        connection = f'[superlink]\ndefault = "{_CONNECTION}"\n\n[superlink.{_CONNECTION}]\n'
        connection += f'address = "{LOOPBACK}:{self._inner_port}"\ninsecure = true\n'
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

    async def exchange(
        self, outbound: Mapping[str, bytes], *, deadline_s: float
    ) -> AsyncGenerator[tuple[str, Reply], None]:
        """Send a request to each node and yield the replies that come in time; see `Carrier`.

        While the reader is busy with a reply that has parts, nothing more is read from the relay run.
        """
        self._check_lost()
        began_s, until_s = self._clock.monotonic(), self._clock.monotonic() + deadline_s
        arrivals: Arrivals = asyncio.Queue()
        parcels = [Parcel(f"x{next(self._tags)}", n, d, until_s, arrivals) for n, d in sorted(outbound.items())]
        self._parcels.update((p.tag, p) for p in parcels)
        run_before, answered, bytes_in = self.runs, 0, 0
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(deadline_s):  # a relay that reads nothing would hold the request up
                    await self._send(parcels)
            for _ in parcels:
                arrival = await next_in_time(arrivals, until_s - self._clock.monotonic())
                if arrival is None:
                    break
                parcel, reply = arrival
                del arrival
                self._check_lost()
                if reply is not None:
                    answered, bytes_in = answered + 1, bytes_in + reply.size
                    yield parcel.node, reply
                    del reply
                parcel.taken.set()
        finally:
            for parcel in parcels:
                self._parcels.pop(parcel.tag, None)
                parcel.taken.set()
            telemetry.event(
                _LOG, "exchange", nodes=len(parcels), answered=answered, run=self.runs,
                restarted=self.runs - run_before, bytes_out=sum(map(len, outbound.values())), bytes_in=bytes_in,
                seconds=round(self._clock.monotonic() - began_s, 3),
            )  # fmt: skip

    async def close(self) -> None:
        """Stop relay run, SuperLink and socket."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._proxy.close()
        if self._server is not None:
            await self._server.stop(0)
        await asyncio.to_thread(self.superlink.terminate)

    async def _send(self, parcels: list[Parcel]) -> None:
        run = self._run
        if run is None or not parcels:
            return  # the next run sends everything that is pending when it connects
        for parcel in parcels:
            parcel.sent_on = self.runs
        now_s = self._clock.monotonic()
        items = [{"node": p.node, "tag": p.tag, "ttl_s": max(1.0, p.until_s - now_s)} for p in parcels]
        header = {"op": "send", "items": items, "poll_s": TOLD_POLL_S if self._told else POLL_S}
        await run.send(header, *(p.data for p in parcels))

    async def _node_asked(self, body: bytes) -> None:
        """Have the relay look for a node's reply at once: the node asks for the next message."""
        run = self._run
        for node in {p.node for p in self._parcels.values() if not p.answered and p.sent_on == self.runs}:
            if run is not None and names_node(body, node):
                self._told = True
                await run.send({"op": "poll", "node": node})

    def _check_lost(self) -> None:
        if self._lost:
            raise PeerUnavailable(self._lost, hint=f"see {self._home / 'superlink.log'}")

    async def _wait_connected(self, timeout_s: float) -> None:
        self._check_lost()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._connected.wait(), timeout_s)

    async def _serve(self, frames: AsyncIterator[bytes], write: Write) -> None:
        """Speak with one relay run until its stream ends, a write on it fails, or another takes its place."""
        run = Run(write, Assembly(self._parcels))
        try:
            await run.until_over(self._read(run, frames))
        except (DecodeError, KeyError, ValueError) as error:
            telemetry.event(_LOG, "relay run sent nonsense", level=logging.WARNING, error=str(error))
        finally:
            run.end()
            run.ended.set()
            if self._run is run:
                self._run = None
                self._connected.clear()
        await run.written()

    async def _read(self, run: Run, frames: AsyncIterator[bytes]) -> None:
        async for frame in frames:
            header, blobs = unpack_frame(frame)
            del frame
            if header["op"] == "hello":
                if header["token"] != self._token:
                    return  # a run of an earlier coordinator
                if self._run is not None:
                    self._run.end()
                self._run = run
                self.runs += 1
                self._connected.clear()  # until this one has reported its nodes
                telemetry.event(_LOG, "relay run connected", run=self.runs)
            elif self._run is not run:
                return
            else:
                await self._receive(run, header, blobs)

    async def _receive(self, run: Run, header: dict[str, object], blobs: list[bytes]) -> None:
        """Take one frame in; returns when the next one may be read."""
        if header["op"] == "nodes":
            first = not self._connected.is_set()
            run.nodes = tuple(str(n) for n in header["nodes"])  # type: ignore[attr-defined]
            telemetry.event(_LOG, "nodes", count=len(run.nodes))
            if first:
                self._connected.set()
                await self._send([p for p in self._parcels.values() if not p.answered and p.sent_on < self.runs])
        elif header["op"] == "pushed":
            self._proxy.pushed()
        elif header["op"] in ("reply", "part"):
            (blob,) = blobs
            if parcel := run.assembly.add(header, blob):
                await parcel.taken.wait()  # its reader sets the pace: until then nothing more is read
        elif header["op"] == "failed":
            parcel = self._parcels.get(str(header["tag"]))
            if parcel is None or parcel.answered:
                return
            telemetry.event(_LOG, "node did not answer", level=logging.WARNING, node=parcel.node, code=header["code"])
            if header["code"] == NODE_UNAVAILABLE or parcel.resends >= RESENDS:
                parcel.answer(None)
            else:
                parcel.resends += 1
                await self._send([parcel])

    async def _keep_run(self) -> None:
        """Keep one relay run connected; the end of its stream, not Flower's run state, tells that it is lost."""
        failed = 0
        while failed < FAILED_LAUNCHES:
            # it need not be the one that was launched last: another took its place, or was late for its own launch
            run = self._run
            if run is not None:
                failed = 0
                await run.ended.wait()
                if self._run is None:
                    telemetry.event(_LOG, "relay run lost, starting another", level=logging.WARNING, run=self.runs)
            elif not await self._launch():
                failed += 1
                telemetry.event(_LOG, "relay run did not connect", level=logging.WARNING, failed=failed)
                await self._clock.sleep(min(2.0**failed, 15.0))
        self._lost = f"{failed} Flower runs in a row did not connect to {self._home / 'link.sock'}"
        for parcel in self._parcels.values():
            parcel.answer(None)

    async def _launch(self) -> bool:
        """Start one relay run; return whether one is connected in time."""
        if not await listening(self._inner_port, LAUNCH_TIMEOUT_S):
            return False
        self._token, before = self._rng.token(16).hex(), self.runs
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
        await self._wait_run(before, LAUNCH_TIMEOUT_S)
        return self._run is not None

    async def _wait_run(self, before: int, timeout_s: float) -> None:
        """Wait for a run that is newer than run number `before`."""
        until_s = self._clock.monotonic() + timeout_s
        # several things can end this wait, one of them a process
        while self.runs == before and self.superlink.alive() and self._clock.monotonic() < until_s:  # noqa: ASYNC110
            await asyncio.sleep(0.1)


def _make_private(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.chmod(0o700)
