"""Reports to the coordinator: nothing lost, nothing counted twice, nobody waits, no text leaves."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from patience import PATIENCE_S

from fedllm.clock import FakeClock
from fedllm.errors import ConfigError, NotFound
from fedllm.ids import Digest
from fedllm.registry.observed import MAX_OBSERVATIONS, Observation, Report
from fedllm.rng import SeededRng
from fedllm.server.observations import MAX_BODY_BYTES, read_report
from fedllm.serving.records import RequestRecord
from fedllm.serving.report import MAX_WAITING, WINDOW_S, Reporter

ONE, TWO = Digest("01" * 32), Digest("02" * 32)
RECORD = RequestRecord(
    id="chatcmpl-SECRETID", tenant="secret-tenant", key="secret-key", route="/v1/chat/completions", alias="acme/tools",
    version=ONE, status=200, prompt_tokens=5, completion_tokens=7, cached_tokens=0, started=1.0, ttft_s=0.1,
    seconds=0.5, replica="secret-replica", trace="ab" * 16,
)  # fmt: skip


class Coordinator:
    """Takes reports as the real one reads them, and answers as the test says."""

    def __init__(self) -> None:
        self.status = 200
        self.lose_answers = False
        self.bodies: list[bytes] = []
        self.tokens: list[str] = []
        self.taken: dict[tuple[str, int], Report] = {}
        self.posts = 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        """Answer one post."""
        self.posts += 1
        self.bodies.append(request.content)
        self.tokens.append(request.headers["authorization"])
        assert (request.method, request.url.path) == ("POST", "/v1/observations")
        assert len(request.content) <= MAX_BODY_BYTES
        if self.status == 200:
            report = read_report(request.content)
            self.taken.setdefault((report.run, report.sequence), report)
            if self.lose_answers:
                raise httpx.ReadTimeout("lost", request=request)
            return httpx.Response(200, json={"new": True})
        if self.status == 0:
            raise httpx.ConnectError("refused", request=request)
        return httpx.Response(self.status, json={})

    @property
    def observations(self) -> list[Observation]:
        """Everything that was taken in."""
        return [seen for report in self.taken.values() for seen in report.observations]

    def total(self, name: str) -> int:
        """Return a count over everything."""
        return sum(getattr(seen, name) for seen in self.observations)


class Scene:
    """A reporter before a coordinator, on a clock that moves when something sleeps."""

    def __init__(self, folder: Path, *, clock: FakeClock | None = None, seed: int = 1) -> None:
        self.clock = clock or FakeClock()
        self.coordinator = Coordinator()
        self.token = folder / "observer.token"
        self.token.write_text("of-the-observer\n", encoding="utf-8")
        client = httpx.AsyncClient(transport=httpx.MockTransport(self.coordinator), base_url="http://test")
        self.reporter = Reporter("http://test", self.token, "north", self.clock, SeededRng(seed), client=client)

    async def until(self, done: Callable[[], bool]) -> None:
        """Run the reporter until something is so."""
        running = asyncio.create_task(self.reporter.run())
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not done():
                    assert not running.done()
                    await asyncio.sleep(0)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


def run(body: Any) -> None:
    """Drive a coroutine."""
    asyncio.run(body)


def test_a_window_is_one_report_with_what_happened_in_it(tmp_path: Path) -> None:
    """Known answer: counts by status class, tokens, the histogram, ratings; half a minute of the clock."""

    async def body() -> None:
        scene = Scene(tmp_path)
        began = scene.clock.now()
        for status in (200, 200, 499, 400, 503):
            scene.reporter.observe(replace(RECORD, status=status, ttft_s=0.1 if status == 200 else None))
        scene.reporter.observe(replace(RECORD, version=TWO, alias="acme/other@v2"))
        scene.reporter.note_feedback(ONE, "acme/tools", True)
        await scene.until(lambda: bool(scene.coordinator.taken))
        one, two = scene.coordinator.observations
        assert (one.version, one.alias, one.requests, one.errors_4xx, one.errors_5xx) == (ONE, "acme/tools", 5, 2, 1)
        assert (one.prompt_tokens, one.completion_tokens, sum(one.ttft), one.up, one.down) == (25, 35, 2, 1, 0)
        assert (one.start, one.end) == (began, began + WINDOW_S)
        assert (two.version, two.alias, two.requests) == (TWO, "acme/other", 1)
        assert scene.coordinator.tokens == ["Bearer of-the-observer"]
        assert next(iter(scene.coordinator.taken.values())).endpoint == "north"

    run(body())


def test_nothing_of_a_tenant_leaves(tmp_path: Path) -> None:
    """A report's bytes hold no tenant's name, no key's, no id, no trace: only the fields of an observation."""

    async def body() -> None:
        scene = Scene(tmp_path)
        scene.reporter.observe(RECORD)
        await scene.until(lambda: bool(scene.coordinator.bodies))
        (sent,) = scene.coordinator.bodies
        for secret in (b"secret", b"SECRET", b"ab" * 16, b"chatcmpl", b"completions"):
            assert secret not in sent
        assert set(json.loads(sent)) == {"endpoint", "run", "sequence", "observations"}

    run(body())


