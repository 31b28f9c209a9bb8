"""The loop with real processes: private data in, served tokens out; and what happens when one of them dies."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import httpx
import openai
import pytest
from e2e import federation as fed

from fedllm.demo.cluster import Cluster, command
from fedllm.demo.recipe import ALIAS


def run(coroutine: object, within_s: float) -> None:
    """Run a coroutine with a time limit, so that a hang is a failure."""

    async def limited() -> None:
        await asyncio.wait_for(coroutine, within_s)  # type: ignore[arg-type]

    asyncio.run(limited())


@pytest.mark.timeout(240)
def test_deaths_and_restarts(tiny_base: Path, owners_data: dict[str, Path]) -> None:
    """Every kind of process may die: the round goes on with three, resumes, or ends; the endpoint serves on.

    A daemon killed in mid-round leaves a round of three; a killed coordinator ends its round by itself when it is
    back; a restarted endpoint serves the last version again; and after a stop nothing is left running.
    """

    async def story() -> None:
        async with fed.running(tiny_base, owners_data, transport="local", local_steps=6, noise_multiplier=2.0) as (
            cluster,
            control,
        ):
            await fed.ask_for(control, 1)
            first = (await fed.until(control, fed.ended(1), 60))[0]
            assert (first["state"], first["survivors"], first["promoted"]) == ("JUDGED", 4, True)
            assert first["secagg"] is True
            await _wait_served(cluster, first["version"])

            await fed.ask_for(control, 1)
            await fed.until(control, fed.in_state(2, "TRAINING"), 30)
            fed.kill(cluster, "west")
            second = (await fed.until(control, fed.ended(2), 90))[1]
            assert (second["state"], second["survivors"]) == ("JUDGED", 3)
            cluster.start_process("west", "client", "start", "--home", str(cluster.owner_home("west")))

            await fed.ask_for(control, 1)
            await fed.until(control, fed.in_state(3, "TRAINING", "SHARES", "MASKED"), 60)
            fed.kill(cluster, "coordinator")
            cluster.start_process("coordinator", "coordinator", "start", "--home", str(cluster.home))
            third = (await fed.until(control, fed.ended(3), 90))[2]
            assert third["state"] == "JUDGED" or third["reason"]
            live = [r for r in await fed.rounds_of(control) if r["promoted"]][-1]["version"]

            fed.kill(cluster, "endpoint")
            del cluster.processes["endpoint"]
            cluster.start_process("endpoint", *cluster.endpoint_arguments())
            await _wait_served(cluster, live)
            for owner in fed.OWNERS:
                command("privacy", "verify", "--home", cluster.owner_home(owner))
                spent = json.loads(command("privacy", "show", "--home", cluster.owner_home(owner), "--json"))
                assert spent["reservations"] >= 2
                assert spent["epsilon"] > 0
            root = cluster.root
        assert fed.live_processes(root) == []

    run(story(), 230)


@pytest.mark.flower
@pytest.mark.timeout(420)
def test_the_loop_over_flower(tiny_base: Path, owners_data: dict[str, Path]) -> None:
    """Real SuperLink and SuperNodes: a round of masked sums becomes a version that the official client reads.

    The coordinator, killed between two phases, goes on with the same round when it is started again.
    """

    async def story() -> None:
        async with fed.running(tiny_base, owners_data, transport="flower") as (cluster, control):
            url = f"{cluster.endpoint}/v1"
            await fed.ask_for(control, 1)
            await fed.until(control, fed.in_state(1, "SHARES", "MASKED", "CONFIRM"), 120)
            fed.kill(cluster, "coordinator")
            cluster.start_process("coordinator", "coordinator", "start", "--home", str(cluster.home))
            first = (await fed.until(control, fed.ended(1), 240))[0]
            assert (first["state"], first["promoted"]) == ("JUDGED", True), first["reason"]
            assert first["survivors"] >= 3
            await _wait_served(cluster, first["version"])
            async with openai.AsyncOpenAI(base_url=url, api_key=cluster.tenant_key) as client:
                answer = await client.chat.completions.create(
                    model=ALIAS,
                    messages=[{"role": "user", "content": "please open the door"}],
                    max_tokens=4,
                    temperature=0,
                )
                assert answer.system_fingerprint == first["version"]
                stream = await client.chat.completions.create(
                    model=ALIAS, messages=[{"role": "user", "content": "close it"}], max_tokens=4, stream=True
                )
                assert {chunk.system_fingerprint async for chunk in stream} == {first["version"]}

    run(story(), 410)


async def _wait_served(cluster: Cluster, digest: str) -> None:
    for _ in range(600):
        try:
            aliases = (await fed.health(cluster))["aliases"]
        except httpx.HTTPError:  # it is being restarted
            aliases = {}
        if digest in {a["digest"] for a in aliases.values()}:
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"version {digest[:12]} is not served")
