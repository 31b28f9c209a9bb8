"""One whole round of four real daemons with every message of it kept, and what it must have hidden beside it.

The carrier is wrapped at both of its ends: what the coordinator hands it and gets from it, and what the daemons get
and hand back. What the owners hid (their updates, the plain ring vectors, held-out losses) is kept by the test.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import tiny
from numpy.typing import NDArray
from patience import PATIENCE_S
from round_world import World

from fedllm import wire
from fedllm.adapter import AdapterSpec, AdapterState, Factor
from fedllm.aggregation.methods import get_method
from fedllm.aggregation.secagg.owner import SecAggOwner
from fedllm.aggregation.vector import ScoreVector, UpdateVector
from fedllm.basemodel.inspect import open_base
from fedllm.client import app
from fedllm.client.daemon import Daemon
from fedllm.client.policy import OwnerPolicy
from fedllm.client.round import InlineWorker
from fedllm.client.sandbox import probe
from fedllm.client.train import LoraTrainer
from fedllm.client.trainer import Progress, Scores, Trained, Trainer
from fedllm.clock import Clock, FakeClock, SystemClock
from fedllm.config import ClientSettings
from fedllm.identity import Roster, SigningIdentity
from fedllm.ids import Digest, FederationName, OwnerId, sha256
from fedllm.messages.envelope import Envelope, Sealed
from fedllm.messages.plan import RoundPlan
from fedllm.messages.round import Body, decode_body
from fedllm.privacy.ledger import Ledger
from fedllm.relay.carrier import Carrier, Reply
from fedllm.relay.flower import FlowerCarrier
from fedllm.relay.memory import MemoryCarrier
from fedllm.relay.processes import Supervised
from fedllm.relay.service import serve_deliver
from fedllm.relay.tether import descendants
from fedllm.rng import OsRng, Rng
from fedllm.server.federation import Federation
from fedllm.server.journal import RoundRecord

OWNERS = ("east", "north", "south", "west")
MODULES = ("q_proj", "v_proj")
SETTINGS = {
    "privacy": True, "optimizer": "sgd", "learning_rate": 4.0, "local_steps": 2, "clip_norm": 0.05,
    "noise_multiplier": 1.0, "sample_rate": 0.5, "delta": 1e-5, "rank": 16, "alpha": 16, "last_layers": 2,
    "max_tokens": 200, "clip_range": 4.0, "train_deadline_s": 90.0, "phase_deadline_s": 90.0, "gate_margin": 5.0,
    "target_modules": MODULES, "declared_records": dict.fromkeys(OWNERS, 40),
}  # fmt: skip
_MAX_TOKENS = 200


@dataclass(frozen=True)
class Message:
    """One sealed message as it was carried, with its parts; `up` is from an owner to the coordinator."""

    owner: str
    up: bool
    raw: bytes = field(repr=False)
    parts: tuple[bytes, ...] = field(default=(), repr=False)

    @property
    def envelope(self) -> Envelope:
        """The envelope, decoded strictly."""
        return wire.decode(Envelope, wire.decode(Sealed, self.raw).envelope)

    @property
    def body(self) -> Body:
        """The body, decoded strictly; a kind that is not in the allow-list raises."""
        return decode_body(self.envelope.kind, self.envelope.body)


@dataclass
class Hidden:
    """What must not be seen outside, as the owners' own code had it."""

    updates: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    vectors: dict[tuple[str, str], NDArray[np.uint32]] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)
    opened: list[NDArray[np.uint32]] = field(default_factory=list)

    def spy(self, patch: pytest.MonkeyPatch) -> None:
        """Keep a copy of every vector just before it is masked, and of every sum just after it is opened."""
        mask, update, score = SecAggOwner.mask, UpdateVector.decode, ScoreVector.decode

        def kept_mask(machine: SecAggOwner, delivery: object, values: NDArray[np.uint32]) -> object:
            self.vectors[machine._owner, machine._terms.purpose] = values.copy()
            return mask(machine, delivery, values)  # type: ignore[arg-type]

        def kept_update(codec: UpdateVector, total: NDArray[np.uint32], survivors: int) -> object:
            self.opened.append(total.copy())
            return update(codec, total, survivors)

        def kept_score(codec: ScoreVector, total: NDArray[np.uint32], survivors: int) -> object:
            self.opened.append(total.copy())
            return score(codec, total, survivors)

        patch.setattr(SecAggOwner, "mask", kept_mask)
        patch.setattr(UpdateVector, "decode", kept_update)
        patch.setattr(ScoreVector, "decode", kept_score)


