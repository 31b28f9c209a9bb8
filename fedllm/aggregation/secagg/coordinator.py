"""The coordinator's side: it forwards, adds, and opens the sum of the survivors.

Nothing here is secret before `unmasked`, and every step is a function of its inputs alone: replaying the
journalled inputs on a fresh instance gives the same state, which is how a crashed round resumes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fedllm.aggregation.secagg import keys
from fedllm.aggregation.secagg.masking import add_mask, add_packed, check_packed, reduce_ring
from fedllm.aggregation.secagg.recover import recover
from fedllm.aggregation.secagg.shamir import share_from_bytes
from fedllm.aggregation.secagg.terms import SumTerms
from fedllm.errors import FedllmError, IntegrityError, ProtocolError, RoundAborted, StepMismatch
from fedllm.identity import Roster
from fedllm.ids import OwnerId
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

_M = TypeVar("_M")
STEPS = ("advertised", "shared", "masked", "confirmed", "unmasked")


class SecAggCoordinator:
    """The coordinator's part in one masked sum.

    Parameters
    ----------
    plan : RoundPlan
    purpose : str
        ``update`` or ``evaluation``.
    roster : Roster
    ring_bits, entries : int
        The ring and length of this sum.

    Attributes
    ----------
    faults : dict[OwnerId, str]
        Owners whose message was dropped as wrong, and why (the first reason counts). A wrong *share* is
        charged to its holder where fewer than a third of the cohort could not have framed it; the owner who
        dealt it may still have dealt it wrong.
    """

    def __init__(self, *, plan: RoundPlan, purpose: str, roster: Roster, ring_bits: int, entries: int) -> None:
        self._terms = SumTerms.of(plan, purpose, roster, ring_bits=ring_bits, entries=entries)
        self._roster = roster
        self.faults: dict[OwnerId, str] = {}
        self._step = 0
        self._subject = b""
        self._v1 = b""
        self._bundles: dict[OwnerId, KeyBundle] = {}
        self._commitments: dict[OwnerId, bytes] = {}
        self._sum = np.zeros(entries, dtype=np.uint32)
        self._added: dict[OwnerId, bytes] = {}
        self._survivors: tuple[OwnerId, ...] = ()
        self._signers: tuple[OwnerId, ...] = ()

    def __repr__(self) -> str:
        return f"SecAggCoordinator({self._terms.purpose!r}, next step {(*STEPS, 'none')[self._step]})"

    def advertised(self, bundles: Mapping[OwnerId, KeyBundle]) -> tuple[KeyBundle, ...]:
        """Return U1, the well-signed bundles sorted by owner.

        Raises
        ------
        RoundAborted
            If fewer than the threshold (or the plan's least number of survivors) remain.
        """
        self._turn("advertised")
        t = self._terms
        good: dict[OwnerId, KeyBundle] = {}

        def check(owner: OwnerId, bundle: KeyBundle) -> None:
            _check_sender(owner, bundle.owner, bundle.purpose, t.purpose)
            keys.check_bundle(t.ctx, t.purpose, bundle, t.cohort, self._roster)
            keys.check_distinct([*good.values(), bundle])
            good[owner] = bundle

        self._each(bundles, check)
        self._enough(len(good), "advertised keys", t.floor)
        self._bundles = good
        self._v1 = keys.transcript(t.ctx, tuple(good.values()))
        self._step += 1
        return tuple(good.values())

    def shared(self, messages: Mapping[OwnerId, ShareMessage]) -> dict[OwnerId, ShareDelivery]:
        """Return what each member of U2 is to receive: the sealed shares addressed to it.

        Raises
        ------
        RoundAborted
            If too few owners shared.
        """
        self._turn("shared")
        t = self._terms
        good: dict[OwnerId, ShareMessage] = {}

        def check(owner: OwnerId, message: ShareMessage) -> None:
            _check_sender(owner, message.owner, message.purpose, t.purpose)
            _check_member(owner, self._bundles, "advertise")
            if set(message.ciphertexts) != set(self._bundles) - {owner}:
                raise ProtocolError("sealed shares are not for exactly the other advertisers (U1)")
            if {len(sealed) for sealed in message.ciphertexts.values()} != {keys.SEALED_BYTES}:
                raise ProtocolError(f"sealed shares are not all of {keys.SEALED_BYTES} bytes")
            if len(message.seed_commitment) != keys.KEY_BYTES:
                raise ProtocolError(f"seed commitment is not of {keys.KEY_BYTES} bytes")
            good[owner] = message

        self._each(messages, check)
        self._enough(len(good), "shared their keys", t.floor)
        sharers = tuple(good)
        self._commitments = {owner: message.seed_commitment for owner, message in good.items()}
        commitments: dict[str, bytes] = {owner: message.seed_commitment for owner, message in good.items()}
        self._step += 1
        return {
            owner: ShareDelivery(
                t.purpose, sharers, dict(commitments),
                {peer: good[peer].ciphertexts[owner] for peer in sharers if peer != owner},
            )
            for owner in sharers
        }  # fmt: skip

    def add_masked(self, owner: OwnerId, vector: MaskedVector) -> None:
        """Add one masked vector as it arrives; the same vector again changes nothing.

        Raises
        ------
        ProtocolError
            If it is not of this sum, from outside U2, or of the wrong length; nothing is added then.
        StepMismatch
            If the owner's vector was added before and differs.
        """
        self._turn("masked")
        t = self._terms
        _check_sender(owner, vector.owner, vector.purpose, t.purpose)
        _check_member(owner, self._commitments, "share keys")
        if (vector.entries, vector.entry_bytes) != (t.entries, t.entry_bytes):
            raise ProtocolError(
                f"masked vector of {vector.entries} entries of {vector.entry_bytes} bytes, "
                f"{t.entries} of {t.entry_bytes} expected"
            )
        check_packed(vector.chunks, t.entries, t.entry_bytes)
        digest = _chunks_digest(vector)
        if owner in self._added:
            if self._added[owner] != digest:
                raise StepMismatch(f"{owner!r} sent two different masked vectors; the first one counts")
            return
        add_packed(self._sum, vector.chunks, t.entry_bytes)
        self._added[owner] = digest

    def masked(self, vectors: Mapping[OwnerId, MaskedVector]) -> tuple[OwnerId, ...]:
        """Add the vectors not added yet, close the step, and return U3, sorted.

        Raises
        ------
        RoundAborted
            If too few vectors are in the sum.
        """
        self._turn("masked")
        self._each(vectors, self.add_masked)
        self._enough(len(self._added), "sent masked vectors", self._terms.floor)
        self._survivors = tuple(sorted(self._added))
        self._step += 1
        return self._survivors

    def bind(self, subject: bytes) -> None:
        """Name what this sum is about; the owners bind the same, or their signatures do not verify."""
        self._subject = subject

    def confirmed(self, signatures: Mapping[OwnerId, SurvivorSignature]) -> UnmaskRequest:
        """Return the request that opens the sum: U3 with at least t valid signatures over it.

        Raises
        ------
        RoundAborted
            If fewer than t owners signed.
        """
        self._turn("confirmed")
        t = self._terms
        label, message = keys.survivors_message(
            t.ctx, self._v1, tuple(self._commitments), self._survivors, self._subject
        )
        good: dict[OwnerId, SurvivorSignature] = {}

        def check(owner: OwnerId, signature: SurvivorSignature) -> None:
            _check_sender(owner, signature.owner, signature.purpose, t.purpose)
            _check_member(owner, self._survivors, "survive")
            self._roster.key(owner).verify(label, message, signature.signature)
            good[owner] = signature

        self._each(signatures, check)
        self._enough(len(good), "confirmed the survivors", t.threshold)
        self._signers = tuple(good)
        self._step += 1
        return UnmaskRequest(t.purpose, self._survivors, tuple(good.values()))

    def unmasked(self, shares: Mapping[OwnerId, UnmaskShares]) -> NDArray[np.uint32]:
        """Return the sum of the survivors' vectors in Z_2^ring_bits, shape ``(entries,)``.

        Every recovered seed is checked against its commitment and every recovered key against the advertised
        public key. Wrong shares are attributed in `faults`, and another t of the shares are tried.

        Raises
        ------
        RoundAborted
            If fewer than t owners answered, or no t of the shares open what was committed to.
        """
        self._turn("unmasked")
        t = self._terms
        dropped = [owner for owner in self._commitments if owner not in self._survivors]
        seeds: dict[OwnerId, dict[OwnerId, int]] = {owner: {} for owner in self._survivors}
        private: dict[OwnerId, dict[OwnerId, int]] = {owner: {} for owner in dropped}
        answered: list[OwnerId] = []

        def check(owner: OwnerId, message: UnmaskShares) -> None:
            _check_sender(owner, message.owner, message.purpose, t.purpose)
            _check_member(owner, self._signers, "confirm the survivors")
            if set(message.seed_shares) != set(seeds) or set(message.key_shares) != set(private):
                raise ProtocolError("shares are not seeds of exactly the survivors and keys of the dropouts")
            seed = {peer: share_from_bytes(message.seed_shares[peer]) for peer in seeds}
            key = {peer: share_from_bytes(message.key_shares[peer]) for peer in private}
            for peer, share in seed.items():
                seeds[peer][owner] = share
            for peer, share in key.items():
                private[peer][owner] = share
            answered.append(owner)

        self._each(shares, check)
        self._enough(len(answered), "answered unmask", t.threshold)
        total = self._sum.copy()
        for owner in self._survivors:
            seed = self._open(owner, "seed", seeds[owner], self._seed_check(owner))
            add_mask(total, keys.self_mask_key(seed, t.ctx, self._v1, owner), sign=-1)
        for owner in dropped:
            self._cancel(owner, self._open(owner, "mask key", private[owner], self._key_check(owner)), total)
        self._step += 1
        return reduce_ring(total, t.ring_bits)

    def _cancel(self, dropout: OwnerId, private: bytes, total: NDArray[np.uint32]) -> None:
        """Take a dropout's pairwise masks out of the sum: each survivor added its side of them."""
        t = self._terms
        pair = keys.KeyPair(self._bundles[dropout].mask_key, bytearray(private))
        for survivor in self._survivors:
            key = keys.pair_mask_key(pair, self._bundles[survivor].mask_key, t.ctx, self._v1, dropout, survivor)
            add_mask(total, key, sign=-1 if survivor < dropout else 1)

    def _seed_check(self, owner: OwnerId) -> Callable[[bytes], bool]:
        return lambda seed: keys.commit_seed(seed) == self._commitments[owner]

    def _key_check(self, owner: OwnerId) -> Callable[[bytes], bool]:
        return lambda private: keys.public_of(private) == self._bundles[owner].mask_key

    def _open(self, dealer: OwnerId, what: str, shares: dict[OwnerId, int], accepted: Callable[[bytes], bool]) -> bytes:
        t = self._terms
        # Holders already known to be wrong go last, so that one liar is searched for once and not n times.
        holders = sorted(shares, key=lambda holder: (holder in self.faults, holder))
        by_point = {t.point(holder): shares[holder] for holder in holders}
        try:
            secret, wrong = recover(by_point, t.threshold, accepted, colluders=t.colluders)
        except IntegrityError as error:
            raise RoundAborted(f"the {what} of {dealer!r} cannot be opened: {error.message}") from None
        for point in wrong:
            self.faults.setdefault(t.cohort[point - 1], f"its share of the {what} of {dealer!r} is wrong")
        return secret

    def _turn(self, step: str) -> None:
        if self._step >= len(STEPS) or STEPS[self._step] != step:
            raise StepMismatch(f"{step} is out of order: {(*STEPS, 'nothing')[self._step]} is next")

    def _each(self, messages: Mapping[OwnerId, _M], check: Callable[[OwnerId, _M], None]) -> None:
        """Check messages in the order of names; note the owner whose message is wrong and leave it out."""
        for owner in sorted(messages):
            try:
                check(owner, messages[owner])
            except FedllmError as error:
                self.faults.setdefault(owner, f"{error.code}: {error.message}")

    def _enough(self, found: int, what: str, needed: int) -> None:
        if found < needed:
            faults = f"; dropped as wrong: {', '.join(sorted(self.faults))}" if self.faults else ""
            raise RoundAborted(
                f"{found} of {len(self._terms.cohort)} owners {what}, at least {needed} are needed{faults}",
                hint="see which owners were late or at fault, then start the next round",
            )


def _check_sender(sender: OwnerId, owner: OwnerId, purpose: str, expected: str) -> None:
    if owner != sender:
        raise ProtocolError(f"{sender!r} sent a message of {owner!r}")
    if purpose != expected:
        raise ProtocolError(f"a message for the sum {purpose!r}, {expected!r} expected")


def _check_member(owner: OwnerId, members: Collection[OwnerId], what: str) -> None:
    if owner not in members:
        raise ProtocolError(f"{owner!r} did not {what}, and has no part in this step")


def _chunks_digest(vector: MaskedVector) -> bytes:
    digest = hashlib.sha256()
    for chunk in vector.chunks:
        digest.update(chunk)
    return digest.digest()
