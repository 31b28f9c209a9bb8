"""The port through which the coordinator reaches owners: opaque bytes out, opaque bytes back."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class Reply:
    """What comes back from a node: a sealed envelope and the parts that it names by digest.

    Attributes
    ----------
    head : bytes
        The sealed envelope.
    parts : tuple[bytes, ...]
        Chunks of a masked vector, 1 to 4 MiB each; nearly always none.
    """

    head: bytes = field(repr=False)
    parts: tuple[bytes, ...] = field(default=(), repr=False)

    @property
    def size(self) -> int:
        """Bytes as carried."""
        return len(self.head) + sum(map(len, self.parts))


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

    def exchange(self, outbound: Mapping[str, bytes], *, deadline_s: float) -> AsyncGenerator[tuple[str, Reply], None]:
        """Send one request to each named node and yield the replies as they come.

        Each node is yielded once at most. The iteration ends when all have answered or the deadline is over. A
        reply with parts is read from its node only when the one before was taken: whoever iterates sets the
        pace, and has one owner's vector in memory at a time. Close the generator (`contextlib.aclosing`).

        Parameters
        ----------
        outbound : Mapping[str, bytes]
            Node to sealed request.
        deadline_s : float
            Seconds after which nothing more is waited for.

        Raises
        ------
        PeerUnavailable
            If the carrier itself is lost beyond restart.
        """
        ...

    async def close(self) -> None:
        """Stop everything that this carrier started; nothing can be exchanged afterwards."""
        ...