@pytest.mark.parametrize(
    "odd",
    [{"version": None}, {"alias": ""}, {"alias": "base"}, {"alias": "no-alias"}, {"alias": "Bad/Name"}],
    ids=str,
)
def test_what_belongs_to_no_version_is_not_reported(tmp_path: Path, odd: dict[str, Any]) -> None:
    """The base, requests that were bound to nothing, and names that are none: no report, and no error."""

    async def body() -> None:
        scene = Scene(tmp_path)
        scene.reporter.observe(replace(RECORD, **odd))
        await scene.reporter.aclose()
        assert scene.coordinator.posts == 0

    run(body())


def test_an_idle_endpoint_posts_nothing(tmp_path: Path) -> None:
    """Windows without a request are no reports."""

    async def body() -> None:
        scene = Scene(tmp_path)
        began = scene.clock.now()
        await scene.until(lambda: scene.clock.now() > began + 10 * WINDOW_S)
        assert scene.coordinator.posts == 0

    run(body())


def test_a_lost_answer_is_no_second_count(tmp_path: Path) -> None:
    """The coordinator took it in, its answer was lost: the same number comes again with the same content."""

    async def body() -> None:
        scene = Scene(tmp_path)
        scene.coordinator.lose_answers = True
        scene.reporter.observe(RECORD)
        await scene.until(lambda: scene.coordinator.posts >= 3)
        scene.reporter.observe(RECORD)
        scene.coordinator.lose_answers = False
        await scene.until(lambda: len(scene.coordinator.taken) == 2)
        assert len(set(scene.coordinator.bodies)) == 2
        assert scene.coordinator.total("requests") == 2

    run(body())


@given(outages=st.lists(st.sampled_from([0, 200, 401, 500, 503, 429, 302]), max_size=6), steps=st.integers(1, 40))
def test_nothing_is_lost_in_outages(tmp_path_factory: pytest.TempPathFactory, outages: list[int], steps: int) -> None:
    """Against counting everything: whatever the coordinator answers meanwhile, in the end it has every request once."""

    async def body() -> None:
        scene = Scene(tmp_path_factory.mktemp("o"))
        sent = 0
        for status in [*outages, 200]:
            scene.coordinator.status = status
            posts = scene.coordinator.posts
            for _ in range(steps):
                scene.reporter.observe(RECORD)
                scene.clock.advance(WINDOW_S / 3)
                sent += 1
            await scene.until(lambda p=posts: scene.coordinator.posts > p)  # type: ignore[misc]
        await scene.reporter.aclose()
        assert scene.coordinator.total("requests") == sent
        assert scene.reporter.lost == 0

    run(body())


def test_a_day_away_loses_nothing_and_fills_no_memory(tmp_path: Path) -> None:
    """Without the coordinator a bounded number of windows waits, the one after them grows; all is posted at the end."""

    async def body() -> None:
        scene = Scene(tmp_path)
        for _ in range(2880):
            scene.reporter.observe(RECORD)
            scene.clock.advance(WINDOW_S)
        assert len(scene.reporter._waiting) == MAX_WAITING
        assert len(scene.reporter._cells) == 1
        await scene.reporter.aclose()
        assert scene.coordinator.total("requests") == 2880
        lengths = [seen.end - seen.start for seen in scene.coordinator.observations]
        assert lengths[:-1] == [WINDOW_S] * MAX_WAITING
        assert lengths[-1] == (2880 - MAX_WAITING) * WINDOW_S

    run(body())


def test_more_versions_than_a_report_holds(tmp_path: Path) -> None:
    """The window is closed early; only when windows wait already is a request not counted, and said to be lost."""

    async def body() -> None:
        scene = Scene(tmp_path)
        for n in range((MAX_WAITING + 1) * MAX_OBSERVATIONS + 5):
            scene.reporter.observe(replace(RECORD, alias=f"acme/{n:06d}" + "x" * 50))
        assert scene.reporter.lost == 5
        await scene.until(lambda: len(scene.coordinator.taken) == MAX_WAITING + 1)
        assert scene.coordinator.total("requests") == (MAX_WAITING + 1) * MAX_OBSERVATIONS

    run(body())


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_what_is_refused_for_good_is_not_sent_again(tmp_path: Path, status: int) -> None:
    """It is counted as lost, and the next window is posted."""

    async def body() -> None:
        scene = Scene(tmp_path)
        scene.coordinator.status = status
        scene.reporter.observe(RECORD)
        await scene.until(lambda: scene.coordinator.posts == 1 and not scene.reporter._waiting)
        assert scene.reporter.lost == 1
        scene.coordinator.status = 200
        scene.reporter.observe(RECORD)
        await scene.until(lambda: bool(scene.coordinator.taken))
        assert scene.coordinator.posts == 2

    run(body())


