"""A federation in memory: real keys, real secure aggregation, toy updates, a carrier that can fail."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedllm import wire
from fedllm.adapter import AdapterSpec, AdapterState
from fedllm.aggregation.methods import get_method
from fedllm.aggregation.secagg.owner import SecAggOwner
from fedllm.aggregation.vector import OwnerScores, ScoreVector, UpdateTail, UpdateVector
from fedllm.clock import FakeClock
from fedllm.config import FederationSettings
from fedllm.errors import FedllmError, SharesUnopenable
from fedllm.identity import Roster, SigningIdentity, VerifyKey
from fedllm.ids import Digest, OwnerId, sha256
from fedllm.messages.envelope import COORDINATOR, ENVELOPE_VERSION, Envelope, seal, unseal
from fedllm.messages.mechanism import Mechanism
from fedllm.messages.plan import RoundPlan
from fedllm.messages.round import (
    Advertised,
    Begin,
    Body,
    Close,
    Closed,
    Complained,
    Confirm,
    Confirmed,
    Evaluate,
    FetchAdvertise,
    FetchScores,
    Hello,
    HelloReply,
    Masked,
    Pending,
    Refused,
    Retry,
    Scoring,
    SendMasked,
    SharedKeys,
    ShareKeys,
    Started,
    Unmask,
    Unmasked,
    decode_body,
)
from fedllm.messages.secagg import PURPOSE_EVALUATION, PURPOSE_UPDATE, ShareDelivery
from fedllm.registry.store import Registry
from fedllm.relay.carrier import Reply
from fedllm.rng import SeededRng
from fedllm.server.federation import Federation
from fedllm.server.gate import ScoreGate
from fedllm.server.journal import Journal
from fedllm.server.ports import EpsilonOf, Gate, RoundEvent
from fedllm.server.roster import ANYBODY, Roll
from fedllm.server.rounds.runner import RoundRunner

OWNERS = ("east", "north", "south", "west")
SPEC = AdapterSpec(Digest("ab" * 32), 2, 4, {"q_proj": (6, 4)}, (0, 1))


@dataclass
class Agent:
    """One owner's side of the protocol, with a toy update: every B entry moves by `step`."""

    owner: OwnerId
    identity: SigningIdentity
    roster: Roster
    coordinator: VerifyKey
    step: float = 0.01
    polls: int = 2
    refuse: Refused | None = None
    losses: tuple[float, float] = (1.0, 2.0)
    begun: list[Digest] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    seen: dict[bytes, Reply] = field(default_factory=dict)
    machines: dict[str, SecAggOwner] = field(default_factory=dict)

    async def deliver(self, data: bytes) -> Reply:
        """Answer one sealed request; the same request gets the same answer."""
        try:
            request = unseal(data, self.coordinator, sender=COORDINATOR, receiver=self.owner)
        except FedllmError:
            request = unseal(data, self.coordinator, sender=COORDINATOR, receiver=ANYBODY)
        if request.request in self.seen:
            return self.seen[request.request]
        self.parts: tuple[bytes, ...] = ()
        try:
            body = self._answer(request, decode_body(request.kind, request.body))
        except FedllmError as error:
            body = Refused(error.code, error.message, error.hint)
        reply = Envelope(
            ENVELOPE_VERSION, type(body).__name__, request.federation, request.round, self.owner, COORDINATOR,
            request.request, wire.encode(body),
        )  # fmt: skip
        sealed = Reply(seal(reply, self.identity), self.parts)
        if not isinstance(body, Pending | Refused):
            self.seen[request.request] = sealed
        return sealed

    def _answer(self, request: Envelope, body: Body) -> Body:
        handler = getattr(self, f"_on_{request.kind}")
        answer: Body = handler(body)
        return answer

    def _on_Hello(self, body: Hello) -> Body:  # noqa: N802 - named after the message
        return HelloReply(self.owner, body.challenge, "test")

    def _on_Close(self, body: Close) -> Body:  # noqa: N802
        self.closed.append(body.outcome)
        for machine in self.machines.values():
            machine.close()
        return Closed()

    def _on_FetchAdvertise(self, _body: FetchAdvertise) -> Body:  # noqa: N802
        self._left -= 1
        if self._left > 0:
            return Pending("training", 1, 2, 3.0)
        update, evaluation = (self.machines[p].advertise() for p in (PURPOSE_UPDATE, PURPOSE_EVALUATION))
        return Advertised(update, evaluation, 7.0)

    def _on_ShareKeys(self, body: ShareKeys) -> Body:  # noqa: N802
        return SharedKeys(
            self.machines[PURPOSE_UPDATE].share_keys(body.update),
            self.machines[PURPOSE_EVALUATION].share_keys(body.evaluation),
        )

    def _on_SendMasked(self, body: SendMasked) -> Body:  # noqa: N802
        self._deliveries = body
        return self._masked(PURPOSE_UPDATE, body.update, self._update())

    def _masked(self, purpose: str, delivery: ShareDelivery, values: np.ndarray) -> Body:
        try:
            head, self.parts = self.machines[purpose].mask(delivery, values)
        except SharesUnopenable as error:
            return Complained(self.machines[purpose].complaint([OwnerId(d) for d in error.dealers]))
        return Masked(head)

    def _on_Confirm(self, body: Confirm) -> Body:  # noqa: N802
        return Confirmed(self.machines[body.purpose].confirm(body.survivors))

    def _on_Unmask(self, body: Unmask) -> Body:  # noqa: N802
        return Unmasked(self.machines[body.request.purpose].unmask(body.request))

    def _on_Evaluate(self, body: Evaluate) -> Body:  # noqa: N802
        self._candidate = AdapterState.from_bytes(self._plan.spec, body.candidate)
        self.machines[PURPOSE_EVALUATION].bind(bytes.fromhex(self._candidate.digest))
        return Scoring(1.0)

    def _on_FetchScores(self, _body: FetchScores) -> Body:  # noqa: N802
        vector = ScoreVector(len(self._plan.cohort)).encode(OwnerScores(5, *self.losses), SeededRng(1))
        return self._masked(PURPOSE_EVALUATION, self._deliveries.evaluation, vector)

    def _on_Begin(self, body: Begin) -> Body:  # noqa: N802
        return self.refuse if self.refuse is not None else self._begin(body)

    def _on_Retry(self, body: Retry) -> Body:  # noqa: N802
        self._attempt(body.plan.open(self.coordinator))
        self._left = 0
        return self._on_FetchAdvertise(FetchAdvertise())

    def _begin(self, body: Begin) -> Started:
        plan = body.plan.open(self.coordinator)
        self._left = self.polls
        self._head = AdapterState.from_bytes(plan.spec, body.head)
        assert self._head.digest == plan.head
        self.begun.append(plan.digest)
        if body.previous is not None:
            self.told.append(body.previous.outcome)
        self._attempt(plan)
        return Started(5.0)

    def _attempt(self, plan: RoundPlan) -> None:
        self._plan = plan
        for purpose, bits, entries in (
            (PURPOSE_UPDATE, plan.ring.bits, vector_of(plan).entries),
            (PURPOSE_EVALUATION, 32, ScoreVector(len(plan.cohort)).entries),
        ):
            self.machines[purpose] = SecAggOwner(
                plan=plan, purpose=purpose, owner=self.owner, identity=self.identity, roster=self.roster,
                ring_bits=bits, entries=entries, rng=SeededRng(f"{self.owner}{plan.digest}{purpose}"),
                once=lambda _ctx, _step, _asked: None,
            )  # fmt: skip

    def _update(self) -> np.ndarray:
        vector = vector_of(self._plan)
        weight = 1.0 if self._plan.weights is None else self._plan.weights[self.owner]
        flat = np.full(vector.layout_size, self.step, dtype=np.float32)
        return vector.encode(flat, weight, UpdateTail(10, 1.5), SeededRng(self.owner))


