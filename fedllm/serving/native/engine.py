"""The embedded engine: an asyncio face over one thread that steps the model.

The event loop owns admission, slots and streams; the step thread owns the scheduler, the model and the KV
cache. They meet in one queue of commands (executed between steps, in order) and one call back per step. The
order is what makes slots safe: a cancelled request leaves the scheduler before anything queued later, such as
a copy into the slot it used, is executed.
"""

from __future__ import annotations

import asyncio
import math
import queue
import threading
from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import partial
from pathlib import Path
from typing import cast

import torch

from fedllm.adapter import AdapterState
from fedllm.errors import ProcessDied, RequestInvalid
from fedllm.ids import Digest
from fedllm.kernels import BASE_SLOT
from fedllm.rng import Rng
from fedllm.serving.engine import EngineStats, GenerationRequest, Lease, SamplingParams, TokenScore
from fedllm.serving.fair import Places
from fedllm.serving.native.admission import SlotQueue
from fedllm.serving.native.blocks import BlockPool
from fedllm.serving.native.graphs import DecodeGraphs, decode_graphs
from fedllm.serving.native.limits import EngineLimits
from fedllm.serving.native.loader import PackedAdapter, choose_dtype, load_weights, pack_adapter, read_config
from fedllm.serving.native.model import LlamaModel
from fedllm.serving.native.runner import Runner
from fedllm.serving.native.sampler import new_generator
from fedllm.serving.native.scheduler import Scheduler, Work
from fedllm.serving.native.sequence import Sequence
from fedllm.serving.native.sizing import fit_to_device
from fedllm.serving.native.slots import SlotTable
from fedllm.serving.native.stream import Output, QueueStream, SlotLease, delivery

