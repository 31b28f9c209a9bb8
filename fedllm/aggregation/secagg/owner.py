"""The owner's side: it assumes that the coordinator and everything between is hostile.

Every step answers one request. The same request again gets the same answer (a lost reply must not end the
round); any other is refused with `StepMismatch`: a second survivor set, a second unmask request or a second
vector under the same masks would each let the coordinator subtract.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from fedllm import wire
from fedllm.aggregation.secagg import keys
from fedllm.aggregation.secagg.masking import add_mask, pack
from fedllm.aggregation.secagg.shamir import share_to_bytes, split
from fedllm.aggregation.secagg.terms import SumTerms
from fedllm.errors import PolicyRefused, ProtocolError, SignatureInvalid, StepMismatch
from fedllm.identity import Roster, SigningIdentity
from fedllm.ids import Digest, OwnerId, sha256
from fedllm.messages.plan import RoundPlan
from fedllm.messages.secagg import (
    KeyBundle,
    MaskedVector,
    ShareDelivery,
    ShareMessage,
    SurvivorSignature,
    UnmaskRequest,
    UnmaskShares,
)
from fedllm.rng import Rng

T = TypeVar("T")
STEPS = ("advertise", "share_keys", "mask", "confirm", "unmask")


@dataclass(frozen=True)
class _Asked:
    """What a step was asked, as it is hashed."""

    bundles: tuple[KeyBundle, ...] = ()
    delivery: ShareDelivery | None = None
    values: str = ""
    owners: tuple[OwnerId, ...] = ()
    request: UnmaskRequest | None = None


class SecAggOwner:
    """One owner's part in one masked sum.

    Parameters
    ----------
    plan : RoundPlan
        Verified against the coordinator's pinned key by the caller.
    purpose : str
        ``update`` or ``evaluation``.
    owner : OwnerId
    identity : SigningIdentity
        Must be the one pinned for `owner`.
    roster : Roster
        This owner's own pinned copy.
    ring_bits, entries : int
        The ring and length of this sum.
    rng : Rng
        Keys, seeds, nonces and Shamir coefficients; `fedllm.rng.OsRng` outside tests.

    Raises
    ------
    PolicyRefused
        If the plan breaks a promise of secure aggregation (see `SumTerms.of`) or this owner is not in it.

    Notes
    -----
    Secrets are fresh for each instance and live in memory only: after a crash an owner is a dropout of this
    sum. `close` overwrites the bytearrays that hold them; CPython may have copied them (into an immutable
    ``bytes`` handed to OpenSSL, or a Python integer), and those copies go back to the allocator unwiped.
    """

    def __init__(
        self,
        *,
        plan: RoundPlan,
        purpose: str,
        owner: OwnerId,
        identity: SigningIdentity,
        roster: Roster,
        ring_bits: int,
        entries: int,
        rng: Rng,
    ) -> None:
        self._terms = SumTerms.of(plan, purpose, roster, ring_bits=ring_bits, entries=entries)
        if owner not in plan.cohort:
            raise PolicyRefused(f"the plan's cohort does not name {owner!r}")
        if roster.key(owner) != identity.public:
            raise PolicyRefused(f"the identity held here is not the one pinned for {owner!r}")
        self._owner, self._identity, self._roster, self._rng = owner, identity, roster, rng
        self._cipher = keys.KeyPair.generate(rng)
        self._mask = keys.KeyPair.generate(rng)
        self._seed = bytearray(rng.token(keys.KEY_BYTES))
        self._v1 = b""
        self._peers: dict[OwnerId, KeyBundle] = {}
        self._sharers: tuple[OwnerId, ...] = ()
        self._shares: dict[OwnerId, keys.SharePair] = {}
        self._asked: dict[str, Digest] = {}
        self._answers: dict[str, object] = {}
        self._closed = False
        self._subject = b""

    def bind(self, subject: bytes) -> None:
        """Name what this sum is about, once, before `confirm`: it opens only if t owners were shown the same.

        Raises
        ------
        StepMismatch
            If another subject was bound, or survivors were confirmed already.
        """
        if self._subject not in (b"", subject) or ("confirm" in self._asked and self._subject != subject):
            raise StepMismatch("this sum is about something else already")
        self._subject = subject

    def __repr__(self) -> str:
        return f"SecAggOwner({self._owner!r}, {self._terms.purpose!r}, {len(self._asked)} steps done, secrets redacted)"

    def advertise(self) -> KeyBundle:
        """M0: return this owner's fresh public keys, signed."""
        t = self._terms
        return self._once(
            "advertise",
            _Asked(),
            lambda: keys.sign_bundle(
                t.ctx, t.purpose, self._owner, self._cipher.public, self._mask.public, self._identity
            ),
        )

    def share_keys(self, bundles: Sequence[KeyBundle]) -> ShareMessage:
        """M1: check everybody's keys (U1) and return sealed shares of this owner's two secrets.

        Raises
        ------
        SignatureInvalid
            If a pinned identity did not sign its bundle for this very plan and purpose.
        ProtocolError
            If a bundle is from outside the cohort, double, of another sum, or this owner's own was changed;
            or if U1 is too small.
        StepMismatch
        """
        ordered = tuple(sorted(bundles, key=lambda b: b.owner))
        return self._once("share_keys", _Asked(bundles=ordered), lambda: self._share_keys(ordered))

    def _share_keys(self, bundles: tuple[KeyBundle, ...]) -> ShareMessage:
        t = self._terms
        keys.check_distinct(bundles)
        t.check_set([b.owner for b in bundles], t.cohort, what="advertised keys (U1)")
        for bundle in bundles:
            keys.check_bundle(t.ctx, t.purpose, bundle, t.cohort, self._roster)
        peers = {bundle.owner: bundle for bundle in bundles}
        if peers.get(self._owner) != self._answers["advertise"]:
            raise ProtocolError(f"the keys listed for {self._owner!r} are not the ones it advertised")
        v1 = keys.transcript(t.ctx, bundles)
        points = [t.point(owner) for owner in peers]
        seed_shares = split(bytes(self._seed), t.threshold, points, self._rng)
        key_shares = split(bytes(self._mask.private), t.threshold, points, self._rng)
        ciphertexts: dict[str, bytes] = {}
        for peer, bundle in peers.items():
            pair = keys.SharePair(seed_shares[t.point(peer)], key_shares[t.point(peer)])
            if peer == self._owner:
                self._shares[peer] = pair
            else:
                ciphertexts[peer] = keys.seal_shares(
                    pair, self._cipher, bundle.cipher_key, t.ctx, v1, self._owner, peer, self._rng
                )
        self._peers, self._v1 = peers, v1
        return ShareMessage(self._owner, t.purpose, keys.commit_seed(bytes(self._seed)), ciphertexts)

    def mask(self, delivery: ShareDelivery, values: NDArray[np.uint32]) -> MaskedVector:
        """M2: open the peers' shares, then return the values under the masks of all of U2.

        Parameters
        ----------
        delivery : ShareDelivery
        values : NDArray[uint32]
            Shape ``(entries,)``, each below ``2**ring_bits``.

        Raises
        ------
        ProtocolError
            If the delivery is malformed, too small, or a peer's shares do not open; the message names it.
        StepMismatch
            If other values or another delivery were masked before: two vectors under one mask subtract.
        """
        t = self._terms
        if values.dtype != np.uint32 or values.shape != (t.entries,) or int(values.max()) >> t.ring_bits:
            raise ProtocolError(
                f"values of {values.dtype} and shape {values.shape} to mask: "
                f"({t.entries},) uint32 below 2^{t.ring_bits} needed"
            )
        digest = sha256(np.ascontiguousarray(values).data)
        return self._once("mask", _Asked(delivery=delivery, values=digest), lambda: self._masked(delivery, values))

    def _masked(self, delivery: ShareDelivery, values: NDArray[np.uint32]) -> MaskedVector:
        t = self._terms
        self._check_delivery(delivery)
        opened = {
            peer: keys.open_shares(
                delivery.ciphertexts[peer], self._cipher, self._peers[peer].cipher_key, t.ctx, self._v1,
                peer, self._owner,
            )
            for peer in delivery.sharers
            if peer != self._owner
        }  # fmt: skip
        y = values.copy()
        add_mask(y, keys.self_mask_key(bytes(self._seed), t.ctx, self._v1, self._owner), sign=1)
        for peer in opened:
            key = keys.pair_mask_key(self._mask, self._peers[peer].mask_key, t.ctx, self._v1, self._owner, peer)
            add_mask(y, key, sign=1 if self._owner < peer else -1)
        self._shares.update(opened)
        self._sharers = delivery.sharers
        return MaskedVector(self._owner, t.purpose, t.entries, t.entry_bytes, pack(y, t.entry_bytes))

    def _check_delivery(self, delivery: ShareDelivery) -> None:
        self._check_purpose(delivery.purpose)
        self._terms.check_set(delivery.sharers, tuple(self._peers), what="sharers (U2)")
        if self._owner not in delivery.sharers:
            raise ProtocolError(f"the sharers (U2) do not name {self._owner!r}, who shared")
        if set(delivery.ciphertexts) != set(delivery.sharers) - {self._owner}:
            raise ProtocolError("sealed shares are not from exactly the other sharers (U2)")
        own = cast("ShareMessage", self._answers["share_keys"]).seed_commitment
        if set(delivery.commitments) != set(delivery.sharers) or delivery.commitments[self._owner] != own:
            raise ProtocolError("seed commitments are not of exactly the sharers (U2), or this owner's was changed")

    def confirm(self, survivors: Sequence[OwnerId]) -> SurvivorSignature:
        """M3: sign the survivor set U3, once.

        Raises
        ------
        ProtocolError
            If U3 is too small, not within U2, or leaves out this owner.
        StepMismatch
            If another set was signed before.
        """
        ordered = tuple(survivors)
        return self._once("confirm", _Asked(owners=ordered), lambda: self._confirm(ordered))

    def _confirm(self, survivors: tuple[OwnerId, ...]) -> SurvivorSignature:
        t = self._terms
        t.check_set(survivors, self._sharers, what="survivors (U3)")
        if self._owner not in survivors:
            raise ProtocolError(f"the survivors (U3) do not name {self._owner!r}, who sent its masked vector")
        label, message = keys.survivors_message(t.ctx, self._v1, self._sharers, survivors, self._subject)
        return SurvivorSignature(self._owner, t.purpose, self._identity.sign(label, message))

    def unmask(self, request: UnmaskRequest) -> UnmaskShares:
        """M4: return seed shares of the survivors and mask-key shares of the dropouts, never both of one.

        Raises
        ------
        StepMismatch
            If this owner signed another set, or answered another request before.
        SignatureInvalid
            If a signature is not over this U3 (and the U2 and keys seen here).
        ProtocolError
            If fewer than t members of U3 signed, or one is listed twice.
        """
        return self._once("unmask", _Asked(request=request), lambda: self._unmask(request))

    def _unmask(self, request: UnmaskRequest) -> UnmaskShares:
        t = self._terms
        self._check_purpose(request.purpose)
        if self._asked["confirm"] != _digest(_Asked(owners=request.survivors)):
            raise StepMismatch("the unmask request names another survivor set than the one signed here")
        signers = [signature.owner for signature in request.signatures]
        if len(set(signers)) != len(signers) or not set(signers) <= set(request.survivors):
            raise ProtocolError("consistency signatures are not from distinct survivors")
        if len(signers) < t.threshold:
            raise ProtocolError(f"{len(signers)} consistency signatures, at least {t.threshold} are needed")
        label, message = keys.survivors_message(t.ctx, self._v1, self._sharers, request.survivors, self._subject)
        for signature in request.signatures:
            self._check_purpose(signature.purpose)
            try:
                self._roster.key(signature.owner).verify(label, message, signature.signature)
            except SignatureInvalid as error:
                raise SignatureInvalid(f"consistency of {signature.owner!r}: {error.message}") from None
        survivors = set(request.survivors)
        return UnmaskShares(
            self._owner,
            t.purpose,
            {peer: share_to_bytes(self._shares[peer].seed) for peer in self._sharers if peer in survivors},
            {peer: share_to_bytes(self._shares[peer].key) for peer in self._sharers if peer not in survivors},
        )

    def close(self) -> None:
        """Overwrite the secrets and refuse every further step; may be called at any time, and again."""
        self._closed = True
        self._cipher.wipe()
        self._mask.wipe()
        self._seed[:] = bytes(len(self._seed))
        self._shares.clear()
        self._answers.clear()

    def _check_purpose(self, purpose: str) -> None:
        if purpose != self._terms.purpose:
            raise ProtocolError(f"a message for the sum {purpose!r}, {self._terms.purpose!r} expected")

    def _once(self, step: str, asked: _Asked, answer: Callable[[], T]) -> T:
        """Answer `asked` if it is this step's turn, repeat the answer if it was asked before, else refuse."""
        if self._closed:
            raise StepMismatch(f"{step}: this sum is closed, its secrets are gone")
        digest = _digest(asked)
        if step in self._asked:
            if self._asked[step] != digest:
                raise StepMismatch(f"{step} was asked before with something else, and is answered once")
            return cast("T", self._answers[step])
        done = len(self._asked)
        if done >= len(STEPS) or STEPS[done] != step:
            raise StepMismatch(f"{step} is out of order: {STEPS[done] if done < len(STEPS) else 'nothing'} is next")
        made = answer()
        self._asked[step], self._answers[step] = digest, made
        return made


def _digest(asked: _Asked) -> Digest:
    return sha256(wire.encode(asked))
