"""A whole router on loopback before fake replicas, in the test's own event loop."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from patience import PATIENCE_S
from unit.serving.registry_fake import FakeSource, make_version
from unit.serving.router.fake_replica import FakeReplica
from unit.serving.tiny_llama import make_adapter

from fedllm.clock import SystemClock
from fedllm.rng import SeededRng
from fedllm.serving.access import Access
from fedllm.serving.feedback import Feedbacks
from fedllm.serving.metrics import Counters
from fedllm.serving.records import RequestRecord
from fedllm.serving.router.aliases import AliasFollower
from fedllm.serving.router.api import Router, create_app
from fedllm.serving.router.app import replica_kinds
from fedllm.serving.router.dispatch import Dispatcher
from fedllm.serving.router.fleet import Fleet
from fedllm.serving.router.models import Models
from fedllm.serving.router.predictions import Predictions
from fedllm.serving.router.waiting import WaitingLine
from fedllm.serving.tenants import TenantFile, create_tenant

ALIAS = "acme/tools"
ASKED = {"model": ALIAS, "prompt": "count", "max_tokens": 8}


class Live:
    """A running router, and what a test needs around it."""

    def __init__(self, folder: Path, replicas: Sequence[FakeReplica], *, wait_s: float, **options: Any) -> None:
        self.file = folder / "replicas.toml"
        self.replicas = {replica.name: replica for replica in replicas}
        (folder / "router.key").write_text("router-secret\n")
        self.write(*self.replicas)
        tenants = folder / "tenants.toml"
        self.key = create_tenant(tenants, "acme", [ALIAS, "base"], operator=True)
        self.other_key = create_tenant(tenants, "other", [ALIAS])
        self.open_key = create_tenant(tenants, "open", [ALIAS], log_prompts=True)
        self.poor_key = create_tenant(tenants, "poor", [])
        self.records: list[RequestRecord] = []
        self.counters = Counters()
        clock, rng, self.source = SystemClock(), SeededRng(1), FakeSource()
        self.old = self.source.publish(ALIAS, make_version(make_adapter(1), 1))
        self.fleet = Fleet(
            self.file,
            replica_kinds("tiny", rng),
            clock,
            rng,
            ttft_objective_s=60.0,
            max_in_flight=options.get("max_in_flight", 8),
            health_s=0.05,
        )
        self.line = WaitingLine(self.fleet, clock, max_waiting=options.get("max_waiting", 8), wait_s=wait_s)
        self.models = Models(self.source, "tiny")
        prepare_s = options.get("prepare_s", PATIENCE_S)
        self.follower = AliasFollower(self.source, self.models, self.fleet, self.counters, clock, prepare_s=prepare_s)
        feedbacks = Feedbacks()
        self.router = Router(
            Access(TenantFile(tenants), clock, observers=[self, feedbacks]),
            self.models,
            self.follower,
            self.fleet,
            Dispatcher(self.line, clock),
            clock,
            rng,
            Predictions(options["predictions"]) if "predictions" in options else None,
            options.get("prompt_log"),
            feedbacks,
        )

    def write(self, *names: str) -> None:
        """Let these replicas be in the file."""
        tables = [f'[replicas.{n}]\nurl = "{self.replicas[n].url}"\nkey_file = "router.key"\n' for n in names]
        self.file.write_text("\n".join(tables))

    def observe(self, record: RequestRecord) -> None:
        """Keep a record."""
        self.records.append(record)

    def publish(self, number: int, alias: str = ALIAS) -> str:
        """Move the alias to a new version."""
        return self.source.publish(alias, make_version(make_adapter(number), number))

    async def post(self, *, key: str | None = None, path: str = "/v1/completions", **body: Any) -> httpx.Response:
        """Ask for a completion."""
        headers = {"authorization": f"Bearer {self.key if key is None else key}"}
        return await self.http.post(path, json={**ASKED, **body}, headers=headers)

    def stream(self, **body: Any) -> Any:
        """Ask for a stream; an async context manager of the open response."""
        headers = {"authorization": f"Bearer {self.key}"}
        return self.http.stream("POST", "/v1/completions", json={**ASKED, "stream": True, **body}, headers=headers)

    async def events(self, **body: Any) -> list[Any]:
        """Return a stream's events, the last one ``[DONE]`` unless it broke off."""
        async with self.stream(**body) as answer:
            return [event async for event in read(answer)]

    def prefer(self, name: str) -> str:
        """Return a prompt that an idle router sends to a replica first."""
        from fedllm.serving.router.placement import place, placement_key

        idle, digest = dict.fromkeys(self.fleet.replicas, 0), self.models.served[ALIAS].digest
        prompts = (f"prompt {i}" for i in range(1000))
        return next(p for p in prompts if place(placement_key(digest, {"prompt": p}), idle)[0] == name)


async def read(answer: httpx.Response) -> AsyncIterator[Any]:
    """Yield a stream's events as objects."""
    async for line in answer.aiter_lines():
        if line.startswith("data: "):
            yield line[6:] if line == "data: [DONE]" else json.loads(line[6:])


def text(events: list[Any]) -> str:
    """Return the text of a stream's events."""
    return "".join(c["text"] for e in events if isinstance(e, dict) for c in e.get("choices", ()))


async def until(true: Callable[[], Any]) -> None:
    """Wait until something is true."""
    async with asyncio.timeout(PATIENCE_S):
        while not true():  # noqa: ASYNC110 - states of many kinds, none of which has an event
            await asyncio.sleep(0.01)


@asynccontextmanager
async def routed(
    folder: Path, replicas: Sequence[FakeReplica], *, wait_s: float = PATIENCE_S, **options: Any
) -> AsyncIterator[Live]:
    """Run replicas and a router that serves `ALIAS` on all of them."""
    async with AsyncExitStack() as stack:
        for replica in replicas:
            await stack.enter_async_context(replica)
        live = Live(folder, replicas, wait_s=wait_s, **options)
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        config = uvicorn.Config(create_app(live.router), log_config=None, access_log=False, lifespan="off", ws="none")
        server = uvicorn.Server(config)
        server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        tasks = [asyncio.create_task(live.fleet.run())]
        await until(lambda: all(n in live.fleet.replicas and live.fleet.replicas[n].healthy for n in live.replicas))
        tasks.append(asyncio.create_task(live.follower.run()))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await until(lambda: server.started and (live.follower.synced.is_set() or live.models.held_back))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, trust_env=False) as live.http:
            try:
                yield live
            finally:
                server.should_exit = True
                for task in tasks:
                    task.cancel()
                await asyncio.gather(serving, *tasks, return_exceptions=True)
