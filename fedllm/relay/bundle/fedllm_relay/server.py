"""The coordinator's end: one connection to the coordinator's socket for as long as this run lives.

Frames are a 4-byte length, a JSON header with the sizes of the blobs, and the blobs. Down come ``send``
(messages for nodes) and ``poll`` (a node's reply should be there now); up go ``hello``, ``nodes``, ``pushed``,
``failed``, and ``reply``, which is followed by a ``part`` for each part that it announces. A frame is handed to
gRPC only when the one before is on its way, and the next reply is fetched only after the last frame of the one
before: whoever reads slowly at the coordinator stops Flower here, not in this process's memory. When the
connection ends, so does the run: the coordinator starts another one.
"""

import json
import queue
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

LINK = "/fedllm.Relay/Link"
UNLIMITED = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))
NODES_EVERY_S = 2.0
NODES_EVERY_PENDING_S = 10.0
STALL_S = 15.0
"""Seconds after which the reply that is being fetched no longer holds the others up."""
MAX_HEAD = 64 << 20
MAX_PART = (4 << 20) + 4096
MAX_PARTS = 4096
NOT_PUSHED = -1
UNREADABLE = -2

app = ServerApp()


def _identity(data: bytes) -> bytes:
    return data


def _pack(header: dict[str, Any], *blobs: bytes) -> bytes:
    encoded = json.dumps({**header, "sizes": [len(b) for b in blobs]}).encode()
    return b"".join((struct.pack(">I", len(encoded)), encoded, *blobs))


def _unpack(frame: bytes) -> tuple[dict[str, Any], list[bytes]]:
    (size,) = struct.unpack_from(">I", frame)
    header = json.loads(frame[4 : 4 + size])
    blobs, at = [], 4 + size
    for each in header["sizes"]:
        blobs.append(frame[at : at + each])
        at += each
    return header, blobs


class Link:
    """The stream to the coordinator: `down` holds received frames, then None once the stream has ended."""

    def __init__(self, socket: str) -> None:
        self.down: queue.Queue[bytes | None] = queue.Queue()
        self._up: queue.Queue[bytes | None] = queue.Queue()
        self._unsent = 0
        self._ended = False
        self._moved = threading.Condition()
        self._channel = grpc.insecure_channel(f"unix:{socket}", options=UNLIMITED)
        call = self._channel.stream_stream(LINK, request_serializer=_identity, response_deserializer=_identity)
        self._frames = call(self._outgoing())
        threading.Thread(target=self._receive, daemon=True).start()

    def _outgoing(self) -> Iterator[bytes]:
        while (frame := self._up.get()) is not None:
            yield frame
            del frame
            # gRPC asks for the next frame when it has sent this one, which flow control may delay
            with self._moved:
                self._unsent -= 1
                self._moved.notify_all()

    def _receive(self) -> None:
        try:
            for frame in self._frames:
                self.down.put(frame)
        except grpc.RpcError:
            pass  # an ended stream and a broken one mean the same: this run is over
        finally:
            with self._moved:
                self._ended = True
                self._moved.notify_all()
            self.down.put(None)

    def send(self, header: dict[str, Any], *blobs: bytes) -> None:
        """Send one frame to the coordinator; returns when it is sent, or when the stream has ended."""
        with self._moved:
            self._unsent += 1
            self._up.put(_pack(header, *blobs))
            self._moved.wait_for(lambda: self._ended or not self._unsent)

    def close(self) -> None:
        """End the stream."""
        self._up.put(None)
        self._channel.close()


class _Pull(threading.Thread):
    """Fetches one reply, if it is there; a thread because a node that stops in mid-upload makes it last."""

    def __init__(self, grid: Grid, identifier: str) -> None:
        super().__init__(daemon=True)
        self._grid = grid
        self._identifier = identifier
        self.messages: list[Message] = []
        self.error: Exception | None = None

    def run(self) -> None:
        """Fetch."""
        try:
            self.messages = list(self._grid.pull_messages([self._identifier]))
        except Exception as error:  # noqa: BLE001 - a hostile node's reply can be wrong in any way
            self.error = error