@dataclass(frozen=True)
class KeepingTrainer:
    """The real trainer; what it makes is kept beside."""

    trainer: Trainer
    owner: str
    hidden: Hidden

    @property
    def base(self) -> Digest:
        """As the trainer has it."""
        return self.trainer.base

    @property
    def dataset(self) -> Digest:
        """As the trainer has it."""
        return self.trainer.dataset

    @property
    def records(self) -> int:
        """As the trainer has it."""
        return self.trainer.records

    def fit(
        self,
        head: AdapterState,
        plan: RoundPlan,
        factors: tuple[Factor, ...],
        rng: Rng,
        progress: Progress,
        *,
        charged: int = 0,
    ) -> Trained:
        """Train, and keep the update."""
        trained = self.trainer.fit(head, plan, factors, rng, progress)
        self.hidden.updates[self.owner] = get_method(plan.method).update(trained.state, head, plan.round)
        return trained

    def score(self, state: AdapterState) -> Scores:
        """Score, and keep the loss."""
        scores = self.trainer.score(state)
        self.hidden.losses.setdefault(self.owner, []).append(scores.mean_loss)
        return scores


class RecordingCarrier:
    """A carrier with both directions of every exchange kept."""

    def __init__(self, carrier: Carrier, sent: list[tuple[str, bytes]], received: list[tuple[str, Reply]]) -> None:
        self._carrier, self._sent, self._received = carrier, sent, received

    @property
    def patience_s(self) -> float:
        """As the carrier has it."""
        return self._carrier.patience_s

    async def nodes(self) -> tuple[str, ...]:
        """As the carrier has it."""
        return await self._carrier.nodes()

    async def exchange(
        self, outbound: Mapping[str, bytes], *, deadline_s: float
    ) -> AsyncGenerator[tuple[str, Reply], None]:
        """Exchange, and keep what went and what came."""
        self._sent += outbound.items()
        async with contextlib.aclosing(self._carrier.exchange(outbound, deadline_s=deadline_s)) as arriving:
            async for node, reply in arriving:
                self._received.append((node, reply))
                yield node, reply

    async def close(self) -> None:
        """As the carrier does it."""
        await self._carrier.close()


@dataclass
class CapturedRound:
    """The round, its messages, and what they hide.

    Attributes
    ----------
    sent, received : list
        What the coordinator handed to its carrier, and what came back, by node.
    arrived, answered : list
        What came to each owner's socket, and what its daemon handed back, by owner.
    isolation : dict[str, dict[str, str]]
        Per owner: file to what a process under the relay's own restrictions got when it opened it.
    """

    root: Path
    data: Mapping[str, Path]
    hidden: Hidden = field(default_factory=Hidden)
    sent: list[tuple[str, bytes]] = field(default_factory=list)
    received: list[tuple[str, Reply]] = field(default_factory=list)
    arrived: list[tuple[str, bytes]] = field(default_factory=list)
    answered: list[tuple[str, Reply]] = field(default_factory=list)
    daemons: dict[str, Daemon] = field(default_factory=dict)
    identities: dict[str, SigningIdentity] = field(default_factory=dict)
    isolation: dict[str, dict[str, str]] = field(default_factory=dict)
    record: RoundRecord | None = None

    @property
    def plan(self) -> RoundPlan:
        """The round's plan."""
        assert self.record is not None
        return self.record.plan

    @property
    def messages(self) -> list[Message]:
        """Every message an owner received or sent, once each, in order."""
        down = [Message(owner, False, raw) for owner, raw in self.arrived]
        up = [Message(owner, True, reply.head, reply.parts) for owner, reply in self.answered]
        return list(dict.fromkeys([*down, *up]))

    def deliver(self, owner: str) -> Callable[[bytes], Awaitable[Reply]]:
        """Return the daemon's door, with what passes kept."""

        async def deliver(request: bytes) -> Reply:
            self.arrived.append((owner, request))
            reply = await self.daemons[owner].handle(request)
            self.answered.append((owner, reply))
            return reply

        return deliver

    def handlers(self) -> dict[str, Callable[[bytes], Awaitable[Reply]]]:
        """Return nodes and doors for a carrier in memory."""
        return {f"node-{owner}": self.deliver(owner) for owner in self.daemons}


