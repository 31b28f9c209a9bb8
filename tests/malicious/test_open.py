"""Attacks that nothing stands against yet: each test says what an owner should answer, and fails until it does.

A test that begins to pass fails as well (strict): its row then belongs into the tables.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from malicious.scene import EAST, NORTH, OWNERS, SOUTH, WEST, Scene, again, verdict
from unit.client.owner_fakes import HEAD, SPEC, sealed

from fedllm.adapter import AdapterState
from fedllm.client.pipeline import score_codec
from fedllm.messages.round import Confirm, FetchScores
from fedllm.rng import SeededRng

REST = (EAST, NORTH, SOUTH)


async def scores_again(at: Scene) -> Any:
    """Plan an attempt without west, and open its score sum; what the owners say if they refuse."""
    said = await at.retry(again(REST))
    if set(said.values()) != {"Advertised"}:
        return said
    await at.mask()
    answers = await at.each(FetchScores())
    at.vectors["evaluation"] = {owner: (answer.vector, at.parts[owner]) for owner, answer in answers.items()}
    return score_codec(at.plan).decode(await at.open(purpose="evaluation"), len(REST))


@pytest.mark.xfail(strict=True, reason="an attempt is refused after the update was opened, not after the scores were")
@pytest.mark.parametrize("restarted", [False, True], ids=["same processes", "restarted"])
def test_an_owner_whose_scores_were_opened_takes_part_in_no_further_attempt(tmp_path: Path, restarted: bool) -> None:
    """Open the scores of all before the update, claim failure, open the scores without west: west's loss remains."""

    async def scenario() -> Any:
        at = Scene(tmp_path)
        await at.evaluate(dict.fromkeys(OWNERS, HEAD))
        await at.open(purpose="evaluation", subject=bytes.fromhex(HEAD.digest))
        if restarted:
            at.restart()
        return await at.retry(again(REST))

    assert set(asyncio.run(scenario()).values()) == {"already-unmasked"}


def test_what_that_costs_is_one_owners_held_out_loss(tmp_path: Path) -> None:
    """Four owners' sum less three owners' sum is west's loss on its held-out records, and their number."""

    async def scenario() -> tuple[Any, Any, Any]:
        at = Scene(tmp_path)
        await at.evaluate(dict.fromkeys(OWNERS, HEAD))
        opened = await at.open(purpose="evaluation", subject=bytes.fromhex(HEAD.digest))
        everybody = score_codec(at.plan).decode(opened, len(OWNERS))
        return everybody, await scores_again(at), at.trainers[WEST].score(HEAD)

    everybody, rest, scores = asyncio.run(scenario())
    assert not isinstance(rest, dict), "refused now: this belongs to the other harm, with the new check taken out"
    assert everybody.records - rest.records == scores.records
    assert abs(4 * everybody.candidate_loss - 3 * rest.candidate_loss - scores.mean_loss) < 1e-5


@pytest.mark.xfail(strict=True, reason="a new attempt keeps the scores of the candidate, and forgets to bind it")
def test_candidates_of_their_own_do_not_open_in_a_further_attempt_either(tmp_path: Path) -> None:
    """Every owner scores another adapter in the first attempt; in the second, what it scored is under no signature."""

    async def scenario() -> Any:
        at = Scene(tmp_path)
        await at.evaluate({owner: AdapterState.initial(SPEC, SeededRng(owner)) for owner in OWNERS})
        return await scores_again(at)

    assert isinstance(asyncio.run(scenario()), dict), "the sum of scores of different adapters was opened"


@pytest.mark.xfail(strict=True, reason="an envelope names its round and not its attempt, and old answers are forgotten")
def test_a_message_of_the_attempt_before_is_not_taken_for_one_of_this(tmp_path: Path) -> None:
    """A carrier plays back the first attempt's survivors in the second: they are signed, and the true ones refused."""

    async def scenario() -> list[str]:
        at = Scene(tmp_path)
        await at.mask()
        recorded = sealed(Confirm("update", OWNERS), EAST)
        await at.deliver(EAST, recorded)
        await at.retry(again())
        await at.mask()
        replayed = verdict((await at.deliver(EAST, recorded))[0])
        return [replayed, await at.verdict(EAST, Confirm("update", REST))]

    assert asyncio.run(scenario()) == ["step-mismatch", "Confirmed"]
