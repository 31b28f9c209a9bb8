"""Server-sent events: read however the bytes are cut, and written as they were."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.serving.router.events import MAX_EVENT_BYTES, EventTooLong, read_events, tokens_in, write_event


async def _parts(data: bytes, cuts: list[int]) -> AsyncIterator[bytes]:
    bounds = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    for begin, end in pairwise(bounds):
        yield data[begin:end]


def _read(data: bytes, cuts: list[int]) -> list[bytes]:
    async def read() -> list[bytes]:
        return [event async for event in read_events(_parts(data, cuts))]

    return asyncio.run(read())


@given(st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=12)), max_size=6), st.lists(st.integers(0, 999)))
def test_round_trip(bodies: list[dict[str, str]], cuts: list[int]) -> None:
    """What is written is read again, wherever the network cuts it; line separators of Unicode end no line."""
    written = [write_event(body) for body in bodies]
    assert [write_event(event) for event in _read(b"".join(written), cuts)] == written


def test_forms_of_the_standard() -> None:
    """Carriage returns, comments, other fields and several data lines are read as the standard has them."""
    data = b": ping\r\n\r\nevent: x\r\ndata: one\r\n\r\ndata:two\ndata: three\n\ndata: unfinished"
    assert _read(data, []) == [b"one", b"two\nthree"]


def test_an_event_without_end_is_refused() -> None:
    """A replica cannot fill the router's memory with one event."""
    with pytest.raises(EventTooLong):
        _read(b"data: " + b"x" * MAX_EVENT_BYTES, [])


def test_tokens_of_a_chunk() -> None:
    """Text and calls count one, ids count themselves, roles and ends count nothing."""
    assert tokens_in({"choices": [{"delta": {"role": "assistant", "content": ""}}]}) == 0
    assert tokens_in({"choices": [{"delta": {"content": "x"}}, {"text": "y"}]}) == 2
    assert tokens_in({"choices": [{"delta": {"tool_calls": [{}]}}]}) == 1
    assert tokens_in({"choices": [{"text": "abc", "token_ids": [1, 2, 3]}]}) == 3
    assert tokens_in({"choices": [{"delta": {}, "finish_reason": "stop"}]}) == 0