def make_private_data(folder: Path, owner: str) -> Path:
    """Write an owner's records with names and numbers that stand nowhere else; return the folder."""
    tiny.make_data(folder, owner)
    for file in sorted(folder.glob("*.jsonl")):
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for record in records:
            digest = sha256(f"{owner}{record['messages'][0]['content']}".encode())
            name = digest[:9].translate(str.maketrans("0123456789", "klmnoprstu")).capitalize()
            number = str(int(digest[9:21], 16))[:10]
            record["messages"][0]["content"] += f" for {name}, card {number}"
            record["messages"][1]["content"] += f" # {name} {number}"
        file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return folder


def make_world(
    captured: CapturedRound, base: Path, clock: Clock, *, worker: Callable[[], Executor], hold_s: float = 0.0,
    trainer_of: Callable[[str, Trainer], Trainer] = lambda _owner, trainer: trainer,
) -> World:  # fmt: skip
    """Make four owners' homes and daemons, and the coordinator that will ask them."""
    model = open_base(base)
    shapes = {module: model.module_shapes(module) for module in MODULES}
    spec = AdapterSpec(model.digest, 16, 16, shapes, (0, 1))
    world = World(captured.root / "c", **SETTINGS)
    world.folder.mkdir(parents=True)
    world.clock = clock  # type: ignore[assignment]
    homes = {owner: captured.root / owner for owner in OWNERS}
    for owner, home in homes.items():
        home.mkdir(parents=True)
        captured.identities[owner] = SigningIdentity.create(home / app.KEY_FILE)
    world.roster = Roster.of({OwnerId(o): identity.public for o, identity in captured.identities.items()})
    world.federation = Federation(world.settings, spec, world.roster)
    for owner, home in homes.items():
        real = LoraTrainer(base, model.digest, captured.data[owner], max_tokens=_MAX_TOKENS, owner=OwnerId(owner))
        trainer = trainer_of(owner, KeepingTrainer(real, owner, captured.hidden))
        policy = OwnerPolicy(max_epsilon=100.0, delta=1e-5, allowed_bases=(model.digest,))
        ledger = Ledger.open(
            home / app.LEDGER_FILE, captured.identities[owner], clock, dataset=trainer.dataset,
            limit_epsilon=policy.limit_epsilon, delta=policy.delta,
        )  # fmt: skip
        captured.daemons[owner] = Daemon(
            owner=OwnerId(owner), federation=FederationName("tools"), home=home,
            identity=captured.identities[owner], roster=world.roster, coordinator=world.identity.public,
            policy=policy, ledger=ledger, trainer=trainer, clock=clock, rng=OsRng(), release="test",
            worker=worker(), hold_s=hold_s,
        )  # fmt: skip
    return world


async def in_memory(captured: CapturedRound, base: Path, **changes: Callable[[str, Trainer], Trainer]) -> None:
    """Run the round over a carrier in memory, on a clock of its own."""
    world = make_world(captured, base, FakeClock(), worker=InlineWorker, **changes)
    memory = MemoryCarrier(captured.handlers())
    world.carrier = RecordingCarrier(memory, captured.sent, captured.received)  # type: ignore[assignment]
    (captured.record,) = await world.runner().run(1)


