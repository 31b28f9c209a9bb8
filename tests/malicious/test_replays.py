"""A request that comes again, byte for byte: the same answer, and no work a second time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from malicious.removals import cut, replaced
from malicious.scene import EAST, NORTH, OWNERS, SOUTH, Scene, again, begin, plan, verdict
from unit.client.owner_fakes import HEAD, sealed

from fedllm.client.daemon import Daemon
from fedllm.client.outbox import Outbox
from fedllm.client.policy import check_plan
from fedllm.messages.round import Body, Confirm, Evaluate, FetchScores

NO_MEMORY = replaced(Outbox, "again", lambda _self, _request: None)
"""The daemon remembers no answer."""
Work = tuple[list[int], int, int]
"""Rounds trained, updates masked, adapters scored."""


def work(at: Scene) -> Work:
    """Return what an owner has done."""
    trainer = at.trainers[EAST]
    return list(trainer.trained), len(at.secret[EAST]), trainer.scored


async def _scored(at: Scene) -> None:
    await at.evaluate(dict.fromkeys(OWNERS, HEAD))


async def _nothing(_at: Scene) -> None:
    return None


STEPS: dict[str, tuple[Callable[[Scene], Any], Callable[[Scene], Body], str]] = {
    "begin": (_nothing, lambda _at: begin(plan()), "Advertised"),
    "share": (Scene.begin, lambda at: at.key_list(), "SharedKeys"),
    "mask": (Scene.share, lambda at: at.send_masked(EAST), "Masked"),
    "confirm": (Scene.mask, lambda _at: Confirm("update", OWNERS), "Confirmed"),
    "unmask": (Scene.confirm, lambda at: at.request(), "Unmasked"),
    "evaluate": (Scene.mask, lambda _at: Evaluate(HEAD.to_bytes()), "Masked"),
    "scores": (_scored, lambda _at: FetchScores(), "Masked"),
}
"""Up to which step the round has come, what is asked, and the answer."""


async def twice(home: Path, step: str) -> tuple[list[str], bool, Work, Work]:
    """Deliver the same bytes twice; return the verdicts, whether the replies are the same bytes, and the work."""
    at = Scene(home)
    before, body, _ = STEPS[step]
    await before(at)
    data = sealed(body(at), EAST)
    first, reply = await at.deliver(EAST, data)
    done = work(at)
    second, again = await at.deliver(EAST, data)
    return [verdict(first), verdict(second)], reply == again, done, work(at)


@pytest.mark.parametrize("step", STEPS)
def test_the_same_request_gets_the_same_answer_and_no_second_work(tmp_path: Path, step: str) -> None:
    """Head and chunks are the bytes of the first time; nothing is trained, masked or scored again."""
    said, same, first, second = asyncio.run(twice(tmp_path, step))
    assert said == [STEPS[step][2]] * 2
    assert same
    assert first == second


@pytest.mark.parametrize(
    ("step", "answer"),
    [("share", "SharedKeys"), ("mask", "Masked"), ("confirm", "Confirmed"), ("unmask", "step-mismatch")],
)
def test_without_memory_each_step_still_answers_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, answer: str
) -> None:
    """The next line is the sum's own: the same shares, vector and signature; after unmask its secrets are gone."""
    NO_MEMORY(monkeypatch)
    said, same, first, second = asyncio.run(twice(tmp_path, step))
    assert said[1] == answer
    assert same == (answer != "step-mismatch")
    assert (first != second) == (step == "mask"), "without memory the vector is masked a second time, to the same bytes"


@pytest.mark.parametrize(
    ("removed", "answer", "trained"),
    [
        ((NO_MEMORY,), "Advertised", [1]),
        ((NO_MEMORY, cut(Daemon._begin, "self._round.begun == plan.digest")), "round-replayed", [1]),
        (
            (NO_MEMORY, cut(Daemon._begin, "self._round.begun == plan.digest"), cut(check_plan, "<= last_round")),
            "Advertised", [1, 1],
        ),
    ],
    ids=["no memory", "nor of the plan", "nor of the round"],
)  # fmt: skip
def test_three_lines_stand_between_a_repeated_plan_and_a_second_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: tuple[Any, ...], answer: str, trained: list[int]
) -> None:
    """The answer remembered, the plan under way, the round's number: without all three it trains again."""
    for remove in removed:
        remove(monkeypatch)
    said, _, _, (rounds, _, _) = asyncio.run(twice(tmp_path, "begin"))
    assert said == ["Advertised", answer]
    assert rounds == trained


def test_a_message_of_the_attempt_before_does_not_take_the_place_of_the_true_one(tmp_path: Path) -> None:
    """A carrier plays back the first attempt's survivors in the second: refused, and the true ones are signed."""

    async def scenario() -> list[str]:
        at = Scene(tmp_path)
        await at.mask()
        recorded = sealed(Confirm("update", OWNERS), EAST)
        await at.deliver(EAST, recorded)
        await at.retry(again())
        await at.mask()
        replayed = verdict((await at.deliver(EAST, recorded))[0])
        return [replayed, await at.verdict(EAST, Confirm("update", (EAST, NORTH, SOUTH)))]

    assert asyncio.run(scenario()) == ["request-reused", "Confirmed"]
