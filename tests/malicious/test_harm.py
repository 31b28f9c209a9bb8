"""What an attacker would read if a check were missing: the victim's exact numbers, mostly by subtraction.

The owners' updates lie on the ring's grid here, so that rounding does not hide whether the difference is exact.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from malicious.attacks_keys import UNSIGNED, made_up
from malicious.attacks_retry import SCORED, SPENT
from malicious.attacks_sum import ONCE
from malicious.removals import Removal, cut
from malicious.scene import EAST, EXACT, IDENTITIES, NORTH, OWNERS, SOUTH, WEST, Scene, again, plan
from unit.client.owner_fakes import HEAD, SPEC

from fedllm.adapter import AdapterState
from fedllm.aggregation.secagg import keys, shamir
from fedllm.aggregation.secagg.masking import Mask, add_masks, add_packed, reduce_ring
from fedllm.aggregation.secagg.owner import SecAggOwner
from fedllm.client.pipeline import OwnerSums, score_codec, update_codec
from fedllm.messages.envelope import COORDINATOR
from fedllm.messages.round import FetchScores, SendMasked
from fedllm.messages.secagg import ShareDelivery
from fedllm.rng import SeededRng

TWO_VIEWS: tuple[Removal, ...] = (
    *ONCE,
    cut(SecAggOwner._check_request, "self._steps.asked"),
    cut(OwnerSums.unmask, "machine.close()"),
)
"""All that keeps a coordinator from two survivor sets: one answer to a step, on disk too, shares for the signed set
alone, and secrets that are gone once a sum is open."""
REST = (EAST, NORTH, SOUTH)


def test_two_views_of_the_survivors_give_away_the_victims_vector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Open the sum of all and, from the same vectors, the sum without west: the difference is what west masked."""
    for remove in TWO_VIEWS:
        remove(monkeypatch)

    async def scenario() -> tuple[Any, Any]:
        at = Scene(tmp_path)
        everybody = await at.open()
        rest = await at.open(REST)
        return reduce_ring(everybody - rest, at.plan.ring.bits), at.secret[WEST][0]

    read, masked = asyncio.run(scenario())
    assert np.array_equal(read, masked)
    assert len(set(masked.tolist())) > 10, "there was something to read"


def test_with_its_checks_the_second_view_ends_before_anything_is_signed(tmp_path: Path) -> None:
    """The same coordinator, and the owners as they are: nobody signs, and there is nothing to subtract."""

    async def scenario() -> None:
        at = Scene(tmp_path)
        await at.open()
        await at.open(REST)

    with pytest.raises(AttributeError, match="'Refused' object has no attribute 'signature'"):
        asyncio.run(scenario())


def test_a_failure_that_is_only_claimed_gives_away_the_victims_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Open the sum, say that it failed, open it again without west: the difference is west's update, exactly."""
    for remove in SPENT:
        remove(monkeypatch)

    async def scenario() -> tuple[Any, Any]:
        at = Scene(tmp_path)
        await at.begin(plan(ring=EXACT))
        everybody = update_codec(at.plan).decode(await at.open(), len(OWNERS)).update
        assert set((await at.retry(again(REST, ring=EXACT))).values()) == {"Advertised"}
        rest = update_codec(at.plan).decode(await at.open(), len(REST)).update
        return everybody - rest, at.trainers[WEST].update

    read, update = asyncio.run(scenario())
    assert np.array_equal(read, update)
    assert np.unique(update).size > 10, "there was something to read"


async def scores_again(at: Scene) -> Any:
    """Plan an attempt without west, and open its score sum, of the candidate that was scored before."""
    assert set((await at.retry(again(REST))).values()) == {"Advertised"}
    await at.mask()
    answers = await at.each(FetchScores())
    at.vectors["evaluation"] = {owner: (answer.vector, at.parts[owner]) for owner, answer in answers.items()}
    return score_codec(at.plan).decode(await at.open(purpose="evaluation"), len(REST))