async def over_flower(captured: CapturedRound, base: Path) -> None:
    """Run the round over a SuperLink and four SuperNodes, each confined as `fedllm client start` confines it."""
    clock = SystemClock()
    # one worker for all: threads that train at once disturb each other's warning filters, processes would not
    worker = ThreadPoolExecutor(1)
    world = make_world(captured, base, clock, worker=lambda: worker, hold_s=app.HOLD_S)
    async with _flower(captured, world.folder, clock) as (carrier, nodes):
        world.carrier = RecordingCarrier(carrier, captured.sent, captured.received)  # type: ignore[assignment]
        runner = world.runner()
        (captured.record,) = await runner.run(1)
        for owner, processes in nodes.items():
            assert all(process.alive() for process in processes)
            captured.isolation[owner] = _what_it_can_open(captured, owner, processes)


@contextlib.asynccontextmanager
async def _flower(
    captured: CapturedRound, home: Path, clock: Clock
) -> AsyncIterator[tuple[FlowerCarrier, dict[str, tuple[Supervised, ...]]]]:
    port, *node_ports = _free_ports(1 + len(OWNERS))
    carrier = await FlowerCarrier.open(
        home / "f", host="127.0.0.1", port=port, clock=clock, rng=OsRng(), environ=os.environ
    )
    servers, nodes = [], {}
    try:
        for owner, node_port in zip(OWNERS, node_ports, strict=True):
            folder = captured.root / owner
            servers.append(await serve_deliver(folder / app.SOCKET, captured.deliver(owner)))
            settings = ClientSettings(
                owner=owner, federation="tools", home=folder, data=captured.data[owner], base=home,
                coordinator_key="", roster=home, superlink=f"127.0.0.1:{port}", node_port=node_port,
            )  # fmt: skip
            nodes[owner] = app._relay_processes(settings, probe([folder, captured.data[owner]]), clock)
            for process in nodes[owner]:
                process.start()
        async with asyncio.timeout(PATIENCE_S):
            while len(await carrier.nodes()) < len(OWNERS):
                await clock.sleep(0.2)
        yield carrier, nodes
    finally:
        for processes in nodes.values():
            for process in processes:
                process.terminate()
        await carrier.close()
        for server in servers:
            await server.stop(0)
        for daemon in captured.daemons.values():
            await daemon.close()


def private_files(captured: CapturedRound, owner: str) -> list[Path]:
    """Return the files that nobody but the owner's daemon may read."""
    home = captured.root / owner
    return [home / app.KEY_FILE, home / app.LEDGER_FILE, *sorted(captured.data[owner].glob("*.jsonl"))]


def _what_it_can_open(captured: CapturedRound, owner: str, processes: tuple[Supervised, ...]) -> dict[str, str]:
    """Open the private files, and one that is allowed, under the very restrictions the relay runs under."""
    files = [*private_files(captured, owner), captured.root / owner / app.RUN_DIR / "own.txt"]
    files[-1].write_text("mine", encoding="utf-8")
    code = (
        "import json, sys\n"
        "def attempt(path):\n"
        "    try:\n        open(path, 'rb').read(); return 'read'\n"
        "    except OSError as error:\n        return type(error).__name__\n"
        "print(json.dumps({path: attempt(path) for path in sys.argv[1:]}))"
    )
    found: dict[str, str] = {}
    for process in processes:
        command = process._argv[: process._argv.index("--") + 1] if "--" in process._argv else []
        command = [*command, sys.executable, "-I", "-S", "-c", code, *map(str, files)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE_S)
        found |= {f"{process.name} {Path(p).name}": what for p, what in json.loads(done.stdout).items()}
        for pid in descendants(process.pid or 0):
            status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
            no_new_privs = re.search(r"NoNewPrivs:\s*(\d)", status)
            found[f"{process.name} no_new_privs {pid}"] = no_new_privs.group(1) if no_new_privs else "unknown"
            environ = Path(f"/proc/{pid}/environ").read_bytes()
            held = [str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()]
            secret = [f for f in files[:-1] if str(f) in held or str(f).encode() in environ]
            found[f"{process.name} holds {pid}"] = ", ".join(f.name for f in secret) or "nothing"
    return found


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports
