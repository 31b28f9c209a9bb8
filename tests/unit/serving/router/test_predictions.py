"""Kept answers: found again by who had them, for the same version and question, and by nobody else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.serving.router.fake_replica import FakeReplica
from unit.serving.router.live_router import ALIAS, routed, until

from fedllm.ids import sha256
from fedllm.serving.router.predictions import Key, Predictions, key_of

OLD, NEW = sha256(b"old"), sha256(b"new")
BODY = {"model": "a/b", "prompt": "p", "temperature": 0}
ROUTE = "/v1/completions"
Drive = Callable[..., object]


def _answer(digest: str, text: str = "t") -> dict[str, Any]:
    usage = {"prompt_tokens": 7, "completion_tokens": 2}
    return {"id": "cmpl-1", "system_fingerprint": digest, "choices": [{"text": text}], "usage": usage}


def _key(tenant: str = "acme", digest: Any = OLD, route: str = ROUTE, **body: Any) -> Key:
    key = key_of(tenant, digest, route, {**BODY, **body})
    assert key is not None
    return key


def test_a_hit_is_the_same_answer() -> None:
    """What was kept is found, with all of its prompt counted as cached."""
    kept = Predictions(10_000)
    kept.keep(_key(), "acme", _answer(OLD))
    found = kept.find(_key(), "acme")
    assert found is not None
    assert found["choices"] == [{"text": "t"}]
    assert found["usage"]["prompt_tokens_details"] == {"cached_tokens": 7}
    assert (kept.hits, kept.misses) == (1, 0)


@pytest.mark.parametrize(
    "other",
    [
        _key("other"),
        _key(digest=NEW),
        _key(route="/v1/chat/completions"),
        _key(prompt="q"),
        _key(max_tokens=5),
        _key(seed=1),
        _key(stop=["x"]),
    ],
)
def test_any_difference_is_a_miss(other: Key) -> None:
    """Tenant, version, path and every field that changes an answer are parts of the key."""
    kept = Predictions(10_000)
    kept.keep(_key(), "acme", _answer(OLD))
    assert kept.find(other, other.tenant) is None


def test_what_changes_no_answer_is_no_part_of_the_key() -> None:
    """An alias or its pin, an end user's name and the order of fields make no difference."""
    assert _key(model="a/b@v3", user="x", metadata={}) == _key()
    assert key_of("acme", OLD, ROUTE, dict(reversed(BODY.items()))) == _key()


def test_across_tenants_it_fails_closed() -> None:
    """Even if a key were forged or shared by mistake, nobody is answered with what another tenant was."""
    kept = Predictions(10_000)
    kept.keep(_key("acme"), "acme", _answer(OLD, "secret of acme"))
    assert kept.find(_key("acme"), "other") is None
    assert kept.find(_key("acme"), "") is None
    kept.keep(_key("acme", NEW), "acme", _answer(OLD))
    assert kept.find(_key("acme", NEW), "acme") is None


@pytest.mark.parametrize(
    "body",
    [
        {"temperature": 0.1},
        {"temperature": None},
        {"n": 2},
        {"stream": True},
        {"tools": [{}]},
        {"tool_choice": "auto"},
        {"logprobs": True},
        {"logprobs": 0},
        {"top_logprobs": 2},
    ],
)
def test_what_is_never_kept(body: dict[str, Any]) -> None:
    """Sampling, several continuations, streams, tools and log probabilities have no key."""
    assert key_of("acme", OLD, ROUTE, {**BODY, **body}) is None
    assert key_of("acme", None, ROUTE, BODY) is None


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3000)), max_size=60))
def test_bytes_are_bounded_and_the_oldest_go(steps: list[tuple[int, int]]) -> None:
    """The size is never above the bound, and what is left is what was used last."""
    kept = Predictions(8_000)
    used: list[int] = []
    for number, size in steps:
        kept.keep(_key(prompt=str(number)), "acme", _answer(OLD, "x" * size))
        assert 0 <= kept.bytes <= 8_000
        used = [*(n for n in used if n != number), number]
    present = [n for n in used if kept.find(_key(prompt=str(n)), "acme") is not None]
    assert present == used[len(used) - len(present) :]


def test_an_answer_larger_than_all_is_not_kept() -> None:
    """One answer that is too large pushes nobody out."""
    kept = Predictions(2_000)
    kept.keep(_key(), "acme", _answer(OLD))
    kept.keep(_key(prompt="q"), "acme", _answer(OLD, "x" * 3_000))
    assert kept.find(_key(), "acme") is not None
    assert kept.find(_key(prompt="q"), "acme") is None


def test_through_the_router(tmp_path: Path, drive: Drive) -> None:
    """The second time no replica is asked; another tenant's same question is; so is the next version's."""

    async def story() -> None:
        async with routed(tmp_path, [FakeReplica("one")], predictions=100_000) as live:
            first = await live.post(temperature=0)
            again = await live.post(temperature=0)
            asked = live.replicas["one"].asked
            assert len(asked) == 1
            assert again.headers["x-fedllm-prediction"] == "hit"
            assert again.headers["x-fedllm-version"] == live.old
            assert "x-fedllm-prediction" not in first.headers
            ids = {first.json()["id"], again.json()["id"]}
            assert len(ids) == 2
            assert again.json()["choices"] == first.json()["choices"]
            assert again.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 7
            assert [(r.prompt_tokens, r.cached_tokens, r.replica) for r in live.records] == [(7, 3, "one"), (7, 7, "")]
            other = await live.post(temperature=0, key=live.other_key)
            assert "x-fedllm-prediction" not in other.headers
            assert len(asked) == 2
            assert (await live.post(temperature=0, key=live.poor_key)).status_code == 404
            new = live.publish(2)
            await until(lambda: live.models.served[ALIAS].digest == new)
            assert (await live.post(temperature=0)).json()["system_fingerprint"] == new
            assert len(asked) == 3
            await live.post(temperature=1)
            await live.post(temperature=1)
            assert len(asked) == 5

    drive(story())
