"""Placement: whose keys move, what a bound on loads promises, and what has the same key."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from fedllm.serving.router.placement import EPSILON, place, placement_key, rendezvous

NAMES = st.lists(st.from_regex(r"[a-z]{1,6}", fullmatch=True), min_size=1, max_size=8, unique=True)
KEYS = st.lists(st.binary(min_size=1, max_size=16), min_size=1, max_size=40)


@given(NAMES, KEYS, st.data())
def test_who_leaves_moves_only_its_own_keys(names: list[str], keys: list[bytes], data: st.DataObject) -> None:
    """Taking one replica away leaves every key's order of the others as it was."""
    gone = data.draw(st.sampled_from(names))
    left = [name for name in names if name != gone]
    for key in keys:
        assert rendezvous(key, left) == [name for name in rendezvous(key, names) if name != gone]


@given(NAMES, st.lists(st.tuples(st.binary(max_size=4), st.integers(1, 5000)), max_size=60))
def test_bounded_loads(names: list[str], requests: list[tuple[bytes, int]]) -> None:
    """However skewed the keys are, none has more than (1 + epsilon) times the mean and its last request."""
    loads = dict.fromkeys(names, 0)
    for key, tokens in requests:
        bound = (1 + EPSILON) * sum(loads.values()) / len(loads)
        first = place(key, loads)[0]
        assert loads[first] <= bound
        loads[first] += tokens
        assert loads[first] <= bound + tokens


@given(NAMES, st.binary(max_size=16), st.lists(st.integers(0, 1000), min_size=8, max_size=8))
def test_order_is_complete(names: list[str], key: bytes, tokens: list[int]) -> None:
    """Every replica is in the order once, within the bound before above it, each part in the key's own order."""
    loads = dict(zip(names, tokens, strict=False))
    order = place(key, loads)
    bound = (1 + EPSILON) * sum(loads.values()) / len(loads)
    assert sorted(order) == sorted(names)
    for part in ([n for n in order if loads[n] <= bound], [n for n in order if loads[n] > bound]):
        assert part == [n for n in rendezvous(key, names) if n in part]
    assert [loads[n] > bound for n in order] == sorted(loads[n] > bound for n in order)


def test_idle_replicas_keep_a_prefix_together() -> None:
    """With no load, the same version and beginning meet the same replica; other keys spread evenly."""
    idle = dict.fromkeys(("one", "two", "three"), 0)
    keys = [placement_key("d", {"prompt": f"prompt {i}"}) for i in range(900)]
    assert all(place(key, idle) == place(key, idle) for key in keys)
    shares = Counter(place(key, idle)[0] for key in keys)
    assert all(240 < count < 360 for count in shares.values()), shares


def test_nobody_is_no_error() -> None:
    """An empty fleet has an empty order."""
    assert place(b"key", {}) == []


def test_a_conversation_keeps_its_key() -> None:
    """Later turns do not change the key; another system prompt, first question or version does."""
    system = {"role": "system", "content": "be brief"}
    first = {"role": "user", "content": "what is a tap?"}
    turns = [system, first, {"role": "assistant", "content": "a valve"}, {"role": "user", "content": "and a gate?"}]
    key = placement_key("d", {"messages": [system, first]})
    assert placement_key("d", {"messages": turns}) == key
    assert placement_key("e", {"messages": turns}) != key
    assert placement_key("d", {"messages": [system, turns[3]]}) != key
    assert placement_key("d", {"messages": [{**system, "content": "be long"}, first]}) != key


def test_long_prompts_share_a_key_by_their_beginning() -> None:
    """What differs only after 256 characters, or 64 token ids, goes to the same replica."""
    assert placement_key("", {"prompt": "x" * 256 + "a"}) == placement_key("", {"prompt": "x" * 256 + "b"})
    assert placement_key("", {"prompt": "x" * 255 + "a"}) != placement_key("", {"prompt": "x" * 255 + "b"})
    assert placement_key("", {"prompt": [*range(64), 1]}) == placement_key("", {"prompt": [*range(64), 2]})


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=8))
def test_anything_has_a_key(value: object) -> None:
    """What is malformed is for the replica to refuse; placing it never fails."""
    assert len(placement_key("d", {"prompt": value, "messages": value})) == 16
