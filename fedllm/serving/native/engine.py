"""The embedded engine: an asyncio face over one thread that steps the model.

The event loop owns admission, slots and streams; the step thread owns the scheduler, the model and the KV
cache. They meet in one queue of commands (executed between steps, in order) and one call back per step. The
order is what makes slots safe: a cancelled request leaves the scheduler before anything queued later, such as
a copy into the slot it used, is executed.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import torch

from fedllm.adapter import AdapterState
from fedllm.errors import AdapterInvalid, FedllmError, Overloaded, ProcessDied, RequestInvalid
from fedllm.ids import Digest
from fedllm.kernels import BASE_SLOT
from fedllm.rng import Rng
from fedllm.serving.engine import (
    Chunk,
    EngineStats,
    GenerationRequest,
    Lease,
    SamplingParams,
    TokenScore,
)
from fedllm.serving.native.blocks import BlockPool
from fedllm.serving.native.loader import choose_dtype, load_weights, pack_adapter, read_config
from fedllm.serving.native.model import LlamaModel
from fedllm.serving.native.runner import Runner
from fedllm.serving.native.sampler import new_generator
from fedllm.serving.native.scheduler import Scheduler, Work
from fedllm.serving.native.sequence import Sequence
from fedllm.serving.native.slots import SlotTable
from fedllm.serving.native.stream import QueueStream, SlotLease


@dataclass(frozen=True)
class EngineLimits:
    """Sizes of everything bounded.

    Parameters
    ----------
    slots, max_rank : int
        Adapter versions resident at a time, and their largest rank.
    kv_blocks, block_tokens : int
        Size of the KV cache.
    max_running, max_waiting : int
        Requests in a batch, and requests queued behind it.
    max_step_tokens : int
        Tokens of one step; bounds how long a prompt can delay other streams' next token.
    max_model_tokens : int
        Prompt and continuation together; the base's own limit if that is lower.
    """

    slots: int = 8
    max_rank: int = 16
    kv_blocks: int = 1024
    block_tokens: int = 16
    max_running: int = 16
    max_waiting: int = 64
    max_step_tokens: int = 256
    max_model_tokens: int = 4096


@dataclass(frozen=True)
class _Output:
    sequence_id: int
    item: Chunk | FedllmError
    ended: bool


class NativeEngine:
    """An `Engine` in this process; create it with `open_engine`, inside a running event loop.

    Parameters
    ----------
    model : LlamaModel
        Weights, adapter stacks and KV cache.
    base : Digest
        Content digest of the base model.
    limits : EngineLimits
        Must agree with the model's stacks and cache.
    rng : Rng
        Seeds sampling where a request gives no seed.
    """

    def __init__(self, model: LlamaModel, *, base: Digest, limits: EngineLimits, rng: Rng) -> None:
        self._model = model
        self._base = base
        self._limits = limits
        self._rng = rng
        self._loop = asyncio.get_running_loop()
        self._slots = SlotTable(limits.slots)
        self._released = asyncio.Event()
        self._loading: dict[Digest, asyncio.Task[None]] = {}
        self._streams: dict[int, QueueStream] = {}
        self._replies: set[asyncio.Future[None]] = set()
        self._next_id = 0
        self._stopped = False
        self._steps = 0
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        pool = BlockPool(limits.kv_blocks, limits.block_tokens)
        self._scheduler = Scheduler(pool, max_running=limits.max_running, max_step_tokens=limits.max_step_tokens)
        self._runner = Runner(model)
        self._thread = threading.Thread(target=self._serve, name="fedllm-engine", daemon=True)
        self._thread.start()

    @property
    def base_digest(self) -> Digest:
        """Content digest of the base model."""
        return self._base

    @property
    def max_model_tokens(self) -> int:
        """Most tokens of prompt and continuation together."""
        limits = self._limits
        cache = limits.kv_blocks * limits.block_tokens
        return min(limits.max_model_tokens, cache, self._model.config.max_position_embeddings)

    async def load(self, digest: Digest, state: AdapterState) -> None:
        """Put a version in a spare slot; see `fedllm.serving.engine.Engine`."""
        if digest in self._slots.ready():
            return
        task = self._loading.get(digest)
        if task is None:
            task = asyncio.create_task(self._load(digest, state))
            self._loading[digest] = task
            task.add_done_callback(lambda _: self._loading.pop(digest, None))
        await asyncio.shield(task)

    def loaded(self) -> tuple[Digest, ...]:
        """Return the digests that can be leased now."""
        return self._slots.ready()

    def pin(self, digest: Digest) -> None:
        """Keep a loaded version from being evicted; pins count."""
        self._slots.pin(digest)

    def unpin(self, digest: Digest) -> None:
        """Take one pin away."""
        self._slots.unpin(digest)

    async def unload(self, digest: Digest) -> None:
        """Wait until no request uses the version, then free its slot, unless it is pinned by then."""
        while self._slots.requests(digest):
            self._released.clear()
            await self._released.wait()
        if digest in self._slots.ready() and not self._slots.pinned(digest):
            self._slots.free(digest)

    def lease(self, digest: Digest) -> SlotLease:
        """Hold a loaded version (or the base) for one request; raise `NotFound` if it is not loaded."""
        if digest == self._base:
            return SlotLease(digest, BASE_SLOT, lambda: None)
        return SlotLease(digest, self._slots.acquire(digest), partial(self._release, digest))

    def generate(self, lease: Lease, request: GenerationRequest) -> QueueStream:
        """Admit a request and return its stream; see `fedllm.serving.engine.Engine`."""
        return self._admit(lease, list(request.prompt), len(request.prompt), request.params, scoring=False)

    async def score(self, lease: Lease, prompt: Seq[int], tokens: Seq[int]) -> list[TokenScore]:
        """Return the scores of `tokens` as a continuation of `prompt`."""
        if not tokens:
            return []
        params = SamplingParams(max_tokens=1)
        stream = self._admit(lease, [*prompt, *tokens], len(prompt), params, scoring=True)
        try:
            async for _ in stream:
                pass
        finally:
            await stream.aclose()
        return stream.sequence.scores

    def stats(self) -> EngineStats:
        """Return a snapshot; counters of the step thread may be a step old."""
        scheduler, pool = self._scheduler, self._scheduler.pool
        return EngineStats(
            running=len(scheduler.running),
            waiting=max(0, len(self._streams) - len(scheduler.running)),
            free_blocks=pool.free,
            total_blocks=pool.count,
            slots=self._slots.count,
            slots_used=self._slots.used,
            steps=self._steps,
            preemptions=scheduler.preemptions,
            prefix_hit_tokens=scheduler.prefix_hit_tokens,
        )

    async def close(self) -> None:
        """Stop the step thread; streams that are open end with `ProcessDied`."""
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    async def _load(self, digest: Digest, state: AdapterState) -> None:
        packed = await asyncio.to_thread(
            pack_adapter,
            state,
            self._model.config,
            base=self._base,
            max_rank=self._limits.max_rank,
            device=str(self._model.device),
        )
        slot = self._slots.reserve(digest)
        try:
            await self._between_steps(partial(self._runner.write_adapter, slot, packed))
        except BaseException:
            self._slots.free(digest)
            raise
        self._slots.commit(digest)

    async def _between_steps(self, work: Callable[[], None]) -> None:
        self._check_running()
        reply: asyncio.Future[None] = self._loop.create_future()
        self._replies.add(reply)
        reply.add_done_callback(self._replies.discard)

        def execute() -> None:
            work()
            self._loop.call_soon_threadsafe(_resolve, reply)

        self._commands.put(execute)
        await reply

    def _release(self, digest: Digest) -> None:
        self._slots.release(digest)
        self._released.set()

    def _admit(
        self, lease: Lease, tokens: list[int], prompt_length: int, params: SamplingParams, *, scoring: bool
    ) -> QueueStream:
        self._check_running()
        total = len(tokens) + (0 if scoring else params.max_tokens)
        if total > self.max_model_tokens:
            raise RequestInvalid(
                f"prompt of {prompt_length} tokens and {total - prompt_length} more are asked for; "
                f"together at most {self.max_model_tokens} are served"
            )
        vocabulary = self._model.config.vocab_size
        if prompt_length < 1 or min(tokens) < 0 or max(tokens) >= vocabulary:
            raise RequestInvalid(f"a prompt has at least one token, and ids are 0 to {vocabulary - 1}")
        limit = self._limits.max_running + self._limits.max_waiting
        if len(self._streams) >= limit:
            raise Overloaded(f"{limit} requests are in flight, which is the limit", hint="retry later")
        self._next_id += 1
        sequence = Sequence(
            id=self._next_id,
            slot=cast("SlotLease", lease).slot,
            version=lease.digest,
            tokens=tokens,
            prompt_length=prompt_length,
            params=params,
            scoring=scoring,
            generator=new_generator(params, self._rng),
        )
        stream = QueueStream(sequence, self._cancel)
        self._streams[sequence.id] = stream
        self._commands.put(partial(self._scheduler.add, sequence))
        return stream

    def _cancel(self, sequence: Sequence) -> None:
        if self._streams.pop(sequence.id, None) is not None:
            self._commands.put(partial(self._scheduler.cancel, sequence))

    def _check_running(self) -> None:
        if self._stopped:
            raise ProcessDied("the engine's step loop has stopped", hint="restart the endpoint; see its log")

    def _deliver(self, outputs: list[_Output]) -> None:
        for output in outputs:
            stream = self._streams.get(output.sequence_id)
            if stream is None:
                continue
            if output.ended:
                del self._streams[output.sequence_id]
            stream.put(output.item)

    def _stop(self) -> None:
        self._stopped = True
        error = ProcessDied("the engine stopped while the request was running")
        for stream in self._streams.values():
            stream.put(error)
        self._streams.clear()
        for reply in list(self._replies):
            reply.set_exception(error)

    # What follows runs on the step thread.

    def _serve(self) -> None:
        try:
            while self._execute_commands():
                work = self._scheduler.schedule()
                if work:
                    self._step(work)
        finally:
            self._loop.call_soon_threadsafe(self._stop)

    def _execute_commands(self) -> bool:
        """Execute what is queued, waiting if there is nothing else to do; False means stop."""
        idle = not (self._scheduler.running or self._scheduler.waiting)
        while True:
            try:
                command = self._commands.get(block=idle)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            idle = idle and not self._scheduler.waiting

    def _step(self, work: list[Work]) -> None:
        before = [item.sequence.generated for item in work]
        self._runner.run(work, self._scheduler.pool.take_fresh())
        self._scheduler.finish(work)
        self._steps += 1
        outputs = [
            _Output(item.sequence.id, _delivery(item.sequence, start), item.sequence.ended)
            for item, start in zip(work, before, strict=True)
            if item.sequence.ended or item.sequence.generated > start
        ]
        if outputs:
            self._loop.call_soon_threadsafe(self._deliver, outputs)


def _delivery(sequence: Sequence, start: int) -> Chunk | FedllmError:
    if sequence.failure is not None:
        return AdapterInvalid(sequence.failure)
    new = () if sequence.scoring else tuple(sequence.tokens[sequence.prompt_length + start :])
    return Chunk(new, sequence.finish_reason)


def _resolve(reply: asyncio.Future[None]) -> None:
    if not reply.done():
        reply.set_result(None)


async def open_engine(
    folder: Path,
    *,
    base: Digest,
    limits: EngineLimits,
    rng: Rng,
    dtype: str = "bfloat16",
    device: str = "cpu",
    threads: int = 1,
) -> NativeEngine:
    """Load a base model and start its engine.

    Parameters
    ----------
    folder : Path
        Hugging Face folder with ``config.json`` and safetensors.
    base : Digest
        The folder's content digest; adapters for any other are refused.
    limits : EngineLimits
        Sizes.
    rng : Rng
        Seeds sampling where a request gives no seed.
    dtype : str
        ``bfloat16`` (where the device has it) or ``float32``.
    device : str
        A torch device.
    threads : int
        CPU threads of each operator; for the whole process.

    Raises
    ------
    BaseUnsupported
        If the folder is not a model that this engine computes exactly.
    """
    torch.set_num_threads(threads)
    config = read_config(folder)
    weights = await asyncio.to_thread(load_weights, folder, config, dtype=choose_dtype(dtype, device), device=device)
    model = LlamaModel(
        config,
        weights,
        slots=limits.slots,
        max_rank=limits.max_rank,
        blocks=limits.kv_blocks,
        block_tokens=limits.block_tokens,
    )
    return NativeEngine(model, base=base, limits=limits, rng=rng)
