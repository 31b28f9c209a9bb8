"""Apps that keep asking: a steady stream of chat requests through every swap of versions.

Each finished stream is recorded with every version digest that it named and the tokens it got, so that the
client itself can tell whether two versions were ever mixed in one answer.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx


@dataclass
class Stream:
    """One request as the app saw it.

    Attributes
    ----------
    digests : set[str]
        Every ``system_fingerprint`` of its chunks, and the header; more than one is a mixed stream.
    tokens, prompt_tokens : list[int]
        Token ids of answer and prompt, for scoring afterwards.
    error : str or None
        What went wrong, if anything.
    """

    model: str
    digests: set[str] = field(default_factory=set)
    tokens: list[int] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    text: str = ""
    finished: bool = False
    error: str | None = None


@dataclass
class Load:
    """A bounded, steady load on one alias.

    Parameters
    ----------
    url, key : str
        Endpoint and tenant key.
    alias, base : str
        Asked for the alias once it exists, for the base model before.
    prompts : Sequence[str]
        Asked in turn.
    pause_s : float
        Rest after each answer; may be changed while it runs. Training shares these cores.
    workers : int
        Streams in flight at once.
    """

    url: str
    key: str
    alias: str
    base: str
    prompts: Sequence[str]
    pause_s: float = 10.0
    workers: int = 2
    max_tokens: int = 24
    streams: list[Stream] = field(default_factory=list)
    _stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Ask until `stop` is called; in-flight streams are finished first."""
        timeout = httpx.Timeout(180.0, connect=10.0)
        async with httpx.AsyncClient(base_url=self.url, timeout=timeout, trust_env=False) as client:
            await asyncio.gather(*(self._worker(client, index) for index in range(self.workers)))

    def stop(self) -> None:
        """Ask no more."""
        self._stop.set()

    async def _worker(self, client: httpx.AsyncClient, index: int) -> None:
        turn = index
        while not self._stop.is_set():
            model = await self._model(client)
            stream = Stream(model)
            self.streams.append(stream)
            await self._ask(client, stream, self.prompts[turn % len(self.prompts)])
            turn += self.workers
            try:
                await asyncio.wait_for(self._stop.wait(), timeout=self.pause_s)
            except TimeoutError:
                continue

    async def _model(self, client: httpx.AsyncClient) -> str:
        answer = await client.get("/v1/models", headers=self._headers)
        answer.raise_for_status()
        return self.alias if self.alias in {m["id"] for m in answer.json()["data"]} else self.base

    async def _ask(self, client: httpx.AsyncClient, stream: Stream, prompt: str) -> None:
        body = {
            "model": stream.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "stream": True,
            "return_token_ids": True,
        }
        try:
            async with client.stream("POST", "/v1/chat/completions", json=body, headers=self._headers) as answer:
                if answer.is_error:
                    stream.error = f"HTTP {answer.status_code}"
                    return
                stream.digests.add(answer.headers["x-fedllm-version"])
                async for line in answer.aiter_lines():
                    if line.startswith("data: "):
                        read_event(stream, line[6:])
        except httpx.HTTPError as error:
            stream.error = type(error).__name__
        if not stream.finished and stream.error is None:
            stream.error = "stream ended early"

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}


def read_event(stream: Stream, data: str) -> None:
    """Add one server-sent event to a stream's record."""
    if data == "[DONE]":
        stream.finished = True
        return
    chunk = json.loads(data)
    if "error" in chunk:
        stream.error = str(chunk["error"].get("code") or "error event")
        return
    stream.digests.add(chunk["system_fingerprint"])
    stream.prompt_tokens = chunk.get("prompt_token_ids") or stream.prompt_tokens
    for choice in chunk["choices"]:
        stream.tokens += choice.get("token_ids") or []
        stream.text += choice["delta"].get("content") or ""
