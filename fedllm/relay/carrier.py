"""The port through which the coordinator reaches owners: opaque bytes out, opaque bytes back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Carrier(Protocol):
    """A way for sealed envelopes to reach owners' daemons and for their replies to come back.

    A carrier is not trusted: it may lose, delay, repeat, reorder or change what it carries. Requests are
    idempotent, so a carrier may deliver one more than once; it must not invent replies on purpose.

    Nodes are named by the carrier (a Flower node id, a socket's name); which owner answers at a node is
    learned from the signed reply to ``Hello``, never from the name.
    """

    @property
    def patience_s(self) -> float:
        """Seconds of silence after which a node is taken for dead: how long it may need to reconnect."""
        ...

    async def nodes(self) -> tuple[str, ...]:
        """Return the nodes that can be asked at this moment, sorted.

        Raises
        ------
        PeerUnavailable
            If the carrier itself is lost beyond restart.
        """
        ...

    async def exchange(self, outbound: Mapping[str, bytes], *, deadline_s: float) -> dict[str, bytes]:
        """Send one request to each named node and return the replies that came in time.

        Parameters
        ----------
        outbound : Mapping[str, bytes]
            Node to sealed request.
        deadline_s : float
            Seconds after which whatever has arrived is returned.

        Returns
        -------
        dict[str, bytes]
            Node to sealed reply; a node that is missing did not answer in time.

        Raises
        ------
        PeerUnavailable
            If the carrier itself is lost beyond restart.
        """
        ...

    async def close(self) -> None:
        """Stop everything that this carrier started; nothing can be exchanged afterwards."""
        ...
