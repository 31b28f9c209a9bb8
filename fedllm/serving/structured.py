"""Holding an output to a JSON schema or to a call of a function: grammars compiled by xgrammar, a mask a token.

Compilation runs on a thread of its own, one at a time; the latest grammars are kept. Values are written on one
line with ``", "`` and ``": "`` between them; objects have the properties of their schema, in its order.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedllm.errors import MissingExtra, Overloaded, RequestInvalid
from fedllm.serving.text import TextCodec

_KEPT = 64
_MOST_BYTES = 32 * 1024 * 1024
_MOST_WAITING = 16
# The second byte of a UTF-8 character is limited further after these first ones (RFC 3629 section 4).
_SECOND_BYTES = {0xE0: (0xA0, 0xBF), 0xED: (0x80, 0x9F), 0xF0: (0x90, 0xBF), 0xF4: (0x80, 0x8F)}


@dataclass(frozen=True)
class Shape:
    """One thing that an output may be.

    Parameters
    ----------
    schema : str
        JSON text of a schema, from `fedllm.serving.schema.check_schema`.
    call : str or None
        Then the output is ``{"name": call, "arguments": <value of the schema>}``.
    """

    schema: str = field(repr=False)
    call: str | None = None


class CompiledShapes:
    """A `Grammar`: a text of one of several shapes."""

    def __init__(self, compiled: Any, vocabulary: Vocabulary) -> None:
        self._compiled = compiled
        self._vocabulary = vocabulary
        self.size_bytes = int(compiled.memory_size_bytes)

    def start(self) -> ShapeState:
        """Return the state before the first token."""
        import xgrammar

        return ShapeState(xgrammar.GrammarMatcher(self._compiled), self._vocabulary)


class ShapeState:
    """A `GrammarState`."""

    def __init__(self, matcher: Any, vocabulary: Vocabulary) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._words = np.zeros((1, -(-vocabulary.size // 32)), dtype=np.int32)
        self._last = 0
        self._allowed: NDArray[np.bool_] | None = None

    def allowed(self, vocabulary: int) -> NDArray[np.bool_]:
        """Return which tokens may come next; ids that the tokenizer does not have may not."""
        if self._allowed is None:
            self._allowed = self._next()
        allowed_V = np.zeros(vocabulary, dtype=np.bool_)
        width = min(vocabulary, self._allowed.size)
        allowed_V[:width] = self._allowed[:width]
        return allowed_V

    def accept(self, token: int) -> bool:
        """Go on by one allowed token; return whether nothing but the end can follow."""
        if not self._matcher.accept_token(token):
            raise ValueError("the token is not one that the grammar allows")
        self._last = int(self._vocabulary.last_byte[token])
        self._allowed = self._next()
        ends = list(self._vocabulary.stop_token_ids)
        return bool(self._matcher.is_completed()) and self._allowed.sum() == self._allowed[ends].sum()

    def _next(self) -> NDArray[np.bool_]:
        self._matcher.fill_next_token_bitmask(self._words)
        bits = np.unpackbits(self._words.view(np.uint8)[0], count=self._vocabulary.size, bitorder="little")
        allowed = bits.view(np.bool_)
        if self._last in _SECOND_BYTES:
            low, high = _SECOND_BYTES[self._last]
            first = self._vocabulary.first_byte
            allowed &= (first >= low) & (first <= high)
        return allowed


class Vocabulary:
    """What the tokens spell, as grammars need it.

    Tokens with control characters or with bytes that are in no UTF-8 text are spelled as nothing, which forbids
    them: JSON on one line has no use for them.
    """

    def __init__(self, codec: TextCodec) -> None:
        self.spelled = [spelled if _usable(spelled) else b"" for spelled in codec.spelled()]
        self.size = len(self.spelled)
        self.stop_token_ids = tuple(sorted(i for i in codec.stop_token_ids if i < self.size))
        self.first_byte = np.array([s[0] if s else 0 for s in self.spelled], dtype=np.uint8)
        self.last_byte = np.array([s[-1] if s else 0 for s in self.spelled], dtype=np.uint8)


@dataclass
class _Work:
    """A compilation that waits or runs, and how many wait for it."""

    job: Future[CompiledShapes]
    done: asyncio.Future[CompiledShapes]
    waiters: int = 0


class Grammars:
    """Compiles shapes, off the event loop, and keeps the latest ones.

    What nobody waits for any more is not begun.

    Parameters
    ----------
    codec : TextCodec
        Whose tokens the grammars speak of.
    """

    def __init__(self, codec: TextCodec) -> None:
        self._codec = codec
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="fedllm-grammar")
        self._kept: OrderedDict[tuple[Shape, ...], CompiledShapes] = OrderedDict()
        self._compiling: dict[tuple[Shape, ...], _Work] = {}
        self._compiler: tuple[Any, Vocabulary] | None = None

    async def compile(self, shapes: Sequence[Shape]) -> CompiledShapes:
        """Return the grammar of texts that have one of the shapes.

        Raises
        ------
        RequestInvalid
            If a schema cannot be compiled, or no value fits it.
        Overloaded
            If too many others wait to be compiled.
        MissingExtra
            If xgrammar is not installed.
        """
        key = tuple(shapes)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        work = self._compiling.get(key)
        if work is None:
            if len(self._compiling) >= _MOST_WAITING:
                raise Overloaded(f"{_MOST_WAITING} schemas wait to be compiled, which is the limit", hint="retry later")
            job = self._worker.submit(self._compile, key)
            work = self._compiling[key] = _Work(job, asyncio.wrap_future(job))
            work.done.add_done_callback(lambda done: self._keep(key, done))
        work.waiters += 1
        try:
            return await asyncio.shield(work.done)
        finally:
            work.waiters -= 1
            # Only what has not begun can be cancelled; what runs is kept for whoever asks next.
            if not work.waiters and work.job.cancel():
                del self._compiling[key]

    def _keep(self, key: tuple[Shape, ...], done: asyncio.Future[CompiledShapes]) -> None:
        if done.cancelled():
            return
        del self._compiling[key]
        if done.exception() is not None:
            return
        self._kept[key] = done.result()
        while len(self._kept) > _KEPT or sum(g.size_bytes for g in self._kept.values()) > _MOST_BYTES:
            self._kept.popitem(last=False)

    def _compile(self, shapes: tuple[Shape, ...]) -> CompiledShapes:
        """Compile on the worker thread."""
        try:
            import xgrammar
        except ModuleNotFoundError as error:
            raise MissingExtra("serve", error.name or "xgrammar") from None
        if self._compiler is None:
            vocabulary = Vocabulary(self._codec)
            info = xgrammar.TokenizerInfo(
                vocabulary.spelled, xgrammar.VocabType.RAW, stop_token_ids=list(vocabulary.stop_token_ids)
            )
            self._compiler = (xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False), vocabulary)
        compiler, vocabulary = self._compiler
        try:
            parts = [_grammar(xgrammar.Grammar, shape) for shape in shapes]
            whole = parts[0] if len(parts) == 1 else xgrammar.Grammar.union(*parts)
            made = CompiledShapes(compiler.compile_grammar(whole), vocabulary)
        except (RuntimeError, ValueError, TypeError):
            # The compiler's own words quote the schema.
            raise RequestInvalid("a schema cannot be compiled to a grammar", hint="simplify it") from None
        if made.size_bytes > _MOST_BYTES:
            raise RequestInvalid(f"a schema needs {made.size_bytes} bytes as a grammar, {_MOST_BYTES} are allowed")
        if not made.start().allowed(vocabulary.size).any():
            raise RequestInvalid("no value fits this schema")
        return made


def _grammar(kind: Any, shape: Shape) -> Any:
    value = kind.from_json_schema(shape.schema, any_whitespace=False, strict_mode=True)
    if shape.call is None:
        return value
    before = json.dumps(f'{{"name": {json.dumps(shape.call)}, "arguments": ')
    return kind.concat(kind.from_ebnf(f"root ::= {before}"), value, kind.from_ebnf('root ::= "}"'))


def _usable(spelled: bytes) -> bool:
    """Whether bytes may stand within UTF-8 text without control characters; they may begin and end amid a character."""
    if any(byte < 0x20 for byte in spelled):
        return False
    start = next((i for i, byte in enumerate(spelled) if byte & 0xC0 != 0x80), len(spelled))
    rest = spelled[start:]
    if start > 3:
        return False
    try:
        rest.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return True
