"""Who broke the protocol: proven, or one of two."""

from __future__ import annotations

from collections.abc import Sequence

from fedllm.errors import DigestMismatch, FedllmError
from fedllm.ids import OwnerId


class Blame:
    """Faults of one sum, as the coordinator can tell them.

    A message that is wrong in itself is its sender's. A share that is off its polynomial is its holder's or its
    dealer's, and sealed shares that do not open are the dealer's or the complainer's: either is proven only when
    more owners stand against it than are assumed to collude.

    Parameters
    ----------
    colluders : int
        The most that are assumed to.

    Attributes
    ----------
    proven : set[OwnerId]
        Owners whose fault it is for certain, under that assumption.
    """

    def __init__(self, colluders: int) -> None:
        self._colluders = colluders
        self._wrong: dict[OwnerId, str] = {}
        self._shares: dict[OwnerId, dict[OwnerId, str]] = {}
        self._complaints: dict[OwnerId, tuple[OwnerId, ...]] = {}
        self.proven: set[OwnerId] = set()

    @property
    def faults(self) -> dict[OwnerId, str]:
        """Why each owner at fault is; the first reason counts, and certainty before doubt."""
        found = dict(self._wrong)
        for holder, dealers in self._shares.items():
            for dealer, what in dealers.items():
                found.setdefault(holder, f"its share of the {what} of {dealer!r} is wrong")
        accused = self._accused()
        for dealer, complainers in accused.items():
            if dealer in self.proven:
                found.setdefault(dealer, f"{len(complainers)} owners complain that its sealed shares do not open")
        for dealer, complainers in accused.items():
            if dealer not in self.proven:
                for complainer in complainers:
                    doubt = f"the sealed shares of {dealer!r} for {complainer!r} do not open: one of the two is wrong"
                    found.setdefault(dealer, doubt)
                    found.setdefault(complainer, doubt)
        return found

    @property
    def suspects(self) -> set[OwnerId]:
        """Owners whose messages or shares were found wrong."""
        return self._wrong.keys() | self._shares.keys()

    def wrong(self, owner: OwnerId, error: FedllmError) -> None:
        """Note a message that nobody who follows the protocol sends.

        Chunks that are not what a signed head names may have been changed by whoever carried them: that proves nothing.
        """
        self._wrong.setdefault(owner, f"{error.code}: {error.message}")
        if not isinstance(error, DigestMismatch):
            self.proven.add(owner)

    def share(self, holder: OwnerId, dealer: OwnerId, what: str) -> None:
        """Note a share off its dealer's polynomial."""
        dealers = self._shares.setdefault(holder, {})
        dealers.setdefault(dealer, what)
        if len(dealers) > self._colluders:
            self.proven.add(holder)

    def doubt(self, owner: OwnerId, why: str) -> None:
        """Note what may be this owner's fault and may be others': it proves nothing."""
        self._wrong.setdefault(owner, why)

    def complain(self, owner: OwnerId, dealers: Sequence[OwnerId]) -> None:
        """Note that shares of these dealers did not open at `owner`."""
        self._complaints[owner] = tuple(dealers)
        self.proven |= {dealer for dealer, complainers in self._accused().items() if len(complainers) > self._colluders}

    def complaint_of(self, owner: OwnerId) -> tuple[OwnerId, ...]:
        """Return whom an owner complained of; empty if it did not."""
        return self._complaints.get(owner, ())

    def _accused(self) -> dict[OwnerId, list[OwnerId]]:
        accused: dict[OwnerId, list[OwnerId]] = {}
        for complainer in sorted(self._complaints):
            for dealer in self._complaints[complainer]:
                accused.setdefault(dealer, []).append(complainer)
        return accused
