"""The slot table's rules, without a model."""

from __future__ import annotations

import pytest

from fedllm.errors import NotFound, Overloaded
from fedllm.ids import sha256
from fedllm.serving.native.slots import SlotTable

A, B, C = (sha256(name) for name in (b"a", b"b", b"c"))


def loaded(table: SlotTable, digest) -> int:
    """Reserve and commit."""
    slot = table.reserve(digest)
    table.commit(digest)
    return slot


def test_least_recently_used_idle_slot_is_evicted() -> None:
    """Using a version protects it for a while; the other goes."""
    table = SlotTable(2)
    loaded(table, A)
    slot_b = loaded(table, B)
    table.acquire(A)
    table.release(A)
    assert loaded(table, C) == slot_b
    assert set(table.ready()) == {A, C}


def test_loading_pinned_and_busy_slots_stay() -> None:
    """None of the three can be taken, and the refusal names the limit."""
    for keep in ("loading", "pinned", "busy"):
        table = SlotTable(1)
        table.reserve(A)
        if keep != "loading":
            table.commit(A)
        if keep == "pinned":
            table.pin(A)
        if keep == "busy":
            table.acquire(A)
        with pytest.raises(Overloaded, match="all 1 adapter slots"):
            table.reserve(B)


def test_a_version_that_is_loading_cannot_be_used() -> None:
    """Half a copy is never served."""
    table = SlotTable(1)
    table.reserve(A)
    with pytest.raises(NotFound):
        table.acquire(A)


def test_misuse_is_refused() -> None:
    """Freeing what is used, releasing what is not, loading twice."""
    table = SlotTable(2)
    loaded(table, A)
    with pytest.raises(ValueError, match="no request uses it"):
        table.release(A)
    table.acquire(A)
    with pytest.raises(ValueError, match="used by 1"):
        table.free(A)
    with pytest.raises(ValueError, match="slot already"):
        table.reserve(A)
