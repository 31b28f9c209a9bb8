"""Bodies of the exchanges of a round, each a request by the coordinator and a reply by an owner.

Long work is *started* by one message and *fetched* by a later one: a carrier such as Flower keeps one message
in flight per owner, so a message never waits for training (docs/adr/0002).
"""

from __future__ import annotations

from dataclasses import dataclass

from fedllm import wire
from fedllm.errors import DecodeError
from fedllm.ids import OwnerId
from fedllm.messages.plan import SignedPlan
from fedllm.messages.secagg import (
    Complaint,
    KeyBundle,
    MaskedVector,
    ShareDelivery,
    ShareMessage,
    SurvivorSignature,
    UnmaskRequest,
    UnmaskShares,
)


@dataclass(frozen=True)
class Hello:
    """Who is there? Binds a carrier's node to an owner's pinned identity."""

    challenge: bytes


@dataclass(frozen=True)
class HelloReply:
    """I am; the envelope's signature proves it."""

    owner: OwnerId
    challenge: bytes
    release: str


@dataclass(frozen=True)
class Ended:
    """How a round of this federation ended, for an owner that took part in it."""

    round: int
    outcome: str
    reason: str | None


@dataclass(frozen=True)
class Begin:
    """Start training: the signed plan and the global adapter it names by digest (flat float32 bytes).

    `previous` closes the round before, which saves an exchange. Answered by `Advertised` if training ends soon.
    """

    plan: SignedPlan
    head: bytes
    previous: Ended | None


@dataclass(frozen=True)
class Retry:
    """The attempt before failed: advertise fresh keys for the update that is trained already, under a new plan."""

    plan: SignedPlan


@dataclass(frozen=True)
class Started:
    """The plan passed the owner's policy, its epsilon is reserved, training runs."""

    expected_s: float


@dataclass(frozen=True)
class FetchAdvertise:
    """Is training done? If so, advertise keys."""


@dataclass(frozen=True)
class Pending:
    """Not yet: progress of the work that runs, in steps of its own."""

    stage: str
    done: int
    total: int
    retry_after_s: float


@dataclass(frozen=True)
class Advertised:
    """Training is done; fresh keys for both sums. `train_s` is the wall time of training."""

    update: KeyBundle
    evaluation: KeyBundle
    train_s: float


@dataclass(frozen=True)
class ShareKeys:
    """Everybody's signed keys (U1), for both sums."""

    update: tuple[KeyBundle, ...]
    evaluation: tuple[KeyBundle, ...]


@dataclass(frozen=True)
class SharedKeys:
    """Encrypted shares for every peer, for both sums."""

    update: ShareMessage
    evaluation: ShareMessage


@dataclass(frozen=True)
class SendMasked:
    """Mask and send: the shares addressed to this owner, for both sums."""

    update: ShareDelivery
    evaluation: ShareDelivery


@dataclass(frozen=True)
class Masked:
    """The masked vector of one sum: its head; the chunks that it names follow the envelope as its parts."""

    vector: MaskedVector


@dataclass(frozen=True)
class Complained:
    """No vector, because of shares that do not open; for either sum."""

    complaint: Complaint


@dataclass(frozen=True)
class Confirm:
    """Sign the survivor set U3 of one sum."""

    purpose: str
    survivors: tuple[OwnerId, ...]


@dataclass(frozen=True)
class Confirmed:
    """The signature, given once."""

    signature: SurvivorSignature


@dataclass(frozen=True)
class Unmask:
    """Open the sum: signatures of at least t owners over the same U3."""

    request: UnmaskRequest


@dataclass(frozen=True)
class Unmasked:
    """Shares that open the sum and nothing else."""

    shares: UnmaskShares


@dataclass(frozen=True)
class Evaluate:
    """Start scoring: the candidate adapter (flat float32 bytes) against the plan's head.

    Answered by `Masked` scores if scoring ends soon.
    """

    candidate: bytes


@dataclass(frozen=True)
class Scoring:
    """Scoring runs."""

    expected_s: float


@dataclass(frozen=True)
class FetchScores:
    """Is scoring done? If so, send the masked scores."""


@dataclass(frozen=True)
class Close:
    """The round is over, or aborted (`reason`): forget its secrets."""

    outcome: str
    reason: str | None


@dataclass(frozen=True)
class Closed:
    """Secrets of the round are gone."""


@dataclass(frozen=True)
class Refused:
    """The owner says no, or something failed; `code` is an error code of `fedllm.errors`, never private text."""

    code: str
    message: str
    hint: str | None


Body = (
    Hello | HelloReply | Begin | Started | Retry | FetchAdvertise | Pending | Advertised | ShareKeys | SharedKeys
    | SendMasked | Masked | Complained | Confirm | Confirmed | Unmask | Unmasked | Evaluate | Scoring | FetchScores
    | Close | Closed | Refused
)  # fmt: skip

BODIES: dict[str, type] = {cls.__name__: cls for cls in Body.__args__}
"""Every type that may cross the line; anything else is refused. The allow-list of the leak test."""


def decode_body(kind: str, body: bytes) -> Body:
    """Return the body of an envelope; raise `DecodeError` for a kind that is not in the allow-list."""
    cls = BODIES.get(kind)
    if cls is None:
        raise DecodeError(f"message kind {kind[:40]!r} is not one of {len(BODIES)} known kinds")
    decoded: Body = wire.decode(cls, body)
    return decoded