def test_pauses_grow_and_differ_between_endpoints(tmp_path: Path) -> None:
    """Twenty failed posts span many minutes of the clock, and two endpoints do not post at the same moments."""

    async def one(seed: int) -> list[float]:
        scene = Scene(tmp_path, seed=seed)
        scene.coordinator.status = 0
        times: list[float] = []
        scene.reporter.observe(RECORD)

        def noted() -> bool:
            if scene.coordinator.posts > len(times):
                times.append(scene.clock.monotonic())
            return len(times) >= 20

        await scene.until(noted)
        return times

    async def body() -> None:
        first, second = await one(1), await one(2)
        pauses = [b - a for a, b in itertools.pairwise(first)]
        assert pauses[0] <= 2.0
        assert all(60.0 <= pause <= 120.0 for pause in pauses[-5:])
        assert first != second

    run(body())


def test_a_changed_rating_takes_the_first_one_back(tmp_path: Path) -> None:
    """Over all windows the answer counts once, as it was rated last; the coordinator reads the correction."""

    async def body() -> None:
        scene = Scene(tmp_path)
        scene.reporter.note_feedback(ONE, "acme/tools", True)
        await scene.until(lambda: bool(scene.coordinator.taken))
        scene.reporter.note_feedback(ONE, "acme/tools", False, changed=True)
        await scene.until(lambda: len(scene.coordinator.taken) == 2)
        assert (scene.coordinator.total("up"), scene.coordinator.total("down")) == (0, 1)

    run(body())


def test_the_token_is_read_again(tmp_path: Path) -> None:
    """A token that was changed at the coordinator is taken up without a restart; one that is gone is waited for."""

    async def body() -> None:
        scene = Scene(tmp_path)
        scene.coordinator.status = 401
        scene.reporter.observe(RECORD)
        await scene.until(lambda: scene.coordinator.posts == 2)
        scene.token.unlink()
        began = scene.clock.now()
        await scene.until(lambda: scene.clock.now() > began + 300.0)
        assert scene.coordinator.posts == 2
        scene.coordinator.status = 200
        scene.token.write_text("new-token", encoding="utf-8")
        await scene.until(lambda: bool(scene.coordinator.taken))
        assert scene.coordinator.tokens[-1] == "Bearer new-token"

    run(body())


def test_a_clock_that_is_set_back_breaks_no_window(tmp_path: Path) -> None:
    """Windows follow the monotonic clock; a window never ends before it began."""

    class SetBack(FakeClock):
        back_s = 0.0

        def now(self) -> float:
            return super().now() - self.back_s

    async def body() -> None:
        clock = SetBack()
        scene = Scene(tmp_path, clock=clock)
        scene.reporter.observe(RECORD)
        clock.back_s = 3600.0
        await scene.until(lambda: bool(scene.coordinator.taken))
        (seen,) = scene.coordinator.observations
        assert seen.end == seen.start

    run(body())


def test_two_runs_of_one_endpoint_are_told_apart(tmp_path: Path) -> None:
    """A process that starts again numbers its reports from 1 again, and none is taken for an old one."""

    async def body() -> None:
        scenes = [Scene(tmp_path, seed=seed) for seed in (1, 2)]
        runs = set()
        for scene in scenes:
            scene.reporter.observe(RECORD)
            await scene.reporter.aclose()
            runs |= set(scene.coordinator.taken)
        assert [sequence for _, sequence in runs] == [1, 1]
        assert len(runs) == 2

    run(body())


def test_a_reporter_without_a_token_does_not_start(tmp_path: Path) -> None:
    """A missing or empty file, or a name that is none, is said when the endpoint starts."""
    clock, rng = FakeClock(), SeededRng(1)
    with pytest.raises(NotFound, match="observer"):
        Reporter("http://test", tmp_path / "none", "north", clock, rng)
    empty = tmp_path / "empty"
    empty.write_text("\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="no token"):
        Reporter("http://test", empty, "north", clock, rng)
    empty.write_text("t", encoding="utf-8")
    with pytest.raises(ConfigError, match="endpoint"):
        Reporter("http://test", empty, "North Pole", clock, rng)
