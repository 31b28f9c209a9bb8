"""The roll: which carrier node speaks for which owner, and signed question and answer over a carrier.

A node's word for who it is counts for nothing; the signature under its `Hello` reply, checked against the
pinned roster, does. What does not verify is dropped and remembered as a fault: one owner (or a carrier) that
sends garbage must not be able to stop the others' round.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field

from fedllm import wire
from fedllm.errors import AuthenticationError, FedllmError, ProtocolError
from fedllm.identity import Roster, SigningIdentity
from fedllm.ids import OwnerId
from fedllm.messages.envelope import (
    COORDINATOR,
    ENVELOPE_VERSION,
    Envelope,
    check_reply,
    peek_sender,
    request_id,
    seal,
    unseal,
)
from fedllm.messages.round import Body, Hello, HelloReply, decode_body
from fedllm.relay.carrier import Carrier
from fedllm.rng import Rng

ANYBODY = ""
"""Receiver of a `Hello`: the coordinator does not know yet who is behind a node."""
_CHALLENGE_BYTES = 32
_KEPT_FAULTS = 200
_LONGEST_SKIP = 16
"""Roll calls that a node is left out of, at most, after it kept answering as nobody of this federation."""


@dataclass(frozen=True)
class Fault:
    """Something an owner (or its way here) sent that was refused: error code and message, no content."""

    owner: str
    code: str
    message: str


@dataclass
class Traffic:
    """Bytes by owner, as carried: `up` from the owner, `down` to it."""

    up: dict[str, int] = field(default_factory=dict)
    down: dict[str, int] = field(default_factory=dict)

    def count(self, owner: str, *, up: int = 0, down: int = 0) -> None:
        """Add to an owner's counts."""
        self.up[owner] = self.up.get(owner, 0) + up
        self.down[owner] = self.down.get(owner, 0) + down


class Roll:
    """One federation's owners on one carrier.

    Parameters
    ----------
    federation : str
    roster : Roster
        Pinned keys.
    identity : SigningIdentity
        The coordinator's.
    carrier : Carrier
    rng : Rng
        Source of the challenges.
    """

    def __init__(self, federation: str, roster: Roster, identity: SigningIdentity, carrier: Carrier, rng: Rng) -> None:
        self._federation = federation
        self._roster = roster
        self._identity = identity
        self._carrier = carrier
        self._rng = rng
        self._nodes: dict[OwnerId, str] = {}
        self.releases: dict[OwnerId, str] = {}
        self.traffic = Traffic()
        self.faults: deque[Fault] = deque(maxlen=_KEPT_FAULTS)
        self._cold: dict[str, tuple[int, int]] = {}

    @property
    def present(self) -> tuple[OwnerId, ...]:
        """Owners bound to a node at the last roll call."""
        return tuple(sorted(self._nodes))

    @property
    def patience_s(self) -> float:
        """Seconds of silence after which an owner is taken for dead, as the carrier has it."""
        return self._carrier.patience_s

    def forget(self, owner: OwnerId) -> None:
        """Unbind an owner that stopped answering; the next roll call asks its node again."""
        self._nodes.pop(owner, None)

    async def call(self, *, deadline_s: float) -> tuple[OwnerId, ...]:
        """Say hello to every node that is not bound yet and return the owners that are there.

        With the whole roster bound nobody is asked: other nodes are another federation's.

        Raises
        ------
        PeerUnavailable
            If the carrier itself is lost.
        """
        nodes = set(await self._carrier.nodes())
        self._nodes = {owner: node for owner, node in self._nodes.items() if node in nodes}
        strangers = [node for node in sorted(nodes - set(self._nodes.values())) if not self._skipped(node)]
        if strangers and len(self._nodes) < len(self._roster.members):
            challenges = {node: Hello(self._rng.token(_CHALLENGE_BYTES)) for node in strangers}
            asked = {node: self._hello(node, hello) for node, hello in challenges.items()}
            sealed = {node: seal(envelope, self._identity) for node, envelope in asked.items()}
            async with aclosing(self._carrier.exchange(sealed, deadline_s=deadline_s)) as arriving:
                replies = {node: reply.head async for node, reply in arriving if node in asked}
            for node, data in sorted(replies.items()):
                self._bind(node, data, asked[node], challenges[node])
        return self.present

    def _skipped(self, node: str) -> bool:
        left, length = self._cold.get(node, (0, 0))
        if left:
            self._cold[node] = (left - 1, length)
        return left > 0

    def _hello(self, node: str, hello: Hello) -> Envelope:
        request = request_id("Hello", node, hello.challenge)
        return Envelope(
            ENVELOPE_VERSION, "Hello", self._federation, 0, COORDINATOR, ANYBODY, request, wire.encode(hello)
        )

    def _bind(self, node: str, data: bytes, asked: Envelope, hello: Hello) -> None:
        try:
            owner = OwnerId(peek_sender(data))
            reply = unseal(data, self._roster.key(owner), sender=owner, receiver=COORDINATOR)
            check_reply(reply, asked)
            body = decode_body(reply.kind, reply.body)
            if not isinstance(body, HelloReply):
                raise ProtocolError(f"{owner!r} answered Hello with {reply.kind}")
            if body.owner != owner or body.challenge != hello.challenge:
                raise AuthenticationError(f"node {node} did not sign the challenge it was sent")
        except FedllmError as error:
            # most likely another federation's owner: asked again, but less and less often
            length = min(max(1, 2 * self._cold.get(node, (0, 0))[1]), _LONGEST_SKIP)
            self._cold[node] = (length, length)
            self.faults.append(Fault(f"node {node}", error.code, error.message))
            return
        self._cold.pop(node, None)
        other = self._nodes.get(owner)
        if other is not None and other != node:
            # a copied key, or two daemons on one: one owner is asked once, and counts once
            self.faults.append(Fault(owner, "owner-twice", f"{owner!r} answers at node {node} and at {other}"))
            return
        self._nodes[owner] = node
        self.releases[owner] = body.release

    async def ask(
        self, requests: Mapping[OwnerId, Envelope], *, deadline_s: float
    ) -> AsyncGenerator[tuple[OwnerId, Body, tuple[bytes, ...]], None]:
        """Send every owner its request; yield the answers that come in time and verify, with their parts.

        An owner without a node, without an answer, or with one that does not verify is not yielded. The parts are
        as they came: the answer's body names their digests. Close the generator (`contextlib.aclosing`).

        Raises
        ------
        PeerUnavailable
            If the carrier itself is lost.
        """
        outbound: dict[str, bytes] = {}
        asked: dict[str, tuple[OwnerId, Envelope]] = {}
        for owner, envelope in requests.items():
            node = self._nodes.get(owner)
            if node is not None:
                outbound[node] = seal(envelope, self._identity)
                asked[node] = (owner, envelope)
                self.traffic.count(owner, down=len(outbound[node]))
        if not outbound:
            return
        async with aclosing(self._carrier.exchange(outbound, deadline_s=deadline_s)) as arriving:
            async for node, reply in arriving:
                if node not in asked:
                    continue
                owner, envelope = asked[node]
                self.traffic.count(owner, up=reply.size)
                try:
                    answer = unseal(reply.head, self._roster.key(owner), sender=owner, receiver=COORDINATOR)
                    check_reply(answer, envelope)
                    body = decode_body(answer.kind, answer.body)
                except FedllmError as error:
                    self.faults.append(Fault(owner, error.code, error.message))
                    continue
                yield owner, body, reply.parts
