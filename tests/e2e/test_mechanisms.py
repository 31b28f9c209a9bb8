"""Other mechanisms than DP-SGD, end to end: real processes, real masks, and what the owners' ledgers say."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from e2e import federation as fed

from fedllm.demo.cluster import Cluster, command


def spent(cluster: Cluster, owner: str) -> dict[str, Any]:
    """Return what an owner's ledger says, verified first."""
    home = cluster.owner_home(owner)
    command("privacy", "verify", "--home", home)
    found: dict[str, Any] = json.loads(command("privacy", "show", "--home", home, "--json"))
    return found


@pytest.mark.timeout(200)
def test_owners_as_units_share_the_noise_of_a_sum(tiny_base: Path, owners_data: dict[str, Path]) -> None:
    """Two rounds with noise shares: judged, charged per owner, and priced with the four that were really in them."""
    keys = {
        "mechanism": "skellam", "acknowledge_noise": True, "noise_multiplier": 4.0, "clip_norm": 0.5,
        "optimizer": "adamw", "learning_rate": 0.01, "gate_margin": 30.0,
    }  # fmt: skip

    async def story() -> None:
        async with fed.running(tiny_base, owners_data, transport="local", limits={"unit": "owner"}, **keys) as (
            cluster,
            control,
        ):
            planned = json.loads(command("round", "plan", "--home", cluster.home, "--json"))["mechanism"]
            assert planned["noise_over_signal"] > 1
            await fed.ask_for(control, 2)
            for number in (1, 2):
                found = (await fed.until(control, fed.ended(number), 90))[number - 1]
                assert (found["state"], found["survivors"]) == ("JUDGED", 4), found["reason"]
                assert found["saturated"] is None
            for owner in fed.OWNERS:
                ledger = spent(cluster, owner)
                assert (ledger["unit"], ledger["relation"]) == ("owner", "zero-out-one")
                assert 0 < ledger["epsilon"] < 2 * planned["epsilon"]
                # 3 of 4 honest owners' noise were in each sum and 2 are counted on in the plan
                assert ledger["epsilon"] < ledger["limit"]

    asyncio.run(asyncio.wait_for(story(), 190))


@pytest.mark.timeout(200)
def test_a_stream_is_charged_once_and_ends_when_its_steps_are_used(
    tiny_base: Path, owners_data: dict[str, Path]
) -> None:
    """Two rounds of two steps use up a stream of four: the third round is refused, and epsilon stays what it was."""
    keys = {
        "mechanism": "dp-ftrl", "local_steps": 2, "stream_steps": 4, "stream_band": 2, "stream_separation": 4,
        "noise_multiplier": 2.0, "gate_margin": 30.0,
    }  # fmt: skip

    async def story() -> None:
        async with fed.running(tiny_base, owners_data, transport="local", **keys) as (cluster, control):
            await fed.ask_for(control, 1)
            first = (await fed.until(control, fed.ended(1), 90))[0]
            assert first["state"] == "JUDGED", first["reason"]
            before = {owner: spent(cluster, owner)["epsilon"] for owner in fed.OWNERS}
            await fed.ask_for(control, 2)
            rounds = await fed.until(control, fed.ended(3), 90)
            assert rounds[1]["state"] == "JUDGED", rounds[1]["reason"]
            assert (rounds[2]["state"], rounds[2]["code"]) == ("ABORTED", "policy-refused")
            assert {owner: spent(cluster, owner)["epsilon"] for owner in fed.OWNERS} == before

    asyncio.run(asyncio.wait_for(story(), 190))
