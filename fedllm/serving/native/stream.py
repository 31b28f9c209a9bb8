"""What a request holds of the engine: its slot, and the queue its chunks come through."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from fedllm.errors import AdapterInvalid, FedllmError, RequestInvalid
from fedllm.ids import Digest
from fedllm.serving.engine import Chunk
from fedllm.serving.native.runner import GRAMMAR_STUCK
from fedllm.serving.native.sequence import Sequence


@dataclass(frozen=True)
class Output:
    """What a step made for one sequence, on its way to the event loop."""

    sequence_id: int
    item: Chunk | FedllmError
    ended: bool


class SlotLease:
    """A slot held for one request; released at the end of the `with` block."""

    def __init__(self, digest: Digest, slot: int, release: Callable[[], None]) -> None:
        self._digest = digest
        self.slot = slot
        self._release: Callable[[], None] | None = release

    @property
    def digest(self) -> Digest:
        """The version's digest."""
        return self._digest

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._release is not None:
            release, self._release = self._release, None
            release()


class QueueStream:
    """Chunks of one sequence as the step thread delivers them."""

    def __init__(self, sequence: Sequence, close: Callable[[Sequence], None]) -> None:
        self.sequence = sequence
        self._chunks: asyncio.Queue[Chunk | FedllmError] = asyncio.Queue()
        self._close = close
        self._begun = False
        self._ended = False

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that the prefix cache had when the sequence first ran; 0 before the first chunk."""
        return (self.sequence.prompt_cached or 0) if self._begun else 0

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        if self._ended:
            raise StopAsyncIteration
        item = await self._chunks.get()
        if isinstance(item, FedllmError):
            self._ended = True
            raise item
        self._begun = True
        self._ended = item.finish_reason is not None
        return item

    def put(self, item: Chunk | FedllmError) -> None:
        """Deliver a chunk, or the error that ends the stream."""
        self._chunks.put_nowait(item)

    async def aclose(self) -> None:
        """Cancel what is left."""
        self._ended = True
        self._close(self.sequence)


def delivery(sequence: Sequence, start: int) -> Chunk | FedllmError:
    """Return what a sequence has had since its `start`-th token, or why it failed."""
    if sequence.failure == GRAMMAR_STUCK:
        return RequestInvalid(GRAMMAR_STUCK)
    if sequence.failure is not None:
        return AdapterInvalid(sequence.failure)
    new = () if sequence.scoring else tuple(sequence.tokens[sequence.prompt_length + start :])
    return Chunk(new, sequence.finish_reason, tuple(sequence.logprobs[start:]))
