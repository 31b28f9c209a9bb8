"""Who dealt shares to whom among the sharers (U2), as the coordinator routes them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from fedllm.aggregation.secagg import keys
from fedllm.aggregation.secagg.terms import SumTerms
from fedllm.errors import ProtocolError
from fedllm.ids import OwnerId
from fedllm.messages.secagg import ShareMessage


class Dealing:
    """The graph of one sum, and the sealed shares on their way.

    Parameters
    ----------
    terms : SumTerms
    messages : Mapping[OwnerId, ShareMessage]
        Of U2, checked.

    Attributes
    ----------
    commitments : dict[OwnerId, bytes]
        To the self-mask seeds; its keys are U2.
    inbox : dict[OwnerId, dict[str, bytes]]
        Receiver to dealer to sealed shares.
    """

    def __init__(self, terms: SumTerms, messages: Mapping[OwnerId, ShareMessage]) -> None:
        self._own = terms.complete
        self._dealt: dict[OwnerId, frozenset[OwnerId]] = {}
        self.commitments = {owner: message.seed_commitment for owner, message in messages.items()}
        self.inbox: dict[OwnerId, dict[str, bytes]] = {owner: {} for owner in messages}
        for dealer, message in messages.items():
            receivers = [OwnerId(peer) for peer in message.ciphertexts if peer in self.inbox]
            for peer in receivers:
                self.inbox[peer][dealer] = message.ciphertexts[peer]
            self._dealt[dealer] = frozenset(receivers)

    def picks(self, dealer: OwnerId) -> frozenset[OwnerId]:
        """Return the other members of U2 to whom an owner dealt."""
        return self._dealt[dealer]

    def holders(self, dealer: OwnerId) -> frozenset[OwnerId]:
        """Return who holds a share of an owner's secrets: its picks, and itself on the complete graph."""
        return self._dealt[dealer] | {dealer} if self._own else self._dealt[dealer]

    def held(self, holder: OwnerId) -> frozenset[OwnerId]:
        """Return of whose secrets an owner holds a share."""
        dealers = frozenset(map(OwnerId, self.inbox[holder]))
        return dealers | {holder} if self._own else dealers

    def neighbours(self, owner: OwnerId) -> frozenset[OwnerId]:
        """Return with whom an owner shares a mask: whom it picked, and who picked it."""
        return self._dealt[owner] | {OwnerId(dealer) for dealer in self.inbox[owner]}

    def dropped(self, survivors: Collection[OwnerId]) -> list[OwnerId]:
        """Return who shared, did not survive, and has a neighbour who did: their masks are in the sum."""
        return [o for o in self.commitments if o not in survivors and not self.neighbours(o).isdisjoint(survivors)]


def check_message(terms: SumTerms, owner: OwnerId, message: ShareMessage, listed: Collection[OwnerId]) -> None:
    """Return if sealed shares are for whom they must be among those `listed` (U1), and of the right sizes.

    Raises
    ------
    ProtocolError
    """
    receivers, others = set(message.ciphertexts), set(listed) - {owner}
    if terms.complete and receivers != others:
        raise ProtocolError("sealed shares are not for exactly the other advertisers (U1)")
    if not terms.complete and not (receivers <= others and terms.threshold <= len(receivers) <= terms.neighbours):
        raise ProtocolError(f"sealed shares are not for {terms.threshold} to {terms.neighbours} other advertisers (U1)")
    if {len(sealed) for sealed in message.ciphertexts.values()} != {keys.SEALED_BYTES}:
        raise ProtocolError(f"sealed shares are not all of {keys.SEALED_BYTES} bytes")
    if len(message.seed_commitment) != keys.KEY_BYTES:
        raise ProtocolError(f"seed commitment is not of {keys.KEY_BYTES} bytes")


def with_holders(terms: SumTerms, messages: Mapping[OwnerId, ShareMessage]) -> dict[OwnerId, ShareMessage]:
    """Return the messages of owners who have t holders among those returned; on the complete graph, all of them."""
    good = dict(messages)
    while not terms.complete:
        alone = [o for o, message in good.items() if sum(p in good for p in message.ciphertexts) < terms.threshold]
        if not alone:
            break
        for owner in alone:
            del good[owner]
    return good
