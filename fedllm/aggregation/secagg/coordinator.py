"""The coordinator's side: it forwards, adds, and opens the sum of the survivors.

Nothing here is secret before `unmasked`, and every step is a function of its inputs alone: replaying the
journalled inputs on a fresh instance gives the same state, which is how a crashed round resumes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fedllm import wire
from fedllm.aggregation.secagg import keys
from fedllm.aggregation.secagg.blame import Blame
from fedllm.aggregation.secagg.dealing import Dealing, check_message, with_holders
from fedllm.aggregation.secagg.masking import Mask, add_masks, add_packed, check_chunks, reduce_ring
from fedllm.aggregation.secagg.recover import recover
from fedllm.aggregation.secagg.shamir import share_from_bytes
from fedllm.aggregation.secagg.terms import SumTerms
from fedllm.errors import FedllmError, IntegrityError, ProtocolError, RoundAborted, StepMismatch
from fedllm.identity import Roster
from fedllm.ids import Digest, OwnerId, sha256
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
        Owners who broke the protocol, or may have, and how (the first reason counts). A wrong *share* is named where
        colluders could not have framed its holder; the owner who dealt it may still have dealt it wrong.
    proven : set[OwnerId]
        Those of them whose fault it is for certain.
    """

    def __init__(self, *, plan: RoundPlan, purpose: str, roster: Roster, ring_bits: int, entries: int) -> None:
        self._terms = SumTerms.of(plan, purpose, roster, ring_bits=ring_bits, entries=entries)
        self._roster = roster
        self._blame = Blame(self._terms.colluders)
        self._step = 0
        self._subject = b""
        self._v1 = b""
        self._bundles: dict[OwnerId, KeyBundle] = {}
        self._dealing = Dealing(self._terms, {})
        self._sum = np.zeros(entries, dtype=np.uint32)
        self._added: dict[OwnerId, Digest] = {}
        self._survivors: tuple[OwnerId, ...] = ()
        self._signers: tuple[OwnerId, ...] = ()

    def __repr__(self) -> str:
        return f"SecAggCoordinator({self._terms.purpose!r}, next step {(*STEPS, 'none')[self._step]})"

    @property
    def faults(self) -> dict[OwnerId, str]:
        """Owners at fault, and why."""
        return self._blame.faults

    @property
    def proven(self) -> set[OwnerId]:
        """Owners whose fault is proven; a further attempt goes without them."""
        return set(self._blame.proven)

    def advertised(self, bundles: Mapping[OwnerId, KeyBundle]) -> tuple[KeyBundle, ...]:
        """Return U1, the well-signed bundles sorted by owner.

        Raises
        ------
        RoundAborted
            If too few of them remain.
        """
        self._turn("advertised")
        t = self._terms
        good: dict[OwnerId, KeyBundle] = {}

        def check(owner: OwnerId, bundle: KeyBundle) -> None:
            _check_sender(owner, bundle.owner, bundle.purpose, t)
            keys.check_bundle(t.ctx, t.purpose, bundle, t.points, self._roster)
            keys.check_distinct([bundle])
            good[owner] = bundle

        self._each(bundles, check)
        for owner in keys.with_another_owners_key(good.values()):
            del good[owner]
            self._blame.doubt(owner, "it has a public key of another owner's: one of the two copied it")
        self._enough(len(good), "advertised keys", t.floor)
        self._bundles = good
        self._v1 = keys.transcript(t.ctx, tuple(good.values()))
        self._step += 1
        return tuple(good.values())

    def shared(self, messages: Mapping[OwnerId, ShareMessage]) -> dict[OwnerId, ShareDelivery]:
        """Return what each member of U2 is to receive: the sealed shares addressed to it.

        On a sparse graph an owner is left out whose shares are with fewer than t other members.

        Raises
        ------
        RoundAborted
            If too few owners shared.
        """
        self._turn("shared")
        t = self._terms
        good: dict[OwnerId, ShareMessage] = {}

        def check(owner: OwnerId, message: ShareMessage) -> None:
            _check_sender(owner, message.owner, message.purpose, t)
            _check_member(owner, self._bundles, "advertise")
            check_message(t, owner, message, self._bundles)
            good[owner] = message

        self._each(messages, check)
        sharing = with_holders(t, good)
        self._enough(len(sharing), "shared their keys", t.floor)
        self._dealing = Dealing(t, sharing)
        self._step += 1
        return {o: ShareDelivery(t.purpose, tuple(sharing), sealed) for o, sealed in self._dealing.inbox.items()}

    def add_masked(self, owner: OwnerId, head: MaskedVector, chunks: Sequence[bytes]) -> None:
        """Add one masked vector as it arrives, all of it or nothing; the same vector again changes nothing.

        Parameters
        ----------
        owner : OwnerId
            The sender, as its envelope proved.
        head : MaskedVector
        chunks : Sequence[bytes]
            The packed vector, in order.

        Raises
        ------
        ProtocolError, IntegrityError
            If it is not of this sum, from outside U2, of the wrong length, or not what its head names.
        StepMismatch
            If the owner complained, or its vector was added before and differs.
        """
        self._turn("masked")
        t, name = self._terms, sha256(wire.encode(head))

        def check() -> None:
            _check_sender(owner, head.owner, head.purpose, t)
            _check_member(owner, self._dealing.commitments, "share keys")
            if self._blame.complaint_of(owner):
                raise StepMismatch(f"{owner!r} complained in place of a masked vector, and takes no part in the sum")
            if (head.entries, head.entry_bytes) != (t.entries, t.entry_bytes):
                raise ProtocolError(
                    f"masked vector of {head.entries} entries of {head.entry_bytes} bytes, "
                    f"{t.entries} of {t.entry_bytes} expected"
                )
            if self._added.get(owner, name) != name:
                raise StepMismatch(f"{owner!r} sent two different masked vectors; the first one counts")
            check_chunks(head, chunks)

        self._charged(owner, check)
        if owner not in self._added:
            add_packed(self._sum, chunks, t.entry_bytes)
            self._added[owner] = name

    def complained(self, owner: OwnerId, complaint: Complaint) -> None:
        """Note an owner's complaint in place of its vector; the same complaint again changes nothing.

        A dealer whom more owners name than are assumed to collude is at fault. Otherwise it is the dealer or the one
        who complains, and both are named.

        Raises
        ------
        ProtocolError
            If it is not of this sum, from outside U2, or names somebody who dealt it nothing.
        StepMismatch
            If the owner's vector was added, or it complained of others before.
        """
        self._turn("masked")
        t = self._terms

        def check() -> None:
            _check_sender(owner, complaint.owner, complaint.purpose, t)
            _check_member(owner, self._dealing.commitments, "share keys")
            if owner in self._added or self._blame.complaint_of(owner) not in ((), complaint.dealers):
                raise StepMismatch(f"{owner!r} complains after it sent a masked vector, or of others than before")
            if not complaint.dealers or list(complaint.dealers) != sorted(set(complaint.dealers)):
                raise ProtocolError("a complaint's dealers are not sorted and unique, one at least")
            if not set(complaint.dealers) <= set(self._dealing.inbox[owner]):
                raise ProtocolError(f"{owner!r} complains of shares that were not dealt to it")

        self._charged(owner, check)
        self._blame.complain(owner, complaint.dealers)

    def masked(self) -> tuple[OwnerId, ...]:
        """Close the step, and return U3, the owners whose vectors are in the sum, sorted.

        Raises
        ------
        RoundAborted
            If too few vectors are in the sum.
        """
        self._turn("masked")
        self._enough(len(self._added), "sent masked vectors", self._terms.floor)
        self._survivors = tuple(sorted(self._added))
        self._step += 1
        return self._survivors

    def bind(self, subject: bytes) -> None:
        """Name what this sum is about; the owners bind the same, or their signatures do not verify."""
        self._subject = subject

    def confirmed(self, signatures: Mapping[OwnerId, SurvivorSignature]) -> dict[OwnerId, UnmaskRequest]:
        """Return the requests that open the sum: U3 with t valid signatures over it, for each owner to be asked.

        On the complete graph everybody who signed gets the same t signatures; on a sparse one those of t of the peers
        it picked, and who has fewer is not asked.

        Raises
        ------
        RoundAborted
            If too few signed for every secret to be opened.
        """
        self._turn("confirmed")
        t = self._terms
        label, message = keys.survivors_message(
            t.ctx, self._v1, tuple(self._dealing.commitments), self._survivors, self._subject
        )
        good: dict[OwnerId, SurvivorSignature] = {}
        survivors = set(self._survivors)

        def check(owner: OwnerId, signature: SurvivorSignature) -> None:
            _check_sender(owner, signature.owner, signature.purpose, t)
            _check_member(owner, survivors, "survive")
            self._roster.key(owner).verify(label, message, signature.signature)
            good[owner] = signature

        self._each(signatures, check)
        requests: dict[OwnerId, UnmaskRequest] = {}
        everybody = tuple(good.values())[: t.threshold]
        for owner in good:
            chosen = everybody
            if not t.complete:
                chosen = tuple(good[peer] for peer in sorted(self._dealing.picks(owner)) if peer in good)[: t.threshold]
            if len(chosen) == t.threshold:
                requests[owner] = UnmaskRequest(t.purpose, self._survivors, chosen)
        self._openable(requests if not t.complete else good, "confirmed the survivors")
        self._signers = tuple(requests)
        self._step += 1
        return requests

    def unmasked(self, shares: Mapping[OwnerId, UnmaskShares]) -> NDArray[np.uint32]:
        """Return the sum of the survivors' vectors in Z_2^ring_bits, shape ``(entries,)``.

        Every recovered seed is checked against its commitment and every recovered key against the advertised
        public key. Wrong shares are attributed in `faults`, and another t of the shares are tried.

        Raises
        ------
        RoundAborted
            If too few holders answered, or no t of the shares open what was committed to.
        """
        self._turn("unmasked")
        t = self._terms
        survivors = set(self._survivors)
        dropped = self._dealing.dropped(survivors)
        secrets: dict[OwnerId, dict[OwnerId, int]] = {owner: {} for owner in self._dealing.commitments}
        answered: list[OwnerId] = []

        def check(owner: OwnerId, message: UnmaskShares) -> None:
            _check_sender(owner, message.owner, message.purpose, t)
            _check_member(owner, self._signers, "confirm the survivors")
            held = self._dealing.held(owner)
            if set(message.seed_shares) != held & survivors or set(message.key_shares) != held - survivors:
                raise ProtocolError("shares are not seeds of exactly the survivors and keys of the dropouts")
            parsed = {p: share_from_bytes(s) for p, s in {**message.seed_shares, **message.key_shares}.items()}
            for peer, share in parsed.items():
                secrets[OwnerId(peer)][owner] = share
            answered.append(owner)

        self._each(shares, check)
        self._openable(answered, "answered unmask")
        masks: list[Mask] = []
        for owner in self._survivors:
            seed = self._open(owner, "seed", secrets[owner], self._seed_check(owner))
            masks.append((keys.self_mask_key(seed, t.ctx, self._v1, owner), -1))
        for owner in dropped:
            private = self._open(owner, "mask key", secrets[owner], self._key_check(owner))
            masks += self._pair_masks(owner, private)
        add_masks(self._sum, masks)
        self._step += 1
        return reduce_ring(self._sum, t.ring_bits)

    def _pair_masks(self, dropout: OwnerId, private: bytes) -> list[Mask]:
        """Return what takes a dropout's pairwise masks out of the sum: each survivor added its side of them."""
        t = self._terms
        pair, neighbours = keys.KeyPair(bytearray(private)), self._dealing.neighbours(dropout)
        return [
            (
                keys.pair_mask_key(pair, self._bundles[peer].mask_key, t.ctx, self._v1, dropout, peer),
                -1 if peer < dropout else 1,
            )
            for peer in self._survivors
            if peer in neighbours
        ]

    def _seed_check(self, owner: OwnerId) -> Callable[[bytes], bool]:
        return lambda seed: keys.commit_seed(seed) == self._dealing.commitments[owner]

    def _key_check(self, owner: OwnerId) -> Callable[[bytes], bool]:
        return lambda private: keys.public_of(private) == self._bundles[owner].mask_key

    def _open(self, dealer: OwnerId, what: str, shares: dict[OwnerId, int], accepted: Callable[[bytes], bool]) -> bytes:
        t = self._terms
        # Holders already known to be wrong go last, so that one liar is searched for once and not n times.
        suspects = self._blame.suspects
        holders = sorted(shares, key=lambda holder: (holder in suspects, holder))
        by_point = {t.points[holder]: shares[holder] for holder in holders}
        try:
            secret, wrong = recover(by_point, t.threshold, accepted, colluders=t.colluders)
        except IntegrityError as error:
            self._blame.doubt(dealer, f"no shares of its {what} open what it committed to")
            raise RoundAborted(f"the {what} of {dealer!r} cannot be opened: {error.message}") from None
        for point in wrong:
            self._blame.share(t.cohort[point - 1], dealer, what)
        return secret

    def _turn(self, step: str) -> None:
        if self._step >= len(STEPS) or STEPS[self._step] != step:
            raise StepMismatch(f"{step} is out of order: {(*STEPS, 'nothing')[self._step]} is next")

    def _charged(self, owner: OwnerId, check: Callable[[], None]) -> None:
        """Check a message, and note its sender as at fault before the error goes on."""
        try:
            check()
        except FedllmError as error:
            self._blame.wrong(owner, error)
            raise

    def _each(self, messages: Mapping[OwnerId, _M], check: Callable[[OwnerId, _M], None]) -> None:
        """Check messages in the order of names; note the owner whose message is wrong and leave it out."""
        for owner in sorted(messages):
            try:
                check(owner, messages[owner])
            except FedllmError as error:
                self._blame.wrong(owner, error)

    def _openable(self, owners: Iterable[OwnerId], what: str) -> None:
        """Raise `RoundAborted` unless t holders of each secret that the sum needs are among the owners."""
        t, found = self._terms, set(owners)
        if t.complete:
            self._enough(len(found), what, t.threshold)
            return
        for dealer in (*self._survivors, *self._dealing.dropped(set(self._survivors))):
            holders = len(self._dealing.holders(dealer) & found)
            if holders < t.threshold:
                raise RoundAborted(
                    f"{holders} holders of the shares of {dealer!r} {what}, at least {t.threshold} are needed",
                    hint="see which owners were late or at fault, then start the next round",
                )

    def _enough(self, found: int, what: str, needed: int) -> None:
        if found < needed:
            names = ", ".join(sorted(self.faults))
            raise RoundAborted(
                f"{found} of {len(self._terms.cohort)} owners {what}, at least {needed} are needed"
                + (f"; dropped as wrong: {names}" if names else ""),
                hint="see which owners were late or at fault, then start the next round",
            )


def _check_sender(sender: OwnerId, owner: OwnerId, purpose: str, terms: SumTerms) -> None:
    if owner != sender:
        raise ProtocolError(f"{sender!r} sent a message of {owner!r}")
    terms.check_purpose(purpose)


def _check_member(owner: OwnerId, members: Collection[OwnerId], what: str) -> None:
    if owner not in members:
        raise ProtocolError(f"{owner!r} did not {what}, and has no part in this step")
