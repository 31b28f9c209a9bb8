"""The coordinator's end: one connection to the coordinator's socket for as long as this run lives.

Frames are a 4-byte length, a JSON header with the sizes of the parts, and the parts. Down comes ``send``
(messages for nodes); up go ``hello``, ``nodes``, ``reply`` and ``failed``. When the connection ends, so does
the run: the coordinator starts another one.
"""

import json
import queue
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

LINK = "/fedllm.Relay/Link"
UNLIMITED = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))
NODES_EVERY_S = 2.0

app = ServerApp()


def _identity(data: bytes) -> bytes:
    return data


def _pack(header: dict[str, Any], *parts: bytes) -> bytes:
    encoded = json.dumps({**header, "sizes": [len(p) for p in parts]}).encode()
    return b"".join((struct.pack(">I", len(encoded)), encoded, *parts))


def _unpack(frame: bytes) -> tuple[dict[str, Any], list[bytes]]:
    (size,) = struct.unpack_from(">I", frame)
    header = json.loads(frame[4 : 4 + size])
    parts, at = [], 4 + size
    for each in header["sizes"]:
        parts.append(frame[at : at + each])
        at += each
    return header, parts


class Link:
    """The stream to the coordinator: `down` holds received frames, then None once the stream has ended."""

    def __init__(self, socket: str) -> None:
        self.down: queue.Queue[bytes | None] = queue.Queue()
        self._up: queue.Queue[bytes | None] = queue.Queue()
        self._channel = grpc.insecure_channel(f"unix:{socket}", options=UNLIMITED)
        call = self._channel.stream_stream(LINK, request_serializer=_identity, response_deserializer=_identity)
        self._frames = call(self._outgoing())
        threading.Thread(target=self._receive, daemon=True).start()

    def _outgoing(self) -> Iterator[bytes]:
        while (frame := self._up.get()) is not None:
            yield frame

    def _receive(self) -> None:
        try:
            for frame in self._frames:
                self.down.put(frame)
        except grpc.RpcError:
            pass  # an ended stream and a broken one mean the same: this run is over
        finally:
            self.down.put(None)

    def send(self, header: dict[str, Any], *parts: bytes) -> None:
        """Queue one frame for the coordinator."""
        self._up.put(_pack(header, *parts))

    def close(self) -> None:
        """End the stream."""
        self._up.put(None)
        self._channel.close()


class Relay:
    """Pushes what came down, pulls what is pending, reports both."""

    def __init__(self, grid: Grid, link: Link) -> None:
        self._grid = grid
        self._link = link
        self._pending: dict[str, str] = {}
        self._nodes: list[str] | None = None
        self._nodes_at = 0.0

    def run(self, poll_s: float) -> None:
        """Work until the stream ends."""
        while self._take(poll_s if self._pending else NODES_EVERY_S):
            if self._pending:
                self._pull()
            self._report_nodes()

    def _take(self, wait_s: float) -> bool:
        try:
            frame = self._link.down.get(timeout=wait_s)
        except queue.Empty:
            return True
        if frame is None:
            return False
        header, parts = _unpack(frame)
        if header["op"] == "send":
            self._push(header["items"], parts)
        return True

    def _push(self, items: list[dict[str, Any]], parts: list[bytes]) -> None:
        messages = [
            Message(
                RecordDict({"envelope": ArrayRecord({"bytes": Array(np.frombuffer(part, dtype=np.uint8))})}),
                dst_node_id=int(item["node"]),
                message_type="train.relay",
                ttl=float(item["ttl_s"]),
            )
            for item, part in zip(items, parts, strict=True)
        ]
        ids = list(self._grid.push_messages(messages)) or [None] * len(items)
        for item, identifier in zip(items, ids, strict=True):
            if identifier:
                self._pending[identifier] = item["tag"]
            else:
                self._link.send({"op": "failed", "tag": item["tag"], "code": -1})

    def _pull(self) -> None:
        for reply in self._grid.pull_messages(list(self._pending)):
            tag = self._pending.pop(reply.metadata.reply_to_message_id, None)
            if tag is None:
                continue
            if reply.has_error():
                self._link.send({"op": "failed", "tag": tag, "code": reply.error.code})
            else:
                data = reply.content["envelope"]["bytes"].numpy().tobytes()
                self._link.send({"op": "reply", "tag": tag}, data)

    def _report_nodes(self) -> None:
        if time.monotonic() - self._nodes_at < NODES_EVERY_S:
            return
        self._nodes_at = time.monotonic()
        nodes = sorted(str(node) for node in self._grid.get_node_ids())
        if nodes != self._nodes:
            self._nodes = nodes
            self._link.send({"op": "nodes", "nodes": nodes})


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Connect to the coordinator and relay until it hangs up."""
    link = Link(str(context.run_config["socket"]))
    link.send({"op": "hello", "token": str(context.run_config["run-token"])})
    try:
        Relay(grid, link).run(float(context.run_config["poll-s"]))
    finally:
        link.close()
