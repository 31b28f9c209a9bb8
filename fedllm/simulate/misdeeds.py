"""Owners that misbehave: an honest daemon's replies, changed and signed again with the owner's own key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fedllm import wire
from fedllm.identity import SigningIdentity
from fedllm.ids import sha256
from fedllm.messages.envelope import seal
from fedllm.messages.round import Body, Complained, Masked, SendMasked, SharedKeys, Unmasked, decode_body
from fedllm.messages.secagg import PURPOSE_UPDATE, Complaint
from fedllm.relay.carrier import Reply
from fedllm.relay.memory import Handler
from fedllm.simulate.fates import Misdeed, Weather, request_in

STRANGER = SigningIdentity.from_seed(b"nobody pinned this simulated key")
"""A key that is in no roster."""


def misbehaving(handle: Handler, owner: str, identity: SigningIdentity, weather: Weather) -> Handler:
    """Return a daemon's handler that commits the misdeed of the round's fates, if the owner has one."""

    async def answer(data: bytes) -> Reply:
        reply = await handle(data)
        misdeed = weather.fates.misdeeds.get(owner)  # type: ignore[call-overload]
        return reply if misdeed is None else commit(misdeed, data, reply, identity)

    return answer


def commit(misdeed: Misdeed, request: bytes, reply: Reply, identity: SigningIdentity) -> Reply:
    """Return what leaves instead of `reply`: itself, unless this is the step at which the misdeed is committed."""
    envelope = request_in(reply.head)
    body = decode_body(envelope.kind, envelope.body)
    if misdeed is Misdeed.OTHER_SIGNATURE:
        return Reply(seal(envelope, STRANGER), reply.parts) if isinstance(body, Masked) else reply
    changed, parts = _ACTS[misdeed](body, reply.parts, request)
    if changed is body:
        return reply
    return Reply(seal(replace(envelope, kind=type(changed).__name__, body=wire.encode(changed)), identity), parts)


Parts = tuple[bytes, ...]


def _bad_shares(body: Body, parts: Parts, _request: bytes) -> tuple[Body, Parts]:
    if not isinstance(body, SharedKeys):
        return body, parts
    spoilt = {peer: sealed[:-1] + bytes([sealed[-1] ^ 1]) for peer, sealed in body.update.ciphertexts.items()}
    return replace(body, update=replace(body.update, ciphertexts=spoilt)), parts


def _wrong_shares(body: Body, parts: Parts, _request: bytes) -> tuple[Body, Parts]:
    if not isinstance(body, Unmasked) or body.shares.purpose != PURPOSE_UPDATE:
        return body, parts
    peers = sorted(body.shares.seed_shares)
    # each peer's share under the next one's name: numbers of the right form that open nothing
    turned = {peer: body.shares.seed_shares[peers[at - 1]] for at, peer in enumerate(peers)}
    return replace(body, shares=replace(body.shares, seed_shares=turned)), parts


def _short_vector(body: Body, parts: Parts, _request: bytes) -> tuple[Body, Parts]:
    if not isinstance(body, Masked) or body.vector.purpose != PURPOSE_UPDATE:
        return body, parts
    cut = (*parts[:-1], parts[-1][: -body.vector.entry_bytes])
    chunks = tuple(bytes.fromhex(sha256(part)) for part in cut)
    return replace(body, vector=replace(body.vector, entries=body.vector.entries - 1, chunks=chunks)), cut


def _false_complaint(body: Body, parts: Parts, request: bytes) -> tuple[Body, Parts]:
    asked = request_in(request)
    told = decode_body(asked.kind, asked.body)
    if not isinstance(body, Masked) or not isinstance(told, SendMasked):
        return body, parts
    dealer = min(told.update.ciphertexts)
    return Complained(Complaint(body.vector.owner, PURPOSE_UPDATE, (dealer,))), ()  # type: ignore[arg-type]


_ACTS: dict[Misdeed, Callable[[Body, Parts, bytes], tuple[Body, Parts]]] = {
    Misdeed.BAD_SHARES: _bad_shares,
    Misdeed.WRONG_SHARES: _wrong_shares,
    Misdeed.SHORT_VECTOR: _short_vector,
    Misdeed.FALSE_COMPLAINT: _false_complaint,
}
