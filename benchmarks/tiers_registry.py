"""A registry of thousands of signed versions, on a loopback port, as the coordinator's API answers."""

from __future__ import annotations

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.hotswap_model import ForcingAdapters
from fedllm.adapter import to_peft
from fedllm.identity import SigningIdentity
from fedllm.ids import AliasName, Digest, sha256
from fedllm.messages.plan import Recipe
from fedllm.registry.model import (
    MANIFEST_VERSION,
    AdapterVersion,
    AliasTable,
    FileRecord,
    Manifest,
    PrivacyRecord,
    SignedManifest,
)
from fedllm.registry.remote import aliases_to_json, manifest_to_json


class SignedRegistry:
    """Versions with an alias each, ``bench/a1`` onwards; answers between `__enter__` and `__exit__`.

    Parameters
    ----------
    folder : Path
        Where their files are written.
    adapters : ForcingAdapters
        Makes them.
    count : int
        How many.
    """

    def __init__(self, folder: Path, adapters: ForcingAdapters, count: int) -> None:
        self.coordinator = SigningIdentity.generate()
        self.digests: dict[AliasName, Digest] = {}
        self.token_of: dict[Digest, int] = {}
        self.asked: Counter[str] = Counter()
        self.version_bytes = self.state_bytes = 0
        self._folder = folder
        self._answers: dict[str, bytes] = {}
        folder.mkdir()
        rows = []
        for number, token in enumerate(adapters.tokens(count), 1):
            state = adapters.make(token)
            files = to_peft(state, base_name="base")
            records = {name: FileRecord(sha256(data), len(data)) for name, data in files.items()}
            manifest = Manifest(
                version=MANIFEST_VERSION, federation=f"f{number}", number=1, parent=None, round=1, base=state.spec.base,
                spec=state.spec, files=records, state=state.digest, method="ffa",
                recipe=Recipe("sgd", 0.1, 1, 1, 1, 64), metrics={},
                privacy=PrivacyRecord("record", "add-or-remove-one", None, 1e-5, "nothing: a benchmark", "advisory"),
                cohort_size=3, survivors=3, plan=sha256(b"plan"), created=1.7e9,
            )  # fmt: skip
            version = AdapterVersion.of(manifest)
            row = manifest_to_json(SignedManifest.sign(manifest, self.coordinator), version)
            rows.append(row)
            self.digests[AliasName(f"bench/a{number}")] = version.digest
            self.token_of[version.digest] = token
            self._answers[f"/v1/versions/{version.digest}"] = json.dumps(row).encode()
            for name, data in files.items():
                (folder / records[name].sha256).write_bytes(data)
            self.version_bytes = len(json.dumps(row)) + sum(map(len, files.values()))
            self.state_bytes = sum(factor.nbytes for factor in state.factors.values())
        self._answers["/v1/versions"] = json.dumps({"versions": rows}).encode()
        aliases = aliases_to_json(AliasTable(1, self.digests), self.coordinator)
        self._answers["/v1/aliases"] = json.dumps(aliases).encode()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, name="registry", daemon=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, path: str) -> bytes | None:
        """Return the body of an answer, or None if there is nothing under this path."""
        kind, _, name = path.removeprefix("/v1/").partition("/")
        self.asked[kind if name else f"all {kind}"] += 1
        if kind != "blobs":
            return self._answers.get(path)
        file = self._folder / name
        return file.read_bytes() if name.isalnum() and file.is_file() else None

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        answer = self.answer

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # head and body are two writes: without this, 40 ms lie between them

            def do_GET(self) -> None:
                data = answer(self.path.partition("?")[0])
                self.send_response(404 if data is None else 200)
                self.send_header("content-length", str(len(data or b"")))
                self.end_headers()
                self.wfile.write(data or b"")

            def log_message(self, *_: object) -> None:
                """Keep standard error for the benchmark."""

        return Handler
