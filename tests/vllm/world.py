"""What the tests of the fleet see of it: processes, registry, router, streams."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from vllm.servers import ANSWER_S, START_S, Replica, Transcript, Words, digest_of

from fedllm.registry.model import AdapterVersion
from fedllm.relay.processes import Supervised

ALIAS, OTHER = "acme/tools", "acme/other"


@dataclass
class World:
    """The fleet and its registry."""

    folder: Path
    words: Words
    replicas: list[Replica]
    router: Supervised
    url: str
    key: str
    guest: str
    say: Transcript
    versions: list[AdapterVersion] = field(default_factory=list)

    @property
    def log(self) -> Path:
        """The router's log."""
        return self.folder / "route.log"

    @property
    def fetched(self) -> list[str]:
        """What lies in the folder of the resolver."""
        return sorted(folder.name for folder in (self.folder / "adapters").glob("*/*"))

    def client(self, key: str = "") -> httpx.AsyncClient:
        """Return a client of the router, with an operator's key unless told otherwise."""
        headers = {"authorization": f"Bearer {key or self.key}"}
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=ANSWER_S, trust_env=False)

    def add(self) -> AdapterVersion:
        """Add a version to the registry, and remember it."""
        self.versions.append(self.words.add())
        return self.versions[-1]

    def events(self, event: str) -> list[dict[str, Any]]:
        """Return the router's log lines of one event."""
        lines = self.log.read_text(encoding="utf-8").splitlines() if self.log.is_file() else []
        found = [json.loads(line) for line in lines if line.startswith("{")]
        return [line for line in found if line["event"].startswith(event)]

    async def serves(self, http: httpx.AsyncClient, alias: str, version: AdapterVersion) -> None:
        """Wait until an alias has moved."""

        async def moved() -> bool:
            rows = (await http.get("/v1/models")).json()["data"]
            return any(row["id"] == alias and row["digest"] == version.digest for row in rows)

        await until(moved)

    async def prepared(self, version: AdapterVersion, replicas: list[Replica]) -> None:
        """Wait until replicas have a version's name."""

        async def there() -> bool:
            return all([version.digest in await replica.names() for replica in replicas])

        await until(there)

    async def ask(self, http: httpx.AsyncClient, prompt: str, count: int = 8, model: str = ALIAS) -> httpx.Response:
        """Ask the router for a whole answer."""
        return await http.post("/v1/completions", json=asked(prompt, count, model))


@dataclass
class Stream:
    """One stream: the version and replica it was given, what it said, and how it ended."""

    digest: str = ""
    replica: str = ""
    text: str = ""
    error: str = ""
    begun: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, http: httpx.AsyncClient, prompt: str, count: int) -> Stream:
        """Read it to its end."""
        body = {**asked(prompt, count, ALIAS), "stream": True}
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200, await answer.aread()
            self.digest, self.replica = digest_of(answer), answer.headers["x-fedllm-replica"]
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    self._take(json.loads(line.removeprefix("data: ")))
        self.begun.set()
        return self

    def _take(self, event: dict[str, Any]) -> None:
        if "error" in event:
            self.error = event["error"]["code"]
            return
        assert event["system_fingerprint"] == self.digest
        self.text += "".join(choice["text"] for choice in event["choices"])
        self.begun.set()


def asked(prompt: str, count: int, model: str) -> dict[str, Any]:
    """Return a greedy request of a known length."""
    return {"model": model, "prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True}


async def until(true: Callable[[], Any], limit_s: float = START_S) -> None:
    """Wait until something is true."""
    async with asyncio.timeout(limit_s):
        while not await true():  # noqa: ASYNC110 - what other processes do has no event here
            await asyncio.sleep(0.2)


async def answers(http: httpx.AsyncClient) -> bool:
    """Whether the router answers at all."""
    try:
        return (await http.get("/v1/models")).is_success
    except httpx.TransportError:
        return False


async def told(world: World, text: str) -> bool:
    """Whether the router's log holds a text."""
    return text in world.log.read_text(encoding="utf-8")
