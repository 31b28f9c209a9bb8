"""The tiers benchmark tells wrong versions, late slots and leftovers, and its figures are those of its notes."""

from __future__ import annotations

import asyncio
import json
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace

import pytest

from benchmarks import tiers
from benchmarks.document import GATE_FAILED, GateFailed
from benchmarks.tiers import bound, by_tier, starvation, summarise
from benchmarks.tiers_endpoint import TIERS, Note, NotedEndpoint, Room, Wait, open_endpoint
from benchmarks.tiers_model import WIDE_VOCAB, ManyAdapters, make_wide_base
from benchmarks.tiers_plot import svg
from benchmarks.tiers_registry import SignedRegistry
from benchmarks.tiers_traffic import LeastRecentlyUsed, Scene, Traffic, excusable, first_miss, zipf
from fedllm.basemodel.inspect import open_base

ROOM = Room(slots=4, pinned=1, patience_s=0.5)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Yield a base, and a registry of 30 versions that answers."""
    base = tmp_path_factory.mktemp("base")
    make_wide_base(base)
    adapters = ManyAdapters(base, open_base(base).digest)
    with SignedRegistry(tmp_path_factory.mktemp("registry") / "blobs", adapters, 30) as registry:
        yield base, registry


async def until(true: Callable[[], object]) -> None:
    """Wait for a state of the endpoint that nothing announces."""
    async with asyncio.timeout(60):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def test_a_little_of_it_prints_every_tier_and_a_picture(capsys: pytest.CaptureFixture[str]) -> None:
    """Forty adapters, both scenes: requests add up, nothing failed, and the SVG has a bar and a curve for each tier."""
    assert tiers.main(["--tiny", "--adapters", "40", "--requests", "60", "--fill", "30", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gate"] is True
    for scene in found["scenes"].values():
        assert sum(row["requests"] for row in scene["tiers"].values()) == scene["requests"] == 60
        assert (scene["failed"], scene["wrong_version"]) == (0, 0)
        assert scene["asked_again"] == scene["excused"]
        assert scene["tiers"]["slot"]["to_slot_s_p50"] in (0, None)
    picture = ET.fromstring(svg(found))  # noqa: S314 - made here
    bars = [item for item in picture.iter() if item.get("fill") in {"#2e8b57", "#1f5fa8", "#c2571a", "#8b1a1a"}]
    assert sum(item.tag.endswith("rect") for item in bars) == 2 * len(TIERS)
    assert tiers.table(found).row_count == 2 * len(TIERS)


def test_an_answer_by_another_version_is_called_wrong(tmp_path, world, monkeypatch) -> None:
    """Right answers pass. With other tokens in the books all are wrong, alone too, and so with other digests."""
    base, registry = world

    async def body() -> None:
        async with open_endpoint(tmp_path, base, registry, tiers.ROOM, tiers.LIMITS, "float32") as endpoint:
            traffic = Traffic(endpoint, registry, WIDE_VOCAB, 1.0)
            right = await traffic.scene(4, 12, 1, out_tokens=5)
            tiers.left_behind(endpoint, tiers.ROOM)
            assert (len(right.notes), right.failed, right.wrong) == (12, 0, 0)
            said = list(registry.token_of.values())
            with monkeypatch.context() as books:
                books.setattr(registry, "token_of", dict(zip(registry.token_of, said[1:] + said[:1], strict=True)))
                swapped = await traffic.scene(4, 6, 1, out_tokens=5)
            assert (swapped.missed, swapped.excused, swapped.wrong) == (6, 0, 6)
            with monkeypatch.context() as books:
                books.setattr(registry, "digests", dict.fromkeys(registry.digests, "0" * 64))
                other = await traffic.scene(2, 4, 1, out_tokens=1)
            assert (other.wrong, len(other.reasons)) == (4, 4)
            endpoint.tenant = replace(endpoint.tenant, allow=())
            refused = await traffic.scene(2, 4, 1, out_tokens=1)
            assert (refused.failed, refused.notes) == (4, [])
            lease = endpoint.engine.lease(endpoint.engine.loaded()[0])
            with lease, pytest.raises(GateFailed, match="1 requests are still counted"):
                tiers.left_behind(endpoint, tiers.ROOM)

    asyncio.run(body())


def test_a_version_comes_from_the_registry_once_and_then_from_disk(tmp_path, world) -> None:
    """Room for one in memory: then it is in its slot; with the slot emptied, in memory; pushed out, on disk."""
    base, registry = world
    first, second = list(registry.digests)[:2]
    room = Room(slots=2, in_memory=1, disk_share=1)

    async def tier(endpoint: NotedEndpoint, alias: str) -> str:
        note = Note(0.0)
        async with endpoint.lease(alias, note):
            return note.tier

    async def body() -> list[str]:
        async with open_endpoint(tmp_path, base, registry, room, tiers.LIMITS, "float32") as endpoint:
            found = [await tier(endpoint, first), await tier(endpoint, first)]
            await endpoint.engine.unload(registry.digests[first])
            found.append(await tier(endpoint, first))
            found.append(await tier(endpoint, second))
            await endpoint.engine.unload(registry.digests[first])
            return [*found, await tier(endpoint, first)]

    assert asyncio.run(body()) == ["registry", "slot", "memory", "registry", "disk"]


def test_what_repeats_alone_is_excused_and_a_version_that_is_always_anothers_is_not() -> None:
    """The same first miss among its own tokens is excused; another first miss, or foreign tokens alone, are not."""
    assert excusable([7, 3, 7], [7, 4, 7], 7)
    assert not excusable([7, 3, 7], [7, 7, 3], 7)
    assert not excusable([7, 3, 7], [7, 7, 7], 7)
    assert not excusable([3, 3, 3], [3, 3, 3], 7)
    assert [first_miss(said, 7) for said in ([7, 7], [3, 7], [7, 3], [])] == [2, 0, 1, 0]


def test_a_wait_beyond_its_bound_fails_the_gate() -> None:
    """Three unpinned slots, requests of 2 s, copies of 0.25 s: 4.75 s for the first three in the queue, then twice."""
    assert [bound(place, 2.0, 0.25, ROOM) for place in (0, 2, 3)] == [4.75, 4.75, 9.5]
    notes = [Note(0.0, "slot", 0.0, 1.0, 1.0, 2.0, 3.0), Note(0.0, "memory", 0.0, 0.5, 0.5, 0.6, 0.7)]
    found = starvation([Wait(0, 1.0), Wait(3, 7.6)], notes, [0.25, 0.1], ROOM)
    assert (found["waits"], found["wait_s_max"], found["furthest_place"]) == (2, 7.6, 3)
    assert (found["request_s_max"], found["bound_s_of_the_first"]) == (2.0, 4.75)
    assert found["largest_share_of_bound"] == 0.8
    with pytest.raises(GateFailed, match=r"waited 4\.8 s at place 2"):
        starvation([Wait(2, 4.8)], notes, [0.25], ROOM)


def test_figures_by_tier_are_those_of_its_requests() -> None:
    """Two requests from disk: shares, medians and the four parts of the way; an empty tier has no times."""
    notes = [Note(1.0, "disk", 1.5, 2.5, 2.75, 3.0, 4.0), Note(2.0, "disk", 2.5, 3.5, 3.75, 4.0, 9.0)]
    found = by_tier([*notes, Note(1.0, "slot", 1.0, 1.0, 1.0, 1.25, 2.0)])
    disk = found["disk"]
    assert (disk["requests"], disk["share"], disk["ttft_s_p50"], disk["ttft_s_max"]) == (2, 0.6667, 2.0, 2.0)
    parts = [disk[f"to_{part}_s_p50"] for part in ("memory", "slot", "warm", "token")]
    assert parts == [0.5, 1.0, 0.25, 0.25]
    assert found["slot"]["ttft_s_p50"] == 0.25
    assert found["registry"]["ttft_s_p50"] is None


@pytest.mark.parametrize(
    ("scene", "message"),
    [(Scene(1, wrong=2), "2 answers are by another version"), (Scene(1, failed=1), "1 requests failed")],
)
def test_one_bad_answer_fails_the_gate(scene: Scene, message: str) -> None:
    """A scene without requests passes; one failed or wrong answer is enough to have no figures."""
    summarise(Scene(1), ROOM)
    with pytest.raises(GateFailed, match=message):
        summarise(scene, ROOM)


def test_popularity_falls_as_zipf_says() -> None:
    """Of 20,000 draws of 50, the first has its share of 1 / H and the tenth a tenth of that; seeds repeat."""
    picks = zipf(50, 20_000, 1.0, 3)
    whole = sum(1 / rank for rank in range(1, 51))
    assert picks.count(0) / 20_000 == pytest.approx(1 / whole, rel=0.05)
    assert picks.count(9) / 20_000 == pytest.approx(0.1 / whole, rel=0.15)
    assert picks == zipf(50, 20_000, 1.0, 3)
    assert min(picks) >= 0
    assert max(picks) < 50


def test_the_cache_to_compare_with_forgets_the_least_recent() -> None:
    """Room for two: 1 comes back in time, 2 does not; what it has, it has at the next call."""
    cache = LeastRecentlyUsed(2)
    assert cache.hits([1, 2, 1, 3, 1, 2]) == 2
    assert cache.hits([2, 1, 3]) == 2
    assert LeastRecentlyUsed(0).hits([1, 1]) == 0


def test_a_closed_slot_is_noted(tmp_path, world) -> None:
    """One slot, and no patience: while a second version waits for it, a request for the first finds it closed."""
    base, registry = world
    first, second = list(registry.digests)[:2]
    room, limits = Room(slots=1, disk_share=1), replace(tiers.LIMITS, slots=1, patience_s=0.0)

    async def body() -> tuple[Note, Note]:
        async with open_endpoint(tmp_path, base, registry, room, limits, "float32") as endpoint:
            notes = Note(0.0), Note(0.0)

            async def ask(alias: str, note: Note) -> None:
                async with endpoint.lease(alias, note):
                    pass

            async with endpoint.lease(first, Note(0.0)):
                waiting = asyncio.create_task(ask(second, notes[0]))
                await until(endpoint.engine._slots.waiting)
                late = asyncio.create_task(ask(first, notes[1]))
                await until(lambda: notes[1].tier)
            await asyncio.gather(waiting, late)
            return notes

    second_note, late_note = asyncio.run(body())
    assert (second_note.closed, second_note.tier) == (False, "registry")
    assert (late_note.closed, late_note.tier) == (True, "memory")


def test_each_version_has_a_token_of_its_own(world) -> None:
    """Two thousand tokens are distinct and can be forced; more than the vocabulary has cannot."""
    base, registry = world
    adapters = ManyAdapters(base, open_base(base).digest)
    assert len(set(adapters.tokens(2000))) == 2000
    assert len(set(registry.token_of.values())) == len(registry.digests) == 30
    with pytest.raises(ValueError, match="4096 tokens can be forced, 5000 are needed"):
        adapters.tokens(5000)


def test_the_gate_is_in_the_exit_status(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """A bound of nothing fails the run: its document has the error and no figures."""
    monkeypatch.setattr(tiers, "bound", lambda *_: 1e-9)
    given = ["--tiny", "--adapters", "12", "--requests", "16", "--fill", "1", "--json"]
    assert tiers.main(given) == GATE_FAILED
    found = json.loads(capsys.readouterr().out)
    assert "of its bound" in found["error"]
    assert "scenes" not in found