__all__ = ["EngineLimits", "NativeEngine", "open_engine"]


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

    def __init__(
        self, model: LlamaModel, *, base: Digest, limits: EngineLimits, rng: Rng, graphs: DecodeGraphs | None = None
    ) -> None:
        self._model = model
        self._base = base
        self._limits = limits
        self._rng = rng
        self._loop = asyncio.get_running_loop()
        self._slots = SlotTable(limits.slots, patience_s=limits.patience_s, patience_requests=limits.patience_requests)
        self._queue = SlotQueue(self._slots)
        self._streams: dict[int, QueueStream] = {}
        self._places = Places(limits.max_running + limits.max_waiting, limits.max_waiting)
        self._replies: set[asyncio.Future[None]] = set()
        self._next_id = 0
        self._stopped = False
        self._steps = 0
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        pool = BlockPool(limits.kv_blocks, limits.block_tokens)
        self._scheduler = Scheduler(pool, max_running=limits.max_running, max_step_tokens=limits.max_step_tokens)
        self._runner = Runner(model, graphs)
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

    @property
    def max_rank(self) -> int:
        """Largest rank that a slot holds."""
        return self._limits.max_rank

    async def check(self, state: AdapterState) -> None:
        """Raise `AdapterInvalid` or `BaseMismatch` if an adapter does not fit; takes no slot."""
        await asyncio.to_thread(self._pack, state, "cpu")

    async def load(self, digest: Digest, state: AdapterState) -> None:
        """Put a version in a spare slot; see `fedllm.serving.engine.Engine`."""
        if digest not in self._slots.ready():
            await self.check(state)
            await self._queue.acquire(digest, partial(self._write, state), wait=False)
            self._queue.release(digest)

    async def admit(self, digest: Digest, state: AdapterState) -> SlotLease:
        """Hold a version for one request, waiting in turn until it has a slot.

        Parameters
        ----------
        digest : Digest
            The version.
        state : AdapterState
            Its factors, for the case that it is not loaded; `check` has passed them.

        Raises
        ------
        Overloaded
            If every slot is pinned.
        """
        slot = await self._queue.acquire(digest, partial(self._write, state))
        return SlotLease(digest, slot, partial(self._queue.release, digest))

    def admits(self, digest: Digest) -> bool:
        """Whether `lease` gives this version to one more request now."""
        return self._queue.admits(digest)

    def loaded(self) -> tuple[Digest, ...]:
        """Return the digests that are in slots."""
        return self._slots.ready()

    def pin(self, digest: Digest) -> None:
        """Keep a loaded version from being evicted; pins count."""
        self._slots.pin(digest)
        self._queue.serve()

    def unpin(self, digest: Digest) -> None:
        """Take one pin away."""
        self._slots.unpin(digest)
        self._queue.serve()

    async def unload(self, digest: Digest) -> None:
        """Wait until no request uses the version, then free its slot, unless it is pinned by then."""
        await self._queue.drained(digest)
        if digest in self._slots.ready() and not self._slots.pinned(digest):
            self._slots.free(digest)
            self._queue.serve()

    def lease(self, digest: Digest) -> SlotLease:
        """Hold a loaded version (or the base) for one request.

        Raises
        ------
        NotFound
            If it is not loaded.
        Overloaded
            If others that wait for a slot come first: `admit` waits in turn.
        """
        if digest == self._base:
            return SlotLease(digest, BASE_SLOT, lambda: None)
        return SlotLease(digest, self._queue.acquire_now(digest), partial(self._queue.release, digest))

    def generate(self, lease: Lease, request: GenerationRequest) -> QueueStream:
        """Admit a request and return its stream; see `fedllm.serving.engine.Engine`."""
        return self._admit(lease, request)

    async def score(self, lease: Lease, prompt: Seq[int], tokens: Seq[int]) -> list[TokenScore]:
        """Return the scores of `tokens` as a continuation of `prompt`."""
        if not tokens:
            return []
        stream = self._admit(lease, GenerationRequest(tuple(prompt), SamplingParams(max_tokens=1)), scored=tokens)
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
            alive=not self._stopped,
        )

    async def close(self) -> None:
        """Stop the step thread; streams that are open end with `ProcessDied`."""
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    def _pack(self, state: AdapterState, device: str) -> PackedAdapter:
        config, limits = self._model.config, self._limits
        return pack_adapter(state, config, base=self._base, max_rank=limits.max_rank, device=device)

    async def _write(self, state: AdapterState, slot: int) -> None:
        packed = await asyncio.to_thread(self._pack, state, str(self._model.device))
        await self._between_steps(partial(self._runner.write_adapter, slot, packed))

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

    def _admit(self, lease: Lease, request: GenerationRequest, *, scored: Seq[int] = ()) -> QueueStream:
        self._check_running()
        tokens, prompt_length = [*request.prompt, *scored], len(request.prompt)
        total = len(tokens) + (0 if scored else request.params.max_tokens)
        if total > self.max_model_tokens:
            raise RequestInvalid(
                f"prompt of {prompt_length} tokens and {total - prompt_length} more are asked for; "
                f"together at most {self.max_model_tokens} are served"
            )
        vocabulary = self._model.config.vocab_size
        if prompt_length < 1 or min(tokens) < 0 or max(tokens) >= vocabulary:
            raise RequestInvalid(f"a prompt has at least one token, and ids are 0 to {vocabulary - 1}")
        if not (request.weight > 0 and math.isfinite(request.weight)):
            raise RequestInvalid(f"the client's weight is {request.weight}, positive and finite is allowed")
        self._next_id += 1
        sequence = Sequence(
            id=self._next_id,
            slot=cast("SlotLease", lease).slot,
            version=lease.digest,
            tokens=tokens,
            prompt_length=prompt_length,
            params=request.params,
            scoring=bool(scored),
            scope=request.scope,
            client=request.client,
            weight=request.weight,
            generator=new_generator(request.params, self._rng),
        )
        self._places.take(sequence.client)
        stream = QueueStream(sequence, self._cancel)
        self._streams[sequence.id] = stream
        self._commands.put(partial(self._scheduler.add, sequence))
        return stream

    def _cancel(self, sequence: Sequence) -> None:
        if self._streams.pop(sequence.id, None) is not None:
            self._places.release(sequence.client)
            self._commands.put(partial(self._scheduler.cancel, sequence))

    def _check_running(self) -> None:
        if self._stopped:
            raise ProcessDied("the engine's step loop has stopped", hint="restart the endpoint; see its log")

    def _deliver(self, outputs: list[Output]) -> None:
        for output in outputs:
            stream = self._streams.get(output.sequence_id)
            if stream is None:
                continue
            if output.ended:
                del self._streams[output.sequence_id]
                self._places.release(stream.sequence.client)
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
        if self._model.device.type == "cuda":
            torch.cuda.set_device(self._model.device)  # Triton launches on the thread's current device
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
            Output(item.sequence.id, delivery(item.sequence, start), item.sequence.ended)
            for item, start in zip(work, before, strict=True)
            if item.sequence.ended or item.sequence.generated > start
        ]
        if outputs:
            self._loop.call_soon_threadsafe(self._deliver, outputs)


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
        Sizes; on a GPU the cache has as many blocks as there is room for.
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
    ConfigError
        If the device has no room for it with these limits.
    """
    torch.set_num_threads(threads)
    config, kind = read_config(folder), choose_dtype(dtype, device)
    limits = fit_to_device(config, limits, element=kind.itemsize, device=device)
    weights = await asyncio.to_thread(load_weights, folder, config, dtype=kind, device=device)
    model = LlamaModel(
        config,
        weights,
        slots=limits.slots,
        max_rank=limits.max_rank,
        blocks=limits.kv_blocks,
        block_tokens=limits.block_tokens,
        positions=limits.max_model_tokens,
    )
    graphs = await asyncio.to_thread(decode_graphs, model, limits)
    return NativeEngine(model, base=base, limits=limits, rng=rng, graphs=graphs)
