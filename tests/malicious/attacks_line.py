"""Bytes that no owner takes: changed, cut, misdirected, replayed, signed by somebody else, or of another form."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import cbor2
from malicious.attacks_sum import others
from malicious.removals import cut, replaced
from malicious.scene import IDENTITIES, OWNERS, Attack, Play, Scene, Verdicts, begin, plan, verdict
from unit.client.owner_fakes import sealed

from fedllm import wire
from fedllm.client.daemon import Daemon
from fedllm.client.outbox import Outbox
from fedllm.client.round import Answer
from fedllm.errors import FedllmError
from fedllm.ids import OwnerId, RoundNumber
from fedllm.messages import envelope
from fedllm.messages.envelope import Envelope, Sealed
from fedllm.messages.round import Begin, Close, Closed, Confirm, FetchAdvertise, Refused, decode_body

UNCHECKED = cut(envelope.unseal, "key.verify")
CANONICAL = "encode(value) != data"
NEW_READERS = replaced(wire, "_reader", cache(wire._reader.__wrapped__))
"""Readers are made once for a type; these are made without the check that was taken out, and forgotten again."""


def delivered(change: Callable[[bytes, OwnerId], bytes]) -> Play:
    """Return the attack that delivers the honest beginning of a round, changed."""

    async def play(home: Path) -> Verdicts:
        at = Scene(home)
        said: Verdicts = {}
        for owner in OWNERS:
            body, _ = await at.deliver(owner, change(sealed(begin(plan()), owner), owner))
            said[owner] = verdict(body)
        return said

    return play


def enclosed(change: Callable[[bytes], bytes], kind: str = "Begin") -> Play:
    """Return the attack that signs an envelope with a changed body: what is wrong is inside."""

    def sign_again(data: bytes, _owner: OwnerId) -> bytes:
        honest = wire.decode(Envelope, wire.decode(Sealed, data).envelope)
        changed = dataclasses.replace(honest, kind=kind, body=change(honest.body))
        return envelope.seal(changed, IDENTITIES[envelope.COORDINATOR])

    return delivered(sign_again)


def _flipped(where: str) -> Callable[[bytes, OwnerId], bytes]:
    """Return what flips a bit of the signature, or of the last byte of the global adapter in the body."""

    def change(data: bytes, _owner: OwnerId) -> bytes:
        found = wire.decode(Sealed, data)
        if where == "signature":
            return wire.encode(Sealed(found.envelope, bytes([found.signature[0] ^ 1]) + found.signature[1:]))
        opened = wire.decode(Envelope, found.envelope)
        body = wire.decode(Begin, opened.body)
        head = body.head[:-4] + bytes([body.head[-4] ^ 1]) + body.head[-3:]
        changed = dataclasses.replace(opened, body=wire.encode(dataclasses.replace(body, head=head)))
        return wire.encode(Sealed(wire.encode(changed), found.signature))

    return change


def _long_integers(body: bytes) -> bytes:
    """Return the same message with an integer in two bytes where one is enough."""
    assert body.startswith(b"\xa3"), "a map of three fields"
    return b"\xb8\x03" + body[1:]


def _one_field_more(body: bytes) -> bytes:
    return cbor2.dumps({**cbor2.loads(body), "more": 1}, canonical=True)


async def an_id_used_twice(home: Path) -> Verdicts:
    """Ask for a signature over one set and, under the same request id, over another."""
    at = Scene(home)
    await at.mask()
    for owner in OWNERS:
        assert await at.verdict(owner, Confirm("update", OWNERS), request=bytes(16)) == "Confirmed"
    gone = {owner: others(OWNERS[0] if owner != OWNERS[0] else OWNERS[1]) for owner in OWNERS}
    return {owner: await at.verdict(owner, Confirm("update", gone[owner]), request=bytes(16)) for owner in OWNERS}


async def a_message_of_the_round_before(home: Path) -> Verdicts:
    """Record a request in round 1, and play it back, byte for byte, in round 2."""
    at = Scene(home)
    await at.begin()
    recorded = {owner: sealed(FetchAdvertise(), owner) for owner in OWNERS}
    await at.each(Close("promoted", None))
    await at.begin(plan(round=RoundNumber(2)))
    return {owner: verdict((await at.deliver(owner, data))[0]) for owner, data in recorded.items()}


def _told(outbox: Outbox, federation: str, error: FedllmError, _size: int) -> Any:
    """Answer wrong bytes with what is wrong with them."""
    nobody = Envelope(envelope.ENVELOPE_VERSION, "", federation, 0, envelope.COORDINATOR, outbox._owner, bytes(16), b"")
    return outbox.leave(nobody, Answer(Refused(error.code, error.message, None)))


TOLD = replaced(Outbox, "unopened", _told)
"""Wrong bytes get one answer, whatever is wrong with them."""

LINES = [
    # what the envelope does not prove
    Attack("nothing", delivered(lambda _data, _o: b""), "authentication", (TOLD,), "decode"),
    Attack("garbage", delivered(lambda _data, _o: bytes(range(256)) * 40), "authentication", (TOLD,), "decode"),
    Attack("a truncated message", delivered(lambda data, _o: data[:-1]), "authentication", (TOLD,), "decode"),
    Attack("half a message", delivered(lambda data, _o: data[: len(data) // 2]), "authentication", (TOLD,), "decode"),
    Attack("a message with a tail", delivered(lambda data, _o: data + b"\0"), "authentication", (TOLD,), "decode"),
    Attack(
        "a bit flipped in the signature", delivered(_flipped("signature")), "authentication", (UNCHECKED,), "Advertised"
    ),
    Attack(
        "a bit flipped in the body", delivered(_flipped("body")), "authentication", (UNCHECKED,), "digest-mismatch"
    ),
    Attack(
        "a message that another signed", delivered(lambda _d, o: sealed(begin(plan()), o, signer="stranger")),
        "authentication", (UNCHECKED,), "Advertised",
    ),
    Attack(
        "a message that another owner signed", delivered(lambda _d, o: sealed(begin(plan()), o, signer=others(o)[0])),
        "authentication", (UNCHECKED,), "Advertised",
    ),
    Attack(
        "a message for another owner", delivered(lambda _d, o: sealed(begin(plan()), others(o)[0])), "authentication",
        (cut(envelope.unseal, "envelope.sender, envelope.receiver"),), "Advertised",
    ),
    Attack(
        "a message for anybody", delivered(lambda _d, o: sealed(begin(plan()), o, receiver="")), "authentication",
        (cut(Daemon._unseal, "envelope.kind != Hello.__name__"),), "Advertised",
    ),
    Attack(
        "an envelope of another version", delivered(lambda _d, o: sealed(begin(plan()), o, version=2)),
        "version-unsupported", (cut(envelope._decode, "version != ENVELOPE_VERSION"),), "Advertised",
    ),
    # what is in it
    Attack(
        "a truncated body", enclosed(lambda body: body[:-1]), "decode",
        (replaced(wire, "_UNREADABLE", (ZeroDivisionError,)),), "failed",
    ),
    Attack("a body with a tail", enclosed(lambda body: body + b"\0"), "decode", (cut(wire.decode, CANONICAL),),
           "Advertised"),
    Attack("a body in another form", enclosed(_long_integers), "decode", (cut(wire.decode, CANONICAL),), "Advertised"),
    Attack(
        "a body with one field more", enclosed(_one_field_more), "decode",
        (cut(wire.decode, CANONICAL), cut(wire._record_reader, "value.keys() != names"), NEW_READERS), "Advertised",
    ),
    Attack(
        "a body of another kind", enclosed(lambda _body: wire.encode(Closed()), kind="Closed"), "step-mismatch",
        (cut(Daemon._active, "self._round is None"),), "failed",
    ),
    Attack(
        "a kind that there is not", enclosed(lambda body: body, kind="Update"), "decode",
        (cut(decode_body, "cls is None"),), "failed",
    ),
    # replay
    Attack(
        "an id used for two requests", an_id_used_twice, "request-reused",
        (replaced(Outbox, "again", lambda _self, _request: None),), "two-views",
    ),
    Attack(
        "a message of the round before", a_message_of_the_round_before, "step-mismatch",
        (cut(Daemon._active, "envelope.round !="),), "Advertised",
    ),
]  # fmt: skip
