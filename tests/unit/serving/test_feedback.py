"""Ratings: read strictly, from the tenant that was answered only, counted once, corrected when they change."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.errors import NotFound, RequestInvalid
from fedllm.ids import Digest
from fedllm.serving.feedback import ANSWERS_KEPT, Feedback, Feedbacks, read_feedback
from fedllm.serving.records import RequestRecord

ONE, TWO = Digest("01" * 32), Digest("02" * 32)


def record(answer: str, tenant: str = "acme", version: Digest | None = ONE, alias: str = "acme/tools") -> RequestRecord:
    """Return an answered request."""
    return RequestRecord(
        id=answer, tenant=tenant, key="main", route="/v1/chat/completions", alias=alias, version=version, status=200,
        prompt_tokens=5, completion_tokens=7, cached_tokens=0, started=1.0, ttft_s=0.1, seconds=0.5,
    )  # fmt: skip


class Counts:
    """Counts ratings as a report does."""

    def __init__(self) -> None:
        self.up = self.down = 0
        self.heard: list[tuple[Digest, str]] = []

    def note_feedback(self, version: Digest, alias: str, good: bool, *, changed: bool = False) -> None:
        """Count one."""
        self.heard.append((version, alias))
        self.up += 1 if good else -changed
        self.down += -changed if good else 1


def test_a_rating_is_read() -> None:
    """Known answers."""
    assert read_feedback({"id": "chatcmpl-1", "score": 1}) == Feedback("chatcmpl-1", 1)
    assert read_feedback({"id": "cmpl-" + "x" * 123, "score": -1}).score == -1


@pytest.mark.parametrize(
    ("body", "where"),
    [
        ([], "JSON object"),
        (None, "JSON object"),
        ({}, "id must be"),
        ({"score": 1}, "id must be"),
        ({"id": 7, "score": 1}, "id must be"),
        ({"id": "", "score": 1}, "id must be"),
        ({"id": "x" * 129, "score": 1}, "up to 128"),
        ({"id": "x"}, "score must be 1 or -1"),
        ({"id": "x", "score": 0}, "score"),
        ({"id": "x", "score": 2}, "score"),
        ({"id": "x", "score": True}, "score"),
        ({"id": "x", "score": 1.0}, "score"),
        ({"id": "x", "score": "1"}, "score"),
        ({"id": "x", "score": [1]}, "score"),
        ({"id": "x", "score": 1, "comment": "my secret"}, "1 fields more"),
    ],
)
def test_what_is_no_rating_is_refused_by_field(body: object, where: str) -> None:
    """Each is refused by name, and nothing that was sent is said again."""
    with pytest.raises(RequestInvalid, match=where) as caught:
        read_feedback(body)
    assert "secret" not in caught.value.message


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_any_json_is_read_or_refused(body: object) -> None:
    """Nothing but `RequestInvalid` is raised; what is read has the form that it claims."""
    try:
        found = read_feedback(json.loads(json.dumps(body)))
    except RequestInvalid:
        return
    assert found.score in (1, -1)


def test_only_who_was_answered_may_rate() -> None:
    """Somebody else's id, and one that never was, look the same; nothing is counted."""
    counts = Counts()
    feedbacks = Feedbacks(counts)
    feedbacks.observe(record("chatcmpl-1"))
    messages = []
    for tenant, answer in (("other", "chatcmpl-1"), ("other", "chatcmpl-9"), ("acme", "chatcmpl-9")):
        with pytest.raises(NotFound) as caught:
            feedbacks.rate(tenant, answer, 1)
        messages.append((caught.value.message, caught.value.hint))
    assert len(set(messages)) == 1
    assert counts.heard == []
    assert feedbacks.rate("acme", "chatcmpl-1", 1) == (ONE, "acme/tools")


def test_two_tenants_may_have_one_id() -> None:
    """Ids are looked up for the tenant who asks."""
    feedbacks = Feedbacks()
    feedbacks.observe(record("chatcmpl-1"))
    feedbacks.observe(record("chatcmpl-1", tenant="other", version=TWO, alias="other/x"))
    assert feedbacks.rate("acme", "chatcmpl-1", 1) == (ONE, "acme/tools")
    assert feedbacks.rate("other", "chatcmpl-1", 1) == (TWO, "other/x")


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([1, -1])), max_size=30))
def test_counts_are_those_of_the_last_ratings(ratings: list[Any]) -> None:
    """Against keeping only each answer's last rating: however often they change, up and down are those."""
    counts = Counts()
    feedbacks = Feedbacks(counts)
    for n in range(4):
        feedbacks.observe(record(f"chatcmpl-{n}"))
    last: dict[int, int] = {}
    for n, score in ratings:
        feedbacks.rate("acme", f"chatcmpl-{n}", score)
        last[n] = score
    assert (counts.up, counts.down) == (list(last.values()).count(1), list(last.values()).count(-1))


def test_a_pin_is_credited_to_its_alias() -> None:
    """``alias@v1`` was asked for: the version is the pin's, the alias is the alias."""
    feedbacks = Feedbacks()
    feedbacks.observe(record("chatcmpl-1", alias="acme/tools@v1"))
    assert feedbacks.rate("acme", "chatcmpl-1", -1) == (ONE, "acme/tools")


def test_what_has_no_answer_cannot_be_rated() -> None:
    """No id, no tenant or no version: there is nothing to credit."""
    feedbacks = Feedbacks()
    for odd in (record(""), record("a", tenant=""), record("b", version=None)):
        feedbacks.observe(odd)
    for answer in ("", "a", "b"):
        with pytest.raises(NotFound):
            feedbacks.rate("acme", answer, 1)


def test_a_busy_tenant_pushes_out_its_own_answers_only() -> None:
    """Memory is bounded for each tenant, oldest first; a quiet tenant's one answer stays."""
    feedbacks = Feedbacks(kept=3)
    feedbacks.observe(record("quiet", tenant="quiet"))
    for n in range(100):
        feedbacks.observe(record(f"chatcmpl-{n}"))
    with pytest.raises(NotFound, match="last 3"):
        feedbacks.rate("acme", "chatcmpl-96", 1)
    for n in (97, 98, 99):
        feedbacks.rate("acme", f"chatcmpl-{n}", 1)
    feedbacks.rate("quiet", "quiet", 1)
    assert ANSWERS_KEPT >= 1000


def test_all_tenants_together_are_bounded_and_the_busiest_pays() -> None:
    """Many tenants' answers do not add up without end; who has few keeps them all."""
    feedbacks = Feedbacks(kept=8, most=10)
    feedbacks.observe(record("quiet", tenant="quiet"))
    feedbacks.observe(record("quiet", tenant="quiet"))  # told again, counted once
    for n in range(8):
        feedbacks.observe(record(f"busy-{n}", tenant="busy"))
    for tenant in ("third", "fourth"):
        feedbacks.observe(record(tenant, tenant=tenant))
    with pytest.raises(NotFound):
        feedbacks.rate("busy", "busy-0", 1)
    for n in range(1, 8):
        feedbacks.rate("busy", f"busy-{n}", 1)
    for tenant in ("quiet", "third", "fourth"):
        feedbacks.rate(tenant, tenant, 1)
