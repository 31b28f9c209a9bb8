"""A replica in a few lines: raw HTTP on loopback, whose every answer a test may spoil, stop or cut off."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from fedllm.ids import sha256

BASE = sha256(b"tiny base")
WRONG = sha256(b"some other version")
WORDS = ("one ", "two ", "three ", "four")
USAGE = {"prompt_tokens": 7, "completion_tokens": len(WORDS), "prompt_tokens_details": {"cached_tokens": 3}}


@dataclass(eq=False)
class FakeReplica:
    """Speaks as ``fedllm serve`` does. Use it as an async context manager.

    Attributes
    ----------
    script : deque of str
        What becomes of the next completions, one each, then ``answer``. ``refuse:503`` answers with a status;
        ``reset`` cuts the connection before the answer, ``cut`` before the first event, ``break`` after the second
        one; ``truncate`` ends a stream without ``[DONE]``; ``error`` and ``error-later`` send an error event;
        ``mixed`` and ``mixed-later`` answer by another version; ``hold`` waits for `gate` after the first event, and
        before a whole answer.
    asked : list
        Path, headers and body of every completion.
    left : int
        Answers that were closed from the other side while they were held.
    """

    name: str
    healthy: bool = True
    script: deque[str] = field(default_factory=deque)
    always: str = "answer"
    asked: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)
    left: int = 0
    probes: int = 0
    refuse_probes: bool = False
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    port: int = 0

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> FakeReplica:
        self._writers: set[asyncio.StreamWriter] = set()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.die()

    async def die(self) -> None:
        """Go as a killed process goes: nothing listens, every connection is reset."""
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while (head := await reader.readuntil(b"\r\n\r\n")) and await self._answer(head, reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _answer(self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        first, *lines = head.decode().split("\r\n")
        headers = {n.lower(): v for n, _, v in (line.partition(": ") for line in lines if line)}
        body = json.loads(await reader.readexactly(int(headers.get("content-length", 0))) or b"null")
        path = first.split()[1]
        if path == "/health":
            return await _send(writer, 200 if self.healthy else 500, {"status": "ok", "base": "tiny"})
        if headers.get("x-fedllm-tenant") == "router-probe":
            self.probes += 1
            if self.refuse_probes:
                return await _send(writer, 404, {"error": {"message": "no such model"}})
            return await self._complete(path, body, reader, writer, "answer")
        self.asked.append((path, headers, body))
        how = self.script.popleft() if self.script else self.always
        return await self._complete(path, body, reader, writer, how)

    async def _complete(
        self, path: str, body: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, how: str
    ) -> bool:
        chat = path == "/v1/chat/completions"
        if how == "reset":
            return False
        if how.startswith("refuse:"):
            error = {"message": f"refused {body['model']}", "type": "x", "param": None, "code": "x"}
            return await _send(writer, int(how.removeprefix("refuse:")), {"error": error})
        digest = WRONG if how == "mixed" else body["model"].partition("@")[2] or BASE
        made = {"id": f"cmpl-{self.name}-{len(self.asked)}", "model": body["model"], "system_fingerprint": digest}
        if body.get("stream"):
            return await self._stream(_events(made, how, chat=chat), digest, reader, writer, how)
        if how == "hold" and not await self._held(reader):
            return False
        said = "".join(WORDS)
        content = {"message": {"role": "assistant", "content": said}} if chat else {"text": said}
        choice = {"index": 0, **content, "finish_reason": "stop"}
        return await _send(writer, 200, {**made, "choices": [choice], "usage": USAGE}, digest)

    async def _stream(
        self, events: list[Any], digest: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, how: str
    ) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n")
        writer.write(f"x-fedllm-version: {digest}\r\n\r\n".encode())
        for index, event in enumerate(events):
            if how == "cut" or (how == "break" and index == 2):
                await writer.drain()
                return False
            _chunk(writer, b"data: " + json.dumps(event).encode() + b"\n\n")
            await writer.drain()
            if how == "hold" and index == 0 and not await self._held(reader):
                return False
        if how not in ("truncate", "error", "error-later"):
            _chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True

    async def _held(self, reader: asyncio.StreamReader) -> bool:
        """Wait for the gate; return False if the other side goes first."""
        gate, gone = asyncio.create_task(self.gate.wait()), asyncio.create_task(reader.read(1))
        try:
            await asyncio.wait({gate, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not gate.done():
                self.left += 1
            return gate.done()
        finally:
            gate.cancel()
            gone.cancel()
            await asyncio.gather(gate, gone, return_exceptions=True)


def _events(made: dict[str, Any], how: str, *, chat: bool) -> list[Any]:
    """Return a stream's events; the replica is always asked for the usage."""
    error = {"error": {"message": "it broke", "type": "server_error", "code": "x"}}
    if how == "error":
        return [error]
    contents = [{"delta": {"content": word}} if chat else {"text": word} for word in WORDS]
    events: list[Any] = [{**made, "choices": [{"index": 0, **content}], "usage": None} for content in contents]
    if how == "error-later":
        return [*events[:2], error]
    if how == "mixed-later":
        events[2] = {**events[2], "system_fingerprint": WRONG}
    return [*events, {**made, "choices": [], "usage": USAGE}]


async def _send(writer: asyncio.StreamWriter, status: int, body: Any, digest: str = "") -> bool:
    data = json.dumps(body).encode()
    head = f"HTTP/1.1 {status} Said\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n"
    writer.write(f"{head}x-fedllm-version: {digest}\r\n\r\n".encode() + data)
    await writer.drain()
    return True


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
