"""Answers that a tenant has had before: at temperature 0 the same question has the same answer.

Off unless the operator gives it memory. An answer is found again for the same tenant, the same version and the same
body only; streams, several continuations, tools and log probabilities are never kept. Contents are answers: they are
never logged, and go with the process.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedllm.ids import Digest

_ADDRESS = ("model", "stream", "stream_options", "user", "metadata", "store")
_NEVER = ("tools", "tool_choice", "functions", "function_call", "logprobs", "top_logprobs", "stream")
_ENTRY_BYTES = 512
"""What an entry costs beside its answer, about."""


@dataclass(frozen=True)
class Key:
    """What an answer is found by; made by `key_of`."""

    tenant: str
    digest: Digest
    asked: str


def key_of(tenant: str, digest: Digest | None, route: str, body: Mapping[str, Any]) -> Key | None:
    """Return the key of a request, None if its answer must not be kept.

    Parameters
    ----------
    tenant : str
        Who asks: part of the key, so that nobody is answered with what another was.
    digest : Digest or None
        The version bound; the base is not cached, for a router does not know its digest before it answers.
    route : str
        Path of the request.
    body : Mapping
        As asked for; compared in its canonical JSON form.
    """
    if digest is None or body.get("temperature") != 0 or body.get("n") not in (None, 1):
        return None
    if any(body.get(name) for name in _NEVER) or isinstance(body.get("logprobs"), int):
        return None
    rest = {name: value for name, value in body.items() if name not in _ADDRESS}
    canonical = json.dumps([route, rest], sort_keys=True, separators=(",", ":")).encode()
    return Key(tenant, digest, hashlib.sha256(canonical).hexdigest())


class Predictions:
    """Kept answers, the least recently used of which go first.

    Parameters
    ----------
    max_bytes : int
        Of all answers together, of all tenants.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[Key, tuple[str, bytes]] = OrderedDict()
        self.bytes = 0
        self.hits = self.misses = 0

    def find(self, key: Key, tenant: str) -> dict[str, Any] | None:
        """Return a kept answer's body with all of its prompt counted as cached.

        Whose it is and what made it stand in the answer's entry, too, and are compared: were a key ever made wrongly,
        the answer is not found.
        """
        owner, data = self._kept.get(key, ("", b"{}"))
        body: dict[str, Any] = json.loads(data)
        if not tenant or owner != tenant or body.get("system_fingerprint") != key.digest:
            self.misses += 1
            return None
        self.hits += 1
        self._kept.move_to_end(key)
        usage = body.get("usage")
        if isinstance(usage, dict):
            usage["prompt_tokens_details"] = {"cached_tokens": usage.get("prompt_tokens", 0)}
        return body

    def keep(self, key: Key, tenant: str, body: Mapping[str, Any]) -> None:
        """Keep an answer, if it is not larger than all that may be kept."""
        data = json.dumps(body).encode()
        self._drop(key)
        if len(data) + _ENTRY_BYTES > self._max_bytes:
            return
        self._kept[key] = tenant, data
        self.bytes += len(data) + _ENTRY_BYTES
        while self.bytes > self._max_bytes:
            self._drop(next(iter(self._kept)))

    def _drop(self, key: Key) -> None:
        _, data = self._kept.pop(key, ("", None))
        if data is not None:
            self.bytes -= len(data) + _ENTRY_BYTES
