"""A version that was made ready and never served gives its slot back when its alias moves on."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import httpx
from patience import PATIENCE_S
from unit.serving.registry_fake import FakeSource
from unit.serving.test_vllm import ALIAS, V1, V2, V3, FakeVllm, served_name

from fedllm.clock import SystemClock
from fedllm.rng import SeededRng
from fedllm.serving.metrics import Counters
from fedllm.serving.router.aliases import AliasFollower
from fedllm.serving.router.breaker import Breaker
from fedllm.serving.router.limits import AdaptiveLimit
from fedllm.serving.router.models import Models
from fedllm.serving.router.replica import Replica
from fedllm.serving.router.replica_file import ReplicaConfig
from fedllm.serving.vllm import VllmKind, VllmOptions


def replica(name: str, fake: FakeVllm, *, slots: int) -> Replica:
    """Return a healthy vLLM replica that the fake answers for."""
    client = httpx.AsyncClient(transport=httpx.MockTransport(cast("Any", fake)), base_url="http://replica")
    config, clock, rng = ReplicaConfig(name, "http://replica", "vllm"), SystemClock(), SeededRng(1)
    kind = VllmKind(config, client, VllmOptions(slots), rng, base_name="tiny")
    made = Replica(config, kind, client, AdaptiveLimit(1.0, 8), Breaker(clock, rng))
    made.healthy = True
    return made


def test_what_was_held_back_does_not_hold_its_slot() -> None:
    """Two slots: v1 is served, v2 gets ready on one replica only, and v3 comes; it is served all the same."""

    async def scenario() -> None:
        able, unable = FakeVllm(V1, V2, V3), FakeVllm(V1, V3)
        fleet = SimpleNamespace(
            replicas={"a": replica("a", able, slots=2), "b": replica("b", unable, slots=2)}, on_change=lambda: None
        )
        source = FakeSource()
        models = Models(source, "tiny")
        follower = AliasFollower(source, models, cast("Any", fleet), Counters(), SystemClock(), prepare_s=5.0)
        for version in (V1, V2):
            source.publish(ALIAS, version)
            await follower.poll()
        assert models.served[ALIAS].digest == V1.version.digest
        assert served_name(V2.version.digest) in able.loaded
        source.publish(ALIAS, V3)
        async with asyncio.timeout(PATIENCE_S):
            while models.served[ALIAS].digest != V3.version.digest:
                await follower.poll()
            while served_name(V2.version.digest) in able.loaded:  # noqa: ASYNC110 - the other end of a call
                await asyncio.sleep(0.01)

    asyncio.run(scenario())
