"""A daemon that restarts in mid-round is a dropout of that round, and one charge buys one training."""

from __future__ import annotations

import asyncio
from pathlib import Path

from unit.client.owner_fakes import Never, ToyTrainer, begin, daemon, opened, plan, sealed

from fedllm.ids import RoundNumber
from fedllm.messages.round import Advertised, Body, Close, Closed, FetchAdvertise, Refused


def test_a_daemon_killed_in_mid_training_is_out_of_the_round(tmp_path: Path) -> None:
    """The round was charged and accepted: it is not trained a second time, and the next one is a fresh start."""

    async def scenario() -> list[Body]:
        request = sealed(begin(plan()), "north")
        trainers = ToyTrainer(), ToyTrainer()
        before = daemon("north", tmp_path, trainer=trainers[0], worker=Never())
        await before.handle(request)
        assert before.round_number == 1
        never_trained = daemon("north", tmp_path, trainer=trainers[1])
        replies = [await never_trained.handle(d) for d in (request, sealed(FetchAdvertise(), "north"))]
        replies.append(await never_trained.handle(sealed(Close("aborted", None), "north")))
        replies.append(await never_trained.handle(sealed(begin(plan(round=RoundNumber(2))), "north", round_number=2)))
        assert trainers[1].trained == [2]
        return [opened(r, "north") for r in replies]

    replay, fetch, close, following = asyncio.run(scenario())
    assert isinstance(replay, Refused)
    assert replay.code == "round-replayed"
    assert isinstance(fetch, Refused)
    assert isinstance(close, Closed)
    assert isinstance(following, Advertised)


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
    assert isinstance(first, Advertised)
    assert isinstance(again, Refused)
    assert again.code == "round-replayed"
