"""Requests on their way through a relay run, and the replies that are put together from its frames."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fedllm.errors import DecodeError
from fedllm.relay.carrier import Reply
from fedllm.relay.service import MAX_PARTS

T = TypeVar("T")
Arrivals = asyncio.Queue[tuple["Parcel", Reply | None]]
"""What an exchange waits for: a parcel and its reply, None when there will be none."""


async def next_in_time(queue: asyncio.Queue[T], left_s: float) -> T | None:
    """Return what is next in a queue; None if nothing comes in time. What is there already is never too late."""
    with suppress(TimeoutError):
        async with asyncio.timeout(left_s):
            return await queue.get()
    # it came in the very moment in which the time was over
    return None if queue.empty() else queue.get_nowait()


@dataclass
class Parcel:
    """One request of one exchange on its way.

    Attributes
    ----------
    tag, node, data
        Its name on the link, where it goes, the sealed request.
    until_s : float
        Monotonic time of the exchange's deadline.
    arrivals : Arrivals
    taken : asyncio.Event
        Set when the reader has done with the reply, or the exchange is over.
    resends : int
        How often a node failed it.
    sent_on : int
        The run that it was last given to, 0 for none.
    """

    tag: str
    node: str
    data: bytes = field(repr=False)
    until_s: float
    arrivals: Arrivals = field(repr=False)
    answered: bool = False
    taken: asyncio.Event = field(default_factory=asyncio.Event, repr=False)
    resends: int = 0
    sent_on: int = 0

    def answer(self, reply: Reply | None) -> None:
        """Hand the reply to the exchange; what comes later is not heard."""
        if not self.answered:
            self.answered = True
            self.arrivals.put_nowait((self, reply))


class Assembly:
    """Puts one run's frames ``reply`` and ``part`` together; what is half received goes with the run.

    Parameters
    ----------
    parcels : Mapping[str, Parcel]
        Those under way, by tag.
    """

    def __init__(self, parcels: Mapping[str, Parcel]) -> None:
        self._parcels = parcels
        self._tag: str | None = None
        self._head = b""
        self._parts: list[bytes] = []
        self._missing = 0

    def add(self, header: Mapping[str, Any], blob: bytes) -> Parcel | None:
        """Take one frame in, and answer the parcel whose reply is complete with it.

        Returns
        -------
        Parcel or None
            One whose reply has parts: read on when it was taken.

        Raises
        ------
        DecodeError
            If the frame is out of turn, or announces more than `MAX_PARTS` parts.
        """
        tag = str(header["tag"])
        if header["op"] == "reply" and self._tag is None:
            parts = header.get("parts")
            if type(parts) is not int:
                raise DecodeError("a reply's number of parts is no number")
            self._tag, self._head, self._missing = tag, blob, parts
            if not 0 <= self._missing <= MAX_PARTS:
                raise DecodeError(f"a reply of {self._missing} parts, at most {MAX_PARTS} allowed")
        elif header["op"] == "part" and self._tag == tag:
            self._missing -= 1
            if tag in self._parcels:
                self._parts.append(blob)
        else:
            raise DecodeError(f"link frame {header['op']!r} is out of turn")
        if self._missing:
            return None
        reply, self._tag, self._head, self._parts = Reply(self._head, tuple(self._parts)), None, b"", []
        parcel = self._parcels.get(tag)
        if parcel is None or parcel.answered:
            return None
        parcel.answer(reply)
        return parcel if reply.parts else None
