"""Decode steps as CUDA graphs: captured once per batch size, replayed from buffers that stay where they are.

A decode step of a large model is hundreds of short kernels; launching them one by one from Python takes longer than
running them. A captured step reads everything that changes from static buffers, filled by one copy: tokens,
positions, cache rows, block tables, and the adapters' plan. A batch smaller than its graph is padded with rows of the
base model that read and write the model's scratch block; nobody reads their logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedllm.kernels import BASE_SLOT, Plan, PlanBuffers, Segments, build_segments, plan_lora
from fedllm.kernels.attention import Decoder
from fedllm.serving.native.limits import EngineLimits
from fedllm.serving.native.model import LlamaModel, Span, StepInput

Run = Callable[[], Tensor]
Capture = Callable[[Run], Run]
_WARM_UPS = 2


@dataclass(frozen=True)
class DecodeBatch:
    """One new token each of some sequences, as lists of one entry per sequence.

    Parameters
    ----------
    tokens, positions : sequence of int
        The token, and where it stands.
    slots : sequence of int
        Adapter slot, ``-1`` for the base.
    blocks : sequence of sequence of int
        Cache blocks, up to the one of the new token at least.
    """

    tokens: Sequence[int]
    positions: Sequence[int]
    slots: Sequence[int]
    blocks: Sequence[Sequence[int]]


def batch_sizes(most: int) -> tuple[int, ...]:
    """Return the batch sizes to capture for up to `most` sequences: powers of two, and `most`."""
    powers = [1 << n for n in range(most.bit_length()) if 1 << n < most]
    return (*powers, most)


def graph_for(batch: int, sizes: Sequence[int]) -> int | None:
    """Return the smallest of `sizes` that holds a batch, None if there is none or the batch is empty."""
    return min((size for size in sizes if size >= batch), default=None) if batch else None


class CudaCapture:
    """Captures what a function launches on one device; all graphs share one pool of memory.

    Parameters
    ----------
    device : torch.device
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        """Return the replay, which returns the same tensor each time."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):  # compiles kernels and lets libraries allocate
                    run()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile: adapters are laid out beside the step thread.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                output = run()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


class DecodeGraphs:
    """Captured decode steps of one model. Belongs to the thread that steps it.

    Parameters
    ----------
    model : LlamaModel
        With paged attention.
    sizes : sequence of int
        Batch sizes; see `batch_sizes`.
    max_tokens : int
        Most tokens of a sequence; the width of the tables.
    slots : int
        Adapter slots of the model.
    capture : callable, optional
        Another than `CudaCapture`, for machines without CUDA.

    Raises
    ------
    ValueError
        If the model gathers: that work depends on the contexts.
    """

    def __init__(
        self,
        model: LlamaModel,
        *,
        sizes: Sequence[int],
        max_tokens: int,
        slots: int,
        capture: Capture | None = None,
    ) -> None:
        if model.decoder is None:
            raise ValueError("decode steps are captured with paged attention only, and this model gathers blocks")
        width = -(-max_tokens // model.block_tokens)
        capture = capture or CudaCapture(model.device)
        self.sizes = tuple(sorted(sizes))
        # The largest first: the others find its memory in the allocator.
        self._steps = {
            size: _StaticStep(model, model.decoder, size, width, slots, capture) for size in reversed(self.sizes)
        }

    def serves(self, batch: int) -> bool:
        """Whether a batch size has a graph."""
        return graph_for(batch, self.sizes) is not None

    def forward(self, batch: DecodeBatch) -> Tensor:
        """Return the logits of a decode step, shape ``(B, vocab)``, valid until the next one, and fill the cache.

        Raises
        ------
        ValueError
            If the batch is larger than every graph.
        """
        size = graph_for(len(batch.tokens), self.sizes)
        if size is None:
            raise ValueError(f"{len(batch.tokens)} sequences found, graphs are for 1 to {self.sizes[-1]}")
        return self._steps[size].run(batch)


def decode_graphs(model: LlamaModel, limits: EngineLimits) -> DecodeGraphs | None:
    """Capture all decode steps that limits allow; None on a CPU, where launching costs little. Takes seconds.

    Call it before the thread that steps the model starts.
    """
    if model.device.type != "cuda":
        return None
    longest = min(limits.max_model_tokens, model.config.max_position_embeddings)
    return DecodeGraphs(model, sizes=batch_sizes(limits.max_running), max_tokens=longest, slots=limits.slots)


class _StaticStep:
    """One batch size: its buffers and its captured step."""

    def __init__(
        self, model: LlamaModel, decoder: Decoder, size: int, width: int, slots: int, capture: Capture
    ) -> None:
        cuda = model.device.type == "cuda"
        self._model = model
        self._size = size
        self._row0 = model.scratch_block * model.block_tokens
        self._host = torch.zeros(size * (width + 4), dtype=torch.int64, pin_memory=cuda)
        self._device = torch.zeros(size * (width + 4), dtype=torch.int64, device=model.device)
        self._copied = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]
        self._fields = self._host.numpy()[: 4 * size].reshape(4, size)
        self._table = self._host.numpy()[4 * size :].reshape(size, width)
        tokens, positions, rows, contexts = self._device[: 4 * size].view(4, size)
        blocks = self._device[4 * size :].view(size, width)
        self._plan = decoder.fixed(size, width).plan
        self._blocks, self._contexts = blocks, contexts
        # A CPU runs Triton in its interpreter only, and then the adapters' kernels with it.
        fixed = cuda or model.attention == "triton"
        self._lora = PlanBuffers(size, min(size, slots), device=model.device) if fixed else None
        empty = build_segments([BASE_SLOT] * size)
        self._fill(DecodeBatch((), (), (), ()))
        self._step = StepInput(
            tokens_T=tokens,
            positions_T=positions,
            cache_rows_T=rows,
            spans=(Span(slice(0, size), blocks, None, size, 1, decode=self._plan(blocks, contexts)),),
            lora=self._plan_lora(empty),
            logit_rows=torch.arange(size, device=model.device),
        )
        with torch.inference_mode():
            self._replay = capture(lambda: model.forward(self._step))

    def run(self, batch: DecodeBatch) -> Tensor:
        self._fill(batch)
        self._plan(self._blocks, self._contexts)
        padding = [BASE_SLOT] * (self._size - len(batch.slots))
        plan = self._plan_lora(build_segments([*batch.slots, *padding]))
        if self._lora is None:
            self._step = replace(self._step, lora=plan)  # a CPU's plan is new every time, and nothing is captured
        return self._replay()[: len(batch.tokens)]

    def _plan_lora(self, segments: Segments) -> Plan:
        if self._lora is None:
            return plan_lora(segments, device=self._model.device)
        return self._lora.plan(segments, way="decode", fixed=True)

    def _fill(self, batch: DecodeBatch) -> None:
        """Write a batch, padded, into the static buffers by one copy."""
        if self._copied is not None:
            self._copied.synchronize()  # the last copy may still be reading the host's buffer
        live, tokens_per_block = len(batch.tokens), self._model.block_tokens
        self._fields[0, :live], self._fields[1, :live] = batch.tokens, batch.positions
        self._fields[3, :live] = self._fields[1, :live] + 1
        for row, (position, blocks) in enumerate(zip(batch.positions, batch.blocks, strict=True)):
            used = position // tokens_per_block + 1
            self._table[row, :used] = blocks[:used]
            self._fields[2, row] = blocks[used - 1] * tokens_per_block + position % tokens_per_block
        self._fields[:, live:] = [[0], [0], [self._row0], [1]]
        self._table[live:, 0] = self._model.scratch_block
        self._device.copy_(self._host, non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._model.device))
