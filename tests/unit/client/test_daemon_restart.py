"""A daemon that restarts in mid-round is a dropout of that round, and one charge buys one training."""

from __future__ import annotations

import asyncio
from pathlib import Path

from unit.client.owner_fakes import begin, daemon, opened, plan, sealed

from fedllm.ids import RoundNumber
from fedllm.messages.round import Body, Close, Closed, FetchAdvertise, Refused, Started


def test_a_replayed_begin_is_refused_after_a_restart(tmp_path: Path) -> None:
    """The last round accepted is on disk: a daemon that restarts in mid-round is a dropout of it, not a fresh start."""

    async def scenario() -> list[Body]:
        request = sealed(begin(plan()), "north")
        before = daemon("north", tmp_path)
        await before.handle(request)
        after = daemon("north", tmp_path)
        replies = [await after.handle(d) for d in (request, sealed(FetchAdvertise(), "north"))]
        replies.append(await after.handle(sealed(Close("aborted", None), "north")))
        replies.append(await after.handle(sealed(begin(plan(round=RoundNumber(2))), "north", round_number=2)))
        return [opened(r, "north") for r in replies]

    replay, fetch, close, following = asyncio.run(scenario())
    assert isinstance(replay, Refused)
    assert replay.code == "step-mismatch"
    assert isinstance(fetch, Refused)
    assert isinstance(close, Closed)
    assert isinstance(following, Started)


def _lose_accepted(home: Path) -> None:
    (lost,) = home.rglob("accepted.json")
    lost.unlink()


def test_a_charged_round_is_never_trained_twice_on_one_charge(tmp_path: Path) -> None:
    """If a power cut undid the record of accepted rounds, the ledger still knows which rounds were charged."""

    async def scenario() -> list[Body]:
        request = sealed(begin(plan()), "north")
        first = await daemon("north", tmp_path).handle(request)
        _lose_accepted(tmp_path)
        again = await daemon("north", tmp_path).handle(request)
        return [opened(r, "north") for r in (first, again)]

    first, again = asyncio.run(scenario())
    assert isinstance(first, Started)
    assert isinstance(again, Refused)
    assert again.code == "step-mismatch"