def vector_of(plan: RoundPlan) -> UpdateVector:
    """Return the codec of a plan's update sum."""
    size = plan.spec.layout(get_method(plan.method).trainable(int(plan.round))).size
    return UpdateVector(plan.ring, len(plan.cohort), size, plan.mechanism.covered)


Fault = Callable[[str, str, int], str]
"""(owner, kind of request, how often this owner was asked this kind) -> deliver, lose, lose-reply, garble, swap, and
garble-parts, cut-parts of a vector."""


class FaultyCarrier:
    """Delivers to agents in memory; what `fault` says goes wrong."""

    def __init__(self, agents: dict[str, Agent], clock: FakeClock) -> None:
        self.agents = agents
        self.clock = clock
        self.fault: Fault = lambda _owner, _kind, _count: "deliver"
        self.counts: dict[tuple[str, str], int] = {}
        self.carried: list[bytes] = []
        self.chunks: list[bytes] = []
        self.last: dict[str, Reply] = {}

    @property
    def patience_s(self) -> float:
        """Return no patience: nothing reconnects here."""
        return 0.0

    async def nodes(self) -> tuple[str, ...]:
        """Return one node for each agent."""
        return tuple(sorted(f"node-{name}" for name in self.agents))

    async def exchange(
        self, outbound: dict[str, bytes], *, deadline_s: float
    ) -> AsyncGenerator[tuple[str, Reply], None]:
        """Deliver, or do what `fault` says; a missing reply costs the whole deadline."""
        replies: dict[str, Reply] = {}
        for node, data in outbound.items():
            name = node.removeprefix("node-")
            kind = kind_of(data)
            count = self.counts[name, kind] = self.counts.get((name, kind), 0) + 1
            what = self.fault(name, kind, count)
            self.carried.append(data)
            if what == "lose":
                continue
            reply = await self.agents[name].deliver(data)
            self.carried.append(reply.head)
            self.chunks += reply.parts
            if what == "garble":
                reply = Reply(reply.head[:-1] + bytes([reply.head[-1] ^ 1]), reply.parts)
            elif what == "garble-parts":
                reply = Reply(reply.head, tuple(part[:-1] + bytes([part[-1] ^ 1]) for part in reply.parts))
            elif what == "cut-parts":
                reply = Reply(reply.head, reply.parts[:-1])
            elif what == "swap":
                reply = self.last.get(name, Reply(b"\x00"))
            self.last[name] = reply
            if what != "lose-reply":
                replies[node] = reply
        await self.clock.sleep(0.01 if len(replies) == len(outbound) else deadline_s)
        for node, answered in replies.items():
            yield node, answered

    async def close(self) -> None:
        """Nothing to close."""


