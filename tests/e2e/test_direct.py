"""The loop over the direct transport: real processes, mutual TLS, no Flower; and what happens when one of them dies."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path

import httpx
import openai
import pytest
from e2e import federation as fed

from fedllm.client.sandbox import probe
from fedllm.demo.cluster import Cluster, command
from fedllm.demo.recipe import ALIAS
from fedllm.relay.tether import descendants

TRAINING = ("PLANNED", "TRAINING")
"""The states in which owners train: the plan is sent, or they are asked whether they have finished."""


@pytest.mark.timeout(300)
def test_the_loop_over_direct_survives_the_death_of_each_of_its_processes(
    tiny_base: Path, owners_data: dict[str, Path]
) -> None:
    """A dialler, a daemon and the coordinator are killed in the middle of three rounds.

    A dialler costs nothing: all four owners are in the sum. A daemon leaves a round of three. A coordinator goes on
    with the same round when it is back. Versions are served, and after a stop nothing is left running.
    """

    async def story() -> None:
        async with fed.running(tiny_base, owners_data, transport="direct", local_steps=6, noise_multiplier=2.0) as (
            cluster,
            control,
        ):
            await fed.ask_for(control, 1)
            await fed.until(control, fed.in_state(1, *TRAINING), 60)
            north = _dialler(cluster, "north")
            _check_confined(cluster, "north", north)
            os.kill(north, signal.SIGKILL)
            first = (await fed.until(control, fed.ended(1), 90))[0]
            assert (first["state"], first["survivors"], first["promoted"]) == ("JUDGED", 4, True), first["reason"]
            assert first["secagg"] is True
            assert _dialler(cluster, "north") != north
            await _wait_served(cluster, first["version"])
            await _tokens(cluster, first["version"])

            await fed.ask_for(control, 1)
            await fed.until(control, fed.in_state(2, *TRAINING), 30)
            fed.kill(cluster, "west")
            second = (await fed.until(control, fed.ended(2), 90))[1]
            assert (second["state"], second["survivors"]) == ("JUDGED", 3), second["reason"]
            cluster.start_process("west", "client", "start", "--home", str(cluster.owner_home("west")))

            await fed.ask_for(control, 1)
            await fed.until(control, fed.in_state(3, *TRAINING), 60)
            fed.kill(cluster, "coordinator")
            cluster.start_process("coordinator", "coordinator", "start", "--home", str(cluster.home))
            third = (await fed.until(control, fed.ended(3), 90))[2]
            assert third["state"] == "JUDGED", third["reason"]
            assert third["survivors"] >= 3
            for owner in fed.OWNERS:
                home = cluster.owner_home(owner)
                command("privacy", "verify", "--home", home)
                assert json.loads(command("privacy", "show", "--home", home, "--json"))["epsilon"] > 0
            root = cluster.root
        assert fed.live_processes(root) == []

    asyncio.run(asyncio.wait_for(story(), 290))


def _dialler(cluster: Cluster, owner: str) -> int:
    """Return the process id of an owner's dialling process."""
    leash = cluster.processes[owner].pid
    assert leash is not None
    found = []
    for pid in descendants(leash):
        command_line = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        # the leash above it has the same words in its command line, after its own
        if any(word.endswith(b"/dial.py") for word in command_line[:4]):
            found.append(pid)
    (pid,) = found
    return pid


def _check_confined(cluster: Cluster, owner: str, pid: int) -> None:
    status = json.loads(command("client", "status", "--home", cluster.owner_home(owner), "--json"))
    assert (status["transport"], status["isolation"]) == ("direct", probe().kind)
    if probe().kind == "landlock":
        assert "NoNewPrivs:\t1" in Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    words = Path(f"/proc/{pid}/environ").read_bytes()
    assert b"FEDLLM" not in words


async def _tokens(cluster: Cluster, version: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{cluster.endpoint}/v1", api_key=cluster.tenant_key) as client:
        answer = await client.chat.completions.create(
            model=ALIAS, messages=[{"role": "user", "content": "please open the door"}], max_tokens=4, temperature=0
        )
        assert answer.system_fingerprint == version


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