def test_a_failure_that_is_claimed_of_the_scores_gives_away_the_victims_held_out_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Open the scores of all before the update, claim failure, open them without west: west's loss remains."""
    for remove in (*SPENT, SCORED):
        remove(monkeypatch)

    async def scenario() -> tuple[Any, Any, Any]:
        at = Scene(tmp_path)
        await at.evaluate(dict.fromkeys(OWNERS, HEAD))
        opened = await at.open(purpose="evaluation", subject=bytes.fromhex(HEAD.digest))
        everybody = score_codec(at.plan).decode(opened, len(OWNERS))
        return everybody, await scores_again(at), at.trainers[WEST].score(HEAD)

    everybody, rest, scores = asyncio.run(scenario())
    assert everybody.records - rest.records == scores.records
    assert abs(4 * everybody.candidate_loss - 3 * rest.candidate_loss - scores.mean_loss) < 1e-5


def test_an_attempt_after_a_candidate_opens_scores_of_different_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every owner scores another adapter in the first attempt; in the second, what it scored is under no signature."""
    SCORED(monkeypatch)

    async def scenario() -> tuple[Any, Any]:
        at = Scene(tmp_path)
        probes = {owner: AdapterState.initial(SPEC, SeededRng(owner)) for owner in OWNERS}
        await at.evaluate(probes)
        return await scores_again(at), [at.trainers[owner].score(probes[owner]) for owner in REST]

    rest, scores = asyncio.run(scenario())
    assert abs(rest.candidate_loss - sum(s.mean_loss for s in scores) / 3) < 1e-5


def test_a_man_in_the_middle_of_the_keys_reads_the_victims_vector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signatures of keys off: the attacker stands in for all peers, opens what was dealt to them, and unmasks alone."""
    UNSIGNED(monkeypatch)

    async def scenario() -> tuple[Any, Any]:
        at = Scene(tmp_path)
        await at.begin()
        ctx = keys.context(at.plan, "update")
        listed = {WEST: at.keys["update"][WEST]} | {o: made_up(at, o, IDENTITIES[COORDINATOR]) for o in REST}
        v1 = keys.transcript(ctx, tuple(listed.values()))
        dealt: Any = await at.ask(WEST, at.key_list(update=listed.values()))
        mine = {o: [keys.KeyPair.generate(SeededRng(f"{o}{i}")) for i in range(2)] for o in REST}
        points = {owner: place for place, owner in enumerate(OWNERS, 1)}
        shares: dict[str, dict[int, int]] = {"seed": {}, "key": {}}
        sealed = {}
        for owner, (cipher, _) in mine.items():
            secret = cipher.exchange(listed[WEST].cipher_key)
            pair = keys.open_shares(
                dealt.update.ciphertexts[owner], keys.sealing_key(secret, ctx, v1, WEST, owner), ctx, v1, WEST, owner
            )
            for kind, found in shares.items():
                found[points[owner]] = shamir.share_from_bytes(bytes(getattr(pair, kind)))
            back = keys.SharePair(bytearray(33), bytearray(33))
            to_west = keys.sealing_key(secret, ctx, v1, owner, WEST)
            sealed[owner] = keys.seal_shares(back, to_west, ctx, v1, owner, WEST, SeededRng(owner))
        masked: Any = await at.ask(
            WEST, SendMasked(ShareDelivery("update", OWNERS, sealed), ShareDelivery("evaluation", OWNERS, {}))
        )
        seed, private = shamir.combine(shares["seed"]), shamir.combine(shares["key"])
        pair = keys.KeyPair(bytearray(private))
        masks: list[Mask] = [(keys.self_mask_key(seed, ctx, v1, WEST), -1)]
        masks += [(keys.pair_mask_key(pair, listed[o].mask_key, ctx, v1, WEST, o), 1) for o in REST]
        total = np.zeros(masked.vector.entries, np.uint32)
        add_packed(total, at.parts[WEST], masked.vector.entry_bytes)
        add_masks(total, masks)
        return reduce_ring(total, at.plan.ring.bits), at.secret[WEST][0]

    read, masked = asyncio.run(scenario())
    assert np.array_equal(read, masked)
