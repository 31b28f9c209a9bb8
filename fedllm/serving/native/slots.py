"""Which adapter version is in which slot, who uses it, and what may be evicted. Pure Python; no torch.

States of a slot: free → loading → ready → free. Only a ready slot without requests and without a pin can be
evicted; nothing is ever loaded over a version in place.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedllm.errors import NotFound, Overloaded
from fedllm.ids import Digest


@dataclass
class _Slot:
    index: int
    ready: bool = False
    requests: int = 0
    pins: int = 0
    used_at: int = 0


class SlotTable:
    """Slots of the stacked adapter weights, by version digest.

    Parameters
    ----------
    count : int
        Number of slots.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._slots: dict[Digest, _Slot] = {}
        self._free = list(range(count - 1, -1, -1))
        self._tick = 0

    @property
    def used(self) -> int:
        """Slots that hold a version or are being loaded."""
        return len(self._slots)

    def ready(self) -> tuple[Digest, ...]:
        """Return the versions that can be acquired."""
        return tuple(d for d, slot in self._slots.items() if slot.ready)

    def requests(self, digest: Digest) -> int:
        """Return how many requests use a version."""
        slot = self._slots.get(digest)
        return slot.requests if slot else 0

    def reserve(self, digest: Digest) -> int:
        """Take a slot to load a version into, evicting the least recently used idle one if needed.

        Raises
        ------
        Overloaded
            If every slot is pinned, loading or in use.
        """
        if digest in self._slots:
            raise ValueError(f"version {digest[:8]} has a slot already")
        if not self._free:
            self._evict()
        slot = _Slot(self._free.pop(), used_at=self._next_tick())
        self._slots[digest] = slot
        return slot.index

    def commit(self, digest: Digest) -> None:
        """Mark a reserved slot's weights as complete."""
        self._slots[digest].ready = True

    def acquire(self, digest: Digest) -> int:
        """Count one more request and return the slot; raise `NotFound` if the version is not ready."""
        slot = self._ready(digest)
        slot.requests += 1
        slot.used_at = self._next_tick()
        return slot.index

    def release(self, digest: Digest) -> None:
        """Count one request less."""
        slot = self._slots[digest]
        if slot.requests == 0:
            raise ValueError(f"version {digest[:8]} released but no request uses it")
        slot.requests -= 1

    def pin(self, digest: Digest) -> None:
        """Keep a version from eviction; raise `NotFound` if it is not ready. Pins count."""
        self._ready(digest).pins += 1

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

    def _evict(self) -> None:
        idle = [(s.used_at, d) for d, s in self._slots.items() if s.ready and not s.requests and not s.pins]
        if not idle:
            raise Overloaded(
                f"all {self.count} adapter slots are pinned or in use",
                hint="raise the number of slots, or retry when requests have ended",
            )
        self.free(min(idle)[1])

    def _next_tick(self) -> int:
        self._tick += 1
        return self._tick
