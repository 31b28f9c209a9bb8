"""The owner's side: it assumes that the coordinator and everything between is hostile.

Every step answers one request. The same request again gets the same answer (a lost reply must not end the
round); any other is refused with `TwoViews`: a second survivor set, a second unmask request or a second
vector under the same masks would each let the coordinator subtract.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedllm import wire
from fedllm.aggregation.secagg import graph, keys
from fedllm.aggregation.secagg.masking import Mask, MaskedInput, digests_of, mask_and_pack
from fedllm.aggregation.secagg.shamir import share_to_bytes, split
from fedllm.aggregation.secagg.steps import Asked, Once, Steps
from fedllm.aggregation.secagg.terms import SumTerms
from fedllm.errors import (
    CohortRefused,
    KeysInvalid,
    ProtocolError,
    RosterMismatch,
    SetRefused,
    SharesUnopenable,
    SignatureInvalid,
    SignaturesMissing,
    TwoViews,
)
from fedllm.identity import Roster, SigningIdentity
from fedllm.ids import OwnerId, sha256
from fedllm.messages.plan import RoundPlan
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
from fedllm.rng import Rng


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
        Keys, seeds, nonces, picks and Shamir coefficients; `fedllm.rng.OsRng` outside tests.
    once : Once
        Called before the answer of advertise, confirm and unmask is returned; keeping it is the caller's.

    Raises
    ------
    PolicyRefused
        If the plan breaks a promise of secure aggregation (see `SumTerms.of`) or this owner is not in it.

    Notes
    -----
    Secrets are fresh for each instance and live in memory only: after a crash an owner is a dropout of this
    sum. `close` overwrites the bytearrays that hold them, and lets go of OpenSSL's key objects, which OpenSSL
    overwrites when it frees them. CPython may have left copies that nobody can reach: the immutable ``bytes`` handed
    to OpenSSL and to AES contexts, the integers of Shamir's polynomial. They go back to the allocator unwiped.
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
        once: Once,
    ) -> None:
        self._terms = SumTerms.of(plan, purpose, roster, ring_bits=ring_bits, entries=entries)
        if owner not in self._terms.points:
            raise CohortRefused(f"the plan's cohort does not name {owner!r}")
        if roster.key(owner) != identity.public:
            raise RosterMismatch(f"the identity held here is not the one pinned for {owner!r}")
        self._owner, self._identity, self._roster, self._rng = owner, identity, roster, rng
        self._record = once
        self._cipher = keys.KeyPair.generate(rng)
        self._mask = keys.KeyPair.generate(rng)
        self._seed = bytearray(rng.token(keys.KEY_BYTES))
        self._v1 = b""
        self._peers: dict[OwnerId, KeyBundle] = {}
        self._picked: tuple[OwnerId, ...] = ()
        self._picks: tuple[OwnerId, ...] = ()
        self._opening: dict[OwnerId, bytearray] = {}
        self._sharers: tuple[OwnerId, ...] = ()
        self._shares: dict[OwnerId, keys.SharePair] = {}
        self._steps = Steps()
        self._bundle: KeyBundle | None = None
        self._subject = b""

    def bind(self, subject: bytes) -> None:
        """Name what this sum is about, once, before `confirm`: it opens only if t owners were shown the same.

        Raises
        ------
        TwoViews
            If another subject was bound, or survivors were confirmed already.
        """
        if self._subject not in (b"", subject) or ("confirm" in self._steps.asked and self._subject != subject):
            raise TwoViews("this sum is about something else already")
        self._subject = subject

    def __repr__(self) -> str:
        done = len(self._steps.asked)
        return f"SecAggOwner({self._owner!r}, {self._terms.purpose!r}, {done} steps done, secrets redacted)"

    def advertise(self) -> KeyBundle:
        """M0: return this owner's fresh public keys, signed."""

        def answer() -> KeyBundle:
            t = self._terms
            bundle = keys.sign_bundle(
                t.ctx, t.purpose, self._owner, self._cipher.public, self._mask.public, self._identity
            )
            self._record(t.ctx, "advertise", sha256(wire.encode(bundle)))
            self._bundle = bundle
            return bundle

        return self._steps.answer("advertise", Asked().digest, answer)

    def share_keys(self, bundles: Sequence[KeyBundle]) -> ShareMessage:
        """M1: check the keys (U1) and return sealed shares of this owner's two secrets.

        On the complete graph they are dealt to all of U1, and one is kept. On a sparse one they are dealt to those of
        U1 among k peers picked from the whole cohort: whom a coordinator leaves out of U1 counts as lost, and makes
        nobody else more likely. Signatures are verified of those who get shares; of others when they turn out to have
        dealt some here.

        Raises
        ------
        SignatureInvalid
            If a pinned identity did not sign its bundle for this very plan and purpose.
        KeysInvalid
            If a bundle or key is listed twice, is from outside the cohort or of another sum, a key has another size, or
            this owner's own was changed.
        LowOrderKey
            If a key is a point of low order.
        SetRefused
            If U1, or what it has of the picks, is too small.
        TwoViews
        """
        ordered = tuple(sorted(bundles, key=lambda b: b.owner))
        v1 = keys.transcript(self._terms.ctx, ordered)
        return self._steps.answer("share_keys", Asked(transcript=v1).digest, lambda: self._share_keys(ordered, v1))

    def _share_keys(self, bundles: tuple[KeyBundle, ...], v1: bytes) -> ShareMessage:
        t = self._terms
        keys.check_distinct(bundles)
        for bundle in bundles:
            keys.check_form(t.purpose, bundle, t.points)
        t.check_set([bundle.owner for bundle in bundles], t.points, what="advertised keys (U1)")
        peers = {bundle.owner: bundle for bundle in bundles}
        if peers.get(self._owner) != self._bundle:
            raise KeysInvalid(f"the keys listed for {self._owner!r} are not the ones it advertised")
        picks = tuple(peer for peer in self._pick() if peer in peers)
        t.check_picks(picks, peers, what="advertised keys (U1)")
        for peer in picks:
            keys.check_signature(t.ctx, peers[peer], self._roster)
        holders = sorted((*picks, self._owner)) if t.complete else picks
        points = [t.points[holder] for holder in holders]
        seed_shares = split(bytes(self._seed), t.threshold, points, self._rng)
        key_shares = split(bytes(self._mask.private), t.threshold, points, self._rng)
        ciphertexts: dict[str, bytes] = {}
        self._peers, self._v1 = peers, v1
        for holder in holders:
            at = t.points[holder]
            pair = keys.SharePair(bytearray(share_to_bytes(seed_shares[at])), bytearray(share_to_bytes(key_shares[at])))
            if holder == self._owner:
                self._shares[holder] = pair
                continue
            secret = self._agree(holder)
            key = keys.sealing_key(secret, t.ctx, v1, self._owner, holder)
            ciphertexts[holder] = keys.seal_shares(pair, key, t.ctx, v1, self._owner, holder, self._rng)
            pair.wipe()
        self._picks = picks
        return ShareMessage(self._owner, t.purpose, keys.commit_seed(self._seed), ciphertexts)

    def _pick(self) -> tuple[OwnerId, ...]:
        """Return whom this owner deals to, drawn once: a list that is refused does not buy another draw."""
        if not self._picked:
            others = [owner for owner in self._terms.cohort if owner != self._owner]
            self._picked = graph.pick(others, self._terms.neighbours, self._rng)
        return self._picked

    def _agree(self, peer: OwnerId) -> bytes:
        """Return the secret shared with a peer; keep the key that opens what the peer seals for this owner."""
        secret = self._cipher.exchange(self._peers[peer].cipher_key)
        key = keys.sealing_key(secret, self._terms.ctx, self._v1, peer, self._owner)
        self._opening[peer] = bytearray(key)
        return secret

    def mask(self, delivery: ShareDelivery, values: NDArray[np.uint32]) -> MaskedInput:
        """M2: open the peers' shares, then return the values under the masks of all neighbours in U2.

        A neighbour is whom this owner picked, or who picked it. The same request again masks again, to the same bytes.

        Parameters
        ----------
        delivery : ShareDelivery
        values : NDArray[uint32]
            Shape ``(entries,)``, each below ``2**ring_bits``.

        Raises
        ------
        ProtocolError
            If the values or the delivery are malformed, or U2 is too small (`SetRefused`).
        SharesUnopenable
            If shares do not open; it names all their dealers. The step stays open.
        SignatureInvalid
            If the keys of somebody who dealt shares here are not signed by its pinned identity.
        TwoViews
            If other values or another delivery were masked before: two vectors under one mask subtract.
        """
        t = self._terms
        if values.dtype != np.uint32 or values.shape != (t.entries,) or int(values.max()) >> t.ring_bits:
            raise ProtocolError(
                f"values of {values.dtype} and shape {values.shape} to mask: "
                f"({t.entries},) uint32 below 2^{t.ring_bits} needed"
            )
        made: list[MaskedInput] = []

        def answer() -> MaskedVector:
            self._take(delivery)
            made.append(self._masked(delivery, values))
            return made[0].head

        head = self._steps.answer("mask", Asked(delivery=delivery).digest, answer)
        again = made[0] if made else self._masked(delivery, values)
        if again.head != head:
            raise TwoViews("mask was asked before with other values, and is answered once")
        return again

    def _masked(self, delivery: ShareDelivery, values: NDArray[np.uint32]) -> MaskedInput:
        t = self._terms
        sharers = set(delivery.sharers)
        neighbours = sorted((set(self._picks) & sharers) | {OwnerId(dealer) for dealer in delivery.ciphertexts})
        masks: list[Mask] = [(keys.self_mask_key(self._seed, t.ctx, self._v1, self._owner), 1)]
        for peer in neighbours:
            key = keys.pair_mask_key(self._mask, self._peers[peer].mask_key, t.ctx, self._v1, self._owner, peer)
            masks.append((key, 1 if self._owner < peer else -1))
        chunks = mask_and_pack(values, masks, t.entry_bytes)
        return MaskedInput(MaskedVector(self._owner, t.purpose, t.entries, t.entry_bytes, digests_of(chunks)), chunks)

    def _take(self, delivery: ShareDelivery) -> None:
        """Check the delivery, and open and keep all shares in it, or none."""
        t = self._terms
        self._check_delivery(delivery)
        opened: dict[OwnerId, keys.SharePair] = {}
        failed: list[OwnerId] = []
        for dealer in map(OwnerId, sorted(delivery.ciphertexts)):
            if dealer not in self._opening:
                keys.check_signature(t.ctx, self._peers[dealer], self._roster)
                self._agree(dealer)
            sealed, key = delivery.ciphertexts[dealer], self._opening[dealer]
            try:
                opened[dealer] = keys.open_shares(sealed, key, t.ctx, self._v1, dealer, self._owner)
            except SharesUnopenable:
                failed.append(dealer)
        if failed:
            for pair in opened.values():
                pair.wipe()
            raise keys.unopenable(failed, self._owner)
        self._shares.update(opened)
        self._sharers = delivery.sharers

    def _check_delivery(self, delivery: ShareDelivery) -> None:
        t = self._terms
        t.check_purpose(delivery.purpose)
        t.check_set(delivery.sharers, self._peers, what="sharers (U2)")
        if self._owner not in delivery.sharers:
            raise SetRefused(f"the sharers (U2) do not name {self._owner!r}, who shared")
        dealers, others = set(delivery.ciphertexts), set(delivery.sharers) - {self._owner}
        if not dealers <= others or (t.complete and dealers != others):
            raise SetRefused("sealed shares are not from exactly the other sharers (U2)")
        t.check_picks(self._picks, delivery.sharers, what="sharers (U2)")

    def complaint(self, dealers: Sequence[str]) -> Complaint:
        """M2 instead of a vector: name the dealers of `SharesUnopenable` to the coordinator."""
        return Complaint(self._owner, self._terms.purpose, tuple(OwnerId(dealer) for dealer in sorted(set(dealers))))

    def confirm(self, survivors: Sequence[OwnerId]) -> SurvivorSignature:
        """M3: sign the survivor set U3, once.

        Raises
        ------
        SetRefused
            If U3 is too small, not within U2, leaves out this owner, or has too few of its neighbours.
        TwoViews
            If another set was signed before.
        """
        ordered = tuple(survivors)
        asked = Asked(owners=ordered, subject=self._subject).digest

        def answer() -> SurvivorSignature:
            t = self._terms
            t.check_set(ordered, self._sharers, what="survivors (U3)")
            if self._owner not in ordered:
                raise SetRefused(f"the survivors (U3) do not name {self._owner!r}, who sent its masked vector")
            t.check_picks(self._picks, ordered, what="survivors (U3)")
            label, message = keys.survivors_message(t.ctx, self._v1, self._sharers, ordered, self._subject)
            signature = self._identity.sign(label, message)
            self._record(t.ctx, "confirm", asked)
            return SurvivorSignature(self._owner, t.purpose, signature)

        return self._steps.answer("confirm", asked, answer)

    def unmask(self, request: UnmaskRequest) -> UnmaskShares:
        """M4: return seed shares of the survivors and mask-key shares of the dropouts, never both of one.

        Raises
        ------
        TwoViews
            If this owner signed another set, or answered another request before.
        SignatureInvalid
            If a signature is not over this U3 (and the U2 and keys seen here).
        SignaturesMissing
            If fewer than t members of U3 signed (on a sparse graph: t of this owner's neighbours), or one is listed
            twice.
        """
        asked = Asked(request=request).digest

        def answer() -> UnmaskShares:
            self._check_request(request)
            survivors = set(request.survivors)
            shares = UnmaskShares(
                self._owner,
                self._terms.purpose,
                {peer: bytes(pair.seed) for peer, pair in sorted(self._shares.items()) if peer in survivors},
                {peer: bytes(pair.key) for peer, pair in sorted(self._shares.items()) if peer not in survivors},
            )
            self._record(self._terms.ctx, "unmask", asked)
            return shares

        return self._steps.answer("unmask", asked, answer)

    def _check_request(self, request: UnmaskRequest) -> None:
        t = self._terms
        t.check_purpose(request.purpose)
        if self._steps.asked["confirm"] != Asked(owners=request.survivors, subject=self._subject).digest:
            raise TwoViews("the unmask request names another survivor set than the one signed here")
        signers = {signature.owner for signature in request.signatures}
        if len(signers) != len(request.signatures) or not signers <= set(request.survivors):
            raise SignaturesMissing("consistency signatures are not from distinct survivors")
        counted = signers if t.complete else signers & set(self._picks)
        if len(counted) < t.threshold:
            whose = "" if t.complete else " of this owner's neighbours"
            raise SignaturesMissing(f"{len(counted)} consistency signatures{whose}, at least {t.threshold} are needed")
        label, message = keys.survivors_message(t.ctx, self._v1, self._sharers, request.survivors, self._subject)
        for signature in request.signatures:
            t.check_purpose(signature.purpose)
            try:
                self._roster.key(signature.owner).verify(label, message, signature.signature)
            except SignatureInvalid as error:
                raise SignatureInvalid(f"consistency of {signature.owner!r}: {error.message}") from None

    def close(self) -> None:
        """Overwrite the secrets, let go of all answers, and refuse every further step; may be called at any time."""
        self._steps.close()
        self._cipher.wipe()
        self._mask.wipe()
        self._seed[:] = bytes(len(self._seed))
        for pair in self._shares.values():
            pair.wipe()
        for key in self._opening.values():
            key[:] = bytes(len(key))
        self._shares.clear()
        self._opening.clear()