class Relay:
    """Pushes what came down, pulls what is pending, one reply at a time, reports both."""

    def __init__(self, grid: Grid, link: Link) -> None:
        self._grid = grid
        self._link = link
        self._pending: dict[str, dict[str, Any]] = {}
        self._stalled: dict[str, _Pull] = {}
        self._poll_s = NODES_EVERY_S
        self._nodes: list[str] | None = None
        self._nodes_at = float("-inf")

    def run(self) -> None:
        """Work until the stream ends; a pending reply is asked for when told, and once in `_poll_s` seconds."""
        self._report_nodes()
        while self._take(min(NODES_EVERY_S, max(0.0, self._next_due() - time.monotonic()))):
            if self._next_due() <= time.monotonic():
                self._pull_next()
            self._report_nodes()

    def _next_due(self) -> float:
        return next((float(item["due"]) for item in self._pending.values()), float("inf"))

    def _take(self, wait_s: float) -> bool:
        try:
            frame = self._link.down.get(timeout=wait_s)
        except queue.Empty:
            return True
        if frame is None:
            return False
        header, blobs = _unpack(frame)
        if header["op"] == "send":
            self._poll_s = header["poll_s"]
            self._push(header["items"], blobs)
        elif header["op"] == "poll":
            told = {i: {**item, "due": 0.0} for i, item in self._pending.items() if item["node"] == header["node"]}
            self._pending = told | {i: item for i, item in self._pending.items() if i not in told}
        return True

    def _push(self, items: list[dict[str, Any]], blobs: list[bytes]) -> None:
        messages = [
            Message(
                RecordDict({"envelope": ConfigRecord({"head": blob})}),
                dst_node_id=int(item["node"]),
                message_type="train.relay",
                ttl=float(item["ttl_s"]),
            )
            for item, blob in zip(items, blobs, strict=True)
        ]
        ids = list(self._grid.push_messages(messages)) or [None] * len(items)
        self._link.send({"op": "pushed"})
        for item, identifier in zip(items, ids, strict=True):
            if identifier:
                self._pending[identifier] = {**item, "due": time.monotonic() + self._poll_s}
            else:
                self._link.send({"op": "failed", "tag": item["tag"], "code": NOT_PUSHED})

    def _pull_next(self) -> None:
        identifier = next(iter(self._pending))
        item = self._pending.pop(identifier)
        pull = self._stalled.pop(identifier, None)
        if pull is None:
            pull = _Pull(self._grid, identifier)
            pull.start()
            pull.join(STALL_S)
        if pull.is_alive():
            self._stalled[identifier] = pull
        if pull.is_alive() or not (pull.messages or pull.error):
            self._pending[identifier] = {**item, "due": time.monotonic() + self._poll_s}
        elif pull.error:
            print(f"a reply could not be fetched: {type(pull.error).__name__}", flush=True)  # noqa: T201
            self._link.send({"op": "failed", "tag": item["tag"], "code": UNREADABLE})
        else:
            self._pass_on(item["tag"], pull.messages[0])

    def _pass_on(self, tag: str, reply: Message) -> None:
        if reply.has_error():
            self._link.send({"op": "failed", "tag": tag, "code": reply.error.code})
            return
        try:
            arrays = reply.content.array_records.get("parts", {})
            head, parts = reply.content["envelope"]["head"], [arrays[name].data for name in sorted(arrays)]
        except (KeyError, TypeError):
            head, parts = b"", []
        bounded = len(parts) <= MAX_PARTS and all(len(part) <= MAX_PART for part in parts)
        if not isinstance(head, bytes) or not 0 < len(head) <= MAX_HEAD or not bounded:
            self._link.send({"op": "failed", "tag": tag, "code": UNREADABLE})
            return
        self._link.send({"op": "reply", "tag": tag, "parts": len(parts)}, head)
        for part in parts:
            self._link.send({"op": "part", "tag": tag}, part)

    def _report_nodes(self) -> None:
        every_s = NODES_EVERY_PENDING_S if self._pending else NODES_EVERY_S
        if time.monotonic() - self._nodes_at < every_s:
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
        Relay(grid, link).run()
    finally:
        link.close()
