"""Which adapter version is in which slot, who uses it, and whose turn it is. Pure Python; no torch, no clock.

States of a slot: free → loading → ready → free. Only a ready slot without requests and without a pin can be
evicted; nothing is ever loaded over a version in place.

Versions wait for a slot in the order in which they came. A resident version whose requests never stop would
keep its slot for ever, so patience ends: a version that has waited `patience_s`, or seen `patience_requests`
requests of others admitted, has one resident version *closed* for it. A closed version's running requests go on;
its new ones wait in the same queue, behind. With `E` slots that no pin holds, requests that run `D` seconds at
most and `L` seconds for a copy, the `k`-th version in the queue (from 0) has its slot within
``(1 + k // E) * (patience_s + 2 D + L)``, whatever arrives for the others.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedllm.errors import NotFound, Overloaded
from fedllm.ids import Digest


@dataclass
class _Slot:
    index: int
    ready: bool = False
    closed: bool = False
    requests: int = 0
    pins: int = 0
    used_at: int = 0


@dataclass
class _Wait:
    since_s: float
    admissions: int
    overdue: bool = False


class SlotTable:
    """Slots of the stacked adapter weights, by version digest.

    Parameters
    ----------
    count : int
        Number of slots.
    patience_s : float
        Seconds after which a resident version is closed for a waiting one.
    patience_requests : int
        Requests of resident versions, admitted while it waits, after which the same happens.
    """

    def __init__(self, count: int, *, patience_s: float = 0.5, patience_requests: int = 64) -> None:
        self.count = count
        self._patience_s = patience_s
        self._patience_requests = patience_requests
        self._slots: dict[Digest, _Slot] = {}
        self._free = list(range(count - 1, -1, -1))
        self._waiting: dict[Digest, _Wait] = {}
        self._admissions = 0
        self._tick = 0

    @property
    def used(self) -> int:
        """Slots that hold a version or are being loaded."""
        return len(self._slots)

    def ready(self) -> tuple[Digest, ...]:
        """Return the versions that are loaded."""
        return tuple(d for d, slot in self._slots.items() if slot.ready)

    def waiting(self) -> tuple[Digest, ...]:
        """Return the versions that wait for a slot, oldest first."""
        return tuple(self._waiting)

    def loading(self, digest: Digest) -> bool:
        """Whether a version is being copied into a slot."""
        slot = self._slots.get(digest)
        return slot is not None and not slot.ready

    def requests(self, digest: Digest) -> int:
        """Return how many requests use a version."""
        slot = self._slots.get(digest)
        return slot.requests if slot else 0

    def admits(self, digest: Digest, now_s: float) -> bool:
        """Whether `acquire` would succeed now."""
        self._close_overdue(now_s)
        slot = self._slots.get(digest)
        return slot is not None and slot.ready and not slot.closed

    def acquire(self, digest: Digest, now_s: float) -> int:
        """Count one more request and return the slot.

        Parameters
        ----------
        digest : Digest
            A loaded version.
        now_s : float
            Seconds on a monotonic clock.

        Raises
        ------
        NotFound
            If the version is not loaded.
        Overloaded
            If it is closed, because another one has waited too long.
        """
        slot = self._ready(digest)
        if not self.admits(digest, now_s):
            raise Overloaded(f"version {digest[:8]} gives its slot to one that waits", hint="retry: it waits in turn")
        self._admissions += 1
        return self._count(slot)

    def release(self, digest: Digest) -> None:
        """Count one request less."""
        slot = self._slots[digest]
        if slot.requests == 0:
            raise ValueError(f"version {digest[:8]} released but no request uses it")
        slot.requests -= 1

    def wait(self, digest: Digest, now_s: float) -> None:
        """Queue a version for a slot, or for being opened again; one that waits keeps its place.

        Raises
        ------
        Overloaded
            If every slot is pinned, so that none can fall free.
        """
        if self._slots and len(self._slots) == self.count and all(slot.pins for slot in self._slots.values()):
            raise Overloaded(f"all {self.count} adapter slots are pinned", hint="raise slots or lower pin_aliases")
        self._waiting.setdefault(digest, _Wait(now_s, self._admissions))

    def leave(self, digest: Digest) -> None:
        """Take a version out of the queue: nobody wants it any more."""
        self._waiting.pop(digest, None)
        self._reopen()

    def grant(self) -> tuple[Digest, int | None] | None:
        """Serve the queue once.

        Returns
        -------
        tuple of (Digest, int or None), or None
            A version and the slot that is now reserved for it; without a slot if it is loaded and open (again).
            None if nobody waits, or nothing is free for the first who does.
        """
        first = next(iter(self._waiting), None)
        for digest in self._waiting:
            slot = self._slots.get(digest)
            if slot is not None and slot.ready and (digest == first or not slot.closed):
                slot.closed = False
                self.leave(digest)
                return digest, None
        if first is None or not self.spare():
            return None
        del self._waiting[first]
        index = self.reserve(first)
        self._reopen()
        return first, index

    def spare(self) -> bool:
        """Whether a slot is free or can be made so now."""
        return bool(self._free or self._idle())

    def reserve(self, digest: Digest) -> int:
        """Take a slot to load a version into, evicting an idle one if needed: closed, else least recently used.

        Raises
        ------
        Overloaded
            If every slot is pinned, loading or in use.
        """
        if digest in self._slots:
            raise ValueError(f"version {digest[:8]} has a slot already")
        if not self._free:
            idle = self._idle()
            if not idle:
                raise Overloaded(
                    f"all {self.count} adapter slots are pinned or in use",
                    hint="raise the number of slots, or retry when requests have ended",
                )
            self.free(min(idle)[-1])
        slot = _Slot(self._free.pop(), used_at=self._next_tick())
        self._slots[digest] = slot
        return slot.index

    def commit(self, digest: Digest) -> None:
        """Mark a reserved slot's weights as complete."""
        self._slots[digest].ready = True

    def admit_waiting(self, digest: Digest, requests: int) -> int:
        """Count requests that have waited for a loaded version, and return its slot."""
        slot = self._ready(digest)
        for _ in range(requests):
            self._count(slot)
        return slot.index

    def pin(self, digest: Digest) -> None:
        """Keep a version from eviction, and open; raise `NotFound` if it is not ready. Pins count."""
        slot = self._ready(digest)
        slot.pins += 1
        slot.closed = False

    def unpin(self, digest: Digest) -> None:
        """Take one pin away; nothing happens if there is none."""
        slot = self._slots.get(digest)
        if slot is not None and slot.pins:
            slot.pins -= 1

    def pinned(self, digest: Digest) -> bool:
        """Whether a version is pinned."""
        slot = self._slots.get(digest)
        return slot is not None and slot.pins > 0

    def free(self, digest: Digest) -> int:
        """Empty a slot that no request uses and return its index.

        Raises
        ------
        ValueError
            If a request still uses it.
        """
        slot = self._slots[digest]
        if slot.requests:
            raise ValueError(f"version {digest[:8]} is used by {slot.requests} requests")
        del self._slots[digest]
        self._free.append(slot.index)
        return slot.index

    def _ready(self, digest: Digest) -> _Slot:
        slot = self._slots.get(digest)
        if slot is None or not slot.ready:
            raise NotFound(f"adapter version {digest[:8]} is not loaded")
        return slot

    def _count(self, slot: _Slot) -> int:
        slot.requests += 1
        slot.used_at = self._next_tick()
        return slot.index

    def _idle(self) -> list[tuple[bool, int, Digest]]:
        slots = self._slots.items()
        return [(not s.closed, s.used_at, d) for d, s in slots if s.ready and not s.requests and not s.pins]

    def _needed(self) -> int:
        """Versions without a slot whose patience has ended: as many residents are to be closed."""
        return sum(wait.overdue for digest, wait in self._waiting.items() if digest not in self._slots)

    def _close_overdue(self, now_s: float) -> None:
        if not self._waiting:
            return
        for wait in self._waiting.values():
            seen = self._admissions - wait.admissions
            wait.overdue |= now_s - wait.since_s >= self._patience_s or seen >= self._patience_requests
        # The one with the fewest requests is empty soonest, and closing it makes the fewest wait.
        victims = sorted(
            (slot for slot in self._slots.values() if slot.ready and not slot.closed and not slot.pins),
            key=lambda slot: (slot.requests, slot.used_at),
        )
        closed = sum(slot.closed for slot in self._slots.values())
        for slot in victims[: max(0, self._needed() - closed)]:
            slot.closed = True

    def _reopen(self) -> None:
        closed = [slot for slot in self._slots.values() if slot.closed]
        closed.sort(key=lambda slot: -slot.requests)
        for slot in closed[: max(0, len(closed) - self._needed())]:
            slot.closed = False

    def _next_tick(self) -> int:
        self._tick += 1
        return self._tick