def kind_of(data: bytes) -> str:
    """Kind of a sealed message, unverified; tests only."""
    from fedllm.messages.envelope import Sealed

    return wire.decode(Envelope, wire.decode(Sealed, data).envelope).kind


class World:
    """Coordinator and four owners over one folder; `runner()` makes a fresh coordinator on the same journal."""

    def __init__(self, folder: Path, *, owners: Sequence[str] = OWNERS, **settings: object) -> None:
        self.folder = folder
        self.clock = FakeClock()
        self.identity = SigningIdentity.from_seed(b"\x01" * 32)
        keys = {OwnerId(o): SigningIdentity.from_seed(bytes.fromhex(sha256(o.encode()))) for o in owners}
        self.roster = Roster.of({o: k.public for o, k in keys.items()})
        self.agents = {str(o): Agent(o, k, self.roster, self.identity.public) for o, k in keys.items()}
        values = {
            "name": "tools", "base": Path("base"), "alias": "acme/tools", "rank": 2, "alpha": 4, "privacy": False,
            "value_bits": 16, "clip_range": 1.0, "train_deadline_s": 100.0, "phase_deadline_s": 20.0,
            "declared_records": dict.fromkeys(owners, 10), "gate_margin": 0.0,
        }  # fmt: skip
        self.settings = FederationSettings(**{**values, **settings})  # type: ignore[arg-type]
        self.federation = Federation(self.settings, SPEC, self.roster)
        self.carrier = FaultyCarrier(self.agents, self.clock)
        self.events: list[RoundEvent] = []
        self.epsilon_of: EpsilonOf = toy_epsilon
        self.gate: Gate = ScoreGate(self.settings.gate_margin)

    def runner(self) -> RoundRunner:
        """Return a coordinator that was started just now."""
        self.journal = Journal(self.folder / "journal.sqlite")
        self.registry = Registry(self.folder / "registry", self.identity.public, self.clock)
        roll = Roll(self.settings.name, self.roster, self.identity, self.carrier, SeededRng(self.clock.now().hex()))
        return RoundRunner(
            self.federation, self.identity, roll, self.journal, self.registry,
            gate=self.gate, epsilon_of=self.epsilon_of, clock=self.clock, rng=SeededRng(self.clock.now().hex() + "n"),
            progress=self.events.append,
        )  # fmt: skip


def toy_epsilon(mechanisms: Sequence[Mechanism], delta: float, unit: str) -> float | None:
    """One per round under DP; nothing bounds it without."""
    return None if any(m.kind == "none" for m in mechanisms) else float(len(mechanisms))
