"""Plans and envelopes: signed, versioned, bound, strictly decoded."""

from __future__ import annotations

import dataclasses

import cbor2
import pytest

from fedllm import wire
from fedllm.adapter import AdapterSpec
from fedllm.errors import DecodeError, ProtocolError, SignatureInvalid, StepMismatch, VersionUnsupported
from fedllm.identity import SigningIdentity
from fedllm.ids import OwnerId, RoundNumber, sha256
from fedllm.messages.envelope import Envelope, check_reply, reply_to, request_id, seal, unseal
from fedllm.messages.mechanism import Mechanism
from fedllm.messages.plan import PLAN_CONTEXT, PLAN_VERSION, Recipe, Ring, RoundPlan, SignedPlan, honest_threshold
from fedllm.messages.round import BODIES, FetchAdvertise, Hello, decode_body

ME = SigningIdentity.from_seed(bytes(32))
OWNERS = (OwnerId("east"), OwnerId("north"), OwnerId("south"), OwnerId("west"))


def plan(**changes: object) -> RoundPlan:
    """Return a valid plan with some fields replaced."""
    spec = AdapterSpec(sha256(b"base"), 2, 4, {"q_proj": (8, 8)}, (0,))
    made = RoundPlan(
        version=PLAN_VERSION, federation="tools", round=RoundNumber(3), attempt=1, nonce=bytes(32), cohort=OWNERS,
        threshold=3, neighbours=3, corruption=0.05, dropout=0.05,
        min_survivors=3, roster=sha256(b"roster"), spec=spec, head=sha256(b"head"), head_version=None,
        layout=spec.layout(("B",)).digest, method="ffa", weights=dict.fromkeys(OWNERS, 1.0),
        declared_records=dict.fromkeys(OWNERS, 100), recipe=Recipe("sgd", 12.0, 2, 8, 8, 160),
        mechanism=Mechanism("dp-sgd", "record", "add-or-remove-one", 0.8, 0.05, 0.25, 2, 1e-5),
        ring=Ring(24, 16, 4.0), train_deadline_s=60.0, phase_deadline_s=10.0,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def test_a_signed_plan_opens_with_the_pinned_key_only() -> None:
    """Another key or one changed byte is refused."""
    signed = SignedPlan.sign(plan(), ME)
    assert signed.open(ME.public) == plan()
    with pytest.raises(SignatureInvalid):
        signed.open(SigningIdentity.generate().public)
    with pytest.raises(SignatureInvalid):
        SignedPlan(signed.plan.replace(b"tools", b"fools"), signed.signature).open(ME.public)


def test_a_plan_of_another_version_is_named_before_its_fields_are_read() -> None:
    """A newer coordinator gets 'version 9 found, 3 spoken here', not a decode error."""
    fields = cbor2.loads(plan().encoded)
    future = cbor2.dumps({**fields, "version": 9, "brand_new": True}, canonical=True)
    signed = SignedPlan(future, ME.sign(PLAN_CONTEXT, future))
    with pytest.raises(VersionUnsupported, match="version 9 found, 3 spoken"):
        signed.open(ME.public)


def test_every_field_changes_the_digest() -> None:
    """H(plan) binds all of it: two owners shown different plans cannot cancel masks."""
    seen = {plan().digest}
    for changes in ({"threshold": 4}, {"head": sha256(b"x")}, {"nonce": b"\1" * 32}, {"round": RoundNumber(4)},
                    {"roster": sha256(b"y")}, {"ring": Ring(32, 16, 4.0)}, {"attempt": 2}, {"neighbours": 2},
                    {"corruption": 0.1}, {"dropout": 0.1}):  # fmt: skip
        seen.add(plan(**changes).digest)
    assert len(seen) == 11


@pytest.mark.parametrize(
    "changes",
    [
        {"cohort": OWNERS[::-1]},
        {"nonce": bytes(16)},
        {"attempt": 0},
        {"corruption": 1.0},
        {"dropout": -0.1},
        {"weights": {"east": 1.0}},
        {"weights": None},
        {"declared_records": dict.fromkeys(OWNERS, 0)},
    ],
)
def test_plans_no_honest_coordinator_makes_cannot_be_built(changes: dict[str, object]) -> None:
    """Unsorted cohort, short nonce, no attempt, impossible rates, uncovered or private weights, empty owners."""
    with pytest.raises(ValueError, match=r"cohort|nonce|weights|declared|attempt"):
        plan(**changes)


@pytest.mark.parametrize(("owners", "threshold"), [(3, 3), (4, 3), (5, 4), (6, 5), (7, 5), (100, 67)])
def test_honest_threshold_is_two_thirds_plus_one(owners: int, threshold: int) -> None:
    """DESIGN: 4 owners survive the loss of 1."""
    assert honest_threshold(owners) == threshold


def envelope(**changes: object) -> Envelope:
    """Return a hello envelope with some fields replaced."""
    made = Envelope(1, "Hello", "tools", 0, "coordinator", "north", bytes(16), wire.encode(Hello(b"c" * 16)))
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def test_an_envelope_opens_for_its_receiver_from_its_sender() -> None:
    """Misdirected, forged or re-versioned envelopes are refused, each with its own error."""
    data = seal(envelope(), ME)
    assert unseal(data, ME.public, sender="coordinator", receiver="north") == envelope()
    with pytest.raises(StepMismatch):
        unseal(data, ME.public, sender="coordinator", receiver="south")
    with pytest.raises(SignatureInvalid):
        unseal(data, SigningIdentity.generate().public, sender="coordinator", receiver="north")
    with pytest.raises(VersionUnsupported):
        unseal(seal(envelope(version=9), ME), ME.public, sender="coordinator", receiver="north")
    with pytest.raises(DecodeError):
        unseal(data[:-1], ME.public, sender="coordinator", receiver="north")


def test_a_reply_names_its_request() -> None:
    """A reply to another request does not pass for this one's."""
    request = envelope(request=request_id("abc", 1))
    check_reply(reply_to(request, "HelloReply", b""), request)
    with pytest.raises(ProtocolError):
        check_reply(reply_to(envelope(request=request_id("abc", 2)), "HelloReply", b""), request)


def test_only_listed_kinds_cross_the_line() -> None:
    """No kind outside the allow-list decodes, and no listed body can carry floats of an update."""
    assert decode_body("FetchAdvertise", wire.encode(FetchAdvertise())) == FetchAdvertise()
    with pytest.raises(DecodeError, match="not one of"):
        decode_body("Update", b"")
    assert "Update" not in BODIES
    assert "AdapterState" not in BODIES
