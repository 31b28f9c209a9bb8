"""Zipf traffic on the tiers benchmark's endpoint: streams that ask one thing after another, each answer checked."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.tiers_endpoint import Note, NotedEndpoint, Wait
from benchmarks.tiers_registry import SignedRegistry
from fedllm.errors import FedllmError
from fedllm.ids import AliasName, Digest
from fedllm.serving.engine import GenerationRequest, SamplingParams

PROMPT_TOKENS, OUT_TOKENS = 16, 8


@dataclass
class Scene:
    """What a number of streams had.

    Parameters
    ----------
    picks : list of int
        What is asked for, by rank.
    seconds : float
        From the first request to the last token.
    notes : list of Note
        Of the requests that were answered.
    waits, copies_s : list
        Waits for a slot, and copies into one.
    reasons : list of str
        Why requests failed, and how answers were wrong.
    missed, excused : int
        Answers with a token that is not their version's, and those of them that the version alone misses too.
    """

    streams: int
    picks: list[int] = field(default_factory=list)
    seconds: float = 0.0
    notes: list[Note] = field(default_factory=list)
    waits: list[Wait] = field(default_factory=list)
    copies_s: list[float] = field(default_factory=list)
    failed: int = 0
    wrong: int = 0
    missed: int = 0
    excused: int = 0
    reasons: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Asked:
    alias: AliasName
    prompt: tuple[int, ...]
    said: list[int]


def zipf(count: int, draws: int, exponent: float, seed: int) -> list[int]:
    """Return `draws` ranks of `count`, from 0, the k-th with a probability as ``1 / (k + 1) ** exponent``."""
    weights = 1.0 / np.arange(1, count + 1) ** exponent
    picks = np.random.default_rng(seed).choice(count, size=draws, p=weights / weights.sum())
    return [int(pick) for pick in picks]


class LeastRecentlyUsed:
    """What a cache of `room` versions would have, asked one thing after another."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._kept: OrderedDict[int, None] = OrderedDict()

    def hits(self, picks: Sequence[int]) -> int:
        """Return how many of these it has when asked for."""
        hits = 0
        for pick in picks:
            hits += pick in self._kept
            self._kept[pick] = None
            self._kept.move_to_end(pick)
            if len(self._kept) > self._room:
                self._kept.popitem(last=False)
        return hits


def first_miss(said: Sequence[int], token: int) -> int:
    """Return where an answer first has another token than its version's; its length if nowhere."""
    return next((place for place, made in enumerate(said) if made != token), len(said))


def excusable(said: Sequence[int], alone: Sequence[int], token: int) -> bool:
    """Whether an answer is its version's for all that: it, alone, first misses its token there too, and says it else.

    A version that is always another's misses its token everywhere, alone as well: most tokens must be its own.
    """
    return first_miss(said, token) == first_miss(alone, token) and 2 * list(said).count(token) > len(said)


class Traffic:
    """Asks for versions by their popularity.

    Parameters
    ----------
    endpoint : NotedEndpoint
        Asked.
    registry : SignedRegistry
        Knows each alias's version and each version's token; the first alias is asked for most.
    vocabulary : int
        Prompts are random tokens below it.
    exponent : float
        Of the popularity.
    """

    def __init__(self, endpoint: NotedEndpoint, registry: SignedRegistry, vocabulary: int, exponent: float) -> None:
        self._endpoint = endpoint
        self._registry = registry
        self._names = list(registry.digests)
        self._exponent = exponent
        self._vocabulary = vocabulary
        self._draw = np.random.default_rng(12)
        self._count = 0

    async def fill(self, draws: int, seed: int) -> None:
        """Bring versions into memory, and so onto disk, as this many requests would."""
        for pick in zipf(len(self._names), draws, self._exponent, seed):
            await self._endpoint.tiers.hold(self._registry.digests[self._names[pick]])

    async def scene(self, streams: int, requests: int, seed: int, *, out_tokens: int = OUT_TOKENS) -> Scene:
        """Let `streams` streams ask `requests` things; then ask again, alone, what was not answered as forced."""
        endpoint, scene, doubtful = self._endpoint, Scene(streams), list[_Asked]()
        scene.picks = zipf(len(self._names), requests, self._exponent, seed)
        waits, copies = len(endpoint.waits), len(endpoint.copies_s)
        picks = iter(scene.picks)
        began = time.perf_counter()
        await asyncio.gather(*(self._stream(picks, scene, doubtful, out_tokens) for _ in range(streams)))
        scene.seconds = time.perf_counter() - began
        scene.waits, scene.copies_s = endpoint.waits[waits:], endpoint.copies_s[copies:]
        scene.missed = len(doubtful)
        for asked in doubtful:
            await self._judge(asked, scene)
        return scene

    async def _stream(self, picks: Iterator[int], scene: Scene, doubtful: list[_Asked], out_tokens: int) -> None:
        for pick in picks:
            alias = self._names[pick]
            prompt = tuple(int(t) for t in self._draw.integers(0, self._vocabulary, PROMPT_TOKENS))
            note = Note(time.perf_counter())
            try:
                version, said = await self._ask(alias, prompt, out_tokens, note)
            except FedllmError as error:
                scene.failed += 1
                scene.reasons.append(f"{alias}: {error.code}")
                continue
            scene.notes.append(note)
            if version != self._registry.digests[alias]:
                scene.wrong += 1
                scene.reasons.append(f"{alias} was answered by {version[:8]}")
            elif len(said) != out_tokens:
                scene.failed += 1
                scene.reasons.append(f"{alias}: {len(said)} of {out_tokens} tokens")
            elif first_miss(said, self._registry.token_of[version]) < out_tokens:
                doubtful.append(_Asked(alias, prompt, said))

    async def _judge(self, asked: _Asked, scene: Scene) -> None:
        """Ask again alone; see `excusable`."""
        digest = self._registry.digests[asked.alias]
        _, alone = await self._ask(asked.alias, asked.prompt, len(asked.said), Note(time.perf_counter()))
        token = self._registry.token_of[digest]
        if excusable(asked.said, alone, token):
            scene.excused += 1
        else:
            scene.wrong += 1
            scene.reasons.append(f"{asked.alias} said {asked.said}, its token is {token}")

    async def _ask(
        self, alias: AliasName, prompt: tuple[int, ...], out_tokens: int, note: Note
    ) -> tuple[Digest, list[int]]:
        self._count += 1
        request = GenerationRequest(prompt, SamplingParams(max_tokens=out_tokens), str(self._count))
        said: list[int] = []
        async with self._endpoint.lease(alias, note) as lease:
            stream = self._endpoint.engine.generate(lease, request)
            try:
                async for chunk in stream:
                    if not said:
                        note.first_s = time.perf_counter()
                    said += chunk.token_ids
            finally:
                await stream.aclose()
        return lease.digest, said
