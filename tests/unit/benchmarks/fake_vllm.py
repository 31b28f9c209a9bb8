"""What of vLLM's server the benchmark asks, without a model: one token an event, made from the prompt and the adapter.

A first token of 1, 2 or 3 asks for trouble: refused, broken off with an error, and cut.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

PLACE = Path(__file__).parent
REFUSED, BROKEN, CUT = 1, 2, 3


def tokens(model: str, prompt: Sequence[int], count: int) -> list[int]:
    """Return what the server answers."""
    return [sum(model.encode()) + 10_000 * len(prompt) + i for i in range(count)]


class Handler(BaseHTTPRequestHandler):
    """One request."""

    adapters: ClassVar[set[str]] = set()
    asked_for_health = 0

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Be ready at the second question only."""
        if self.path == "/version":
            self._answer(200, {"version": "0.0-fake"})
        else:
            Handler.asked_for_health += 1
            self._answer(503 if Handler.asked_for_health == 1 else 200, {})

    def do_POST(self) -> None:
        """Load an adapter, or stream."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/v1/load_lora_adapter":
            found = {each.name for each in Path(body["lora_path"]).iterdir()}
            complete = {"adapter_config.json", "adapter_model.safetensors"} <= found
            self.adapters.add(body["lora_name"])
            self._answer(200 if complete else 400, {"found": sorted(found)})
        elif body["prompt"][0] == REFUSED or body["model"] not in self.adapters | {"__base__"}:
            self._answer(404, {"error": "no such model"})
        else:
            self._stream(body)

    def _stream(self, body: dict) -> None:
        self.send_response(200)
        self.send_header("content-length" if body["prompt"][0] == CUT else "x-none", "100000")
        self.end_headers()
        for token in tokens(body["model"], body["prompt"], body["max_tokens"]):
            self._event({"choices": [{"index": 0, "text": "", "token_ids": [token]}]})
            if body["prompt"][0] in (BROKEN, CUT):
                break
        if body["prompt"][0] == BROKEN:
            self._event({"error": {"message": "out of slots"}})
        elif body["prompt"][0] != CUT:
            self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, chunk: dict) -> None:
        self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")

    def _answer(self, status: int, body: dict) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


if __name__ == "__main__":
    seen = {"argv": sys.argv[1:], "environ": dict(os.environ), "pid": os.getpid(), "cwd": str(Path.cwd())}
    (PLACE / "seen.json").write_text(json.dumps(seen))
    port = int(sys.argv[sys.argv.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
