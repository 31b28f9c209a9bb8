"""vLLM as a replica behind the router: which names it is asked by, how a version gets there, and how it leaves.

A version's name on a replica is ``fedllm-<digest>``. A name, and the folder behind it, never stand for other bytes:
``load_inplace`` is not used, for it changes streams in the middle, finds blocks of the old weights in the prefix cache,
and reads the folder again in every step. vLLM itself loads a version when it is first named, by the plugin in
``plugins/vllm-resolver``, or from a shared folder whose files are verified here.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from fedllm.config import unknown_key
from fedllm.errors import (
    AdapterInvalid,
    AuthenticationError,
    ConfigError,
    FedllmError,
    IntegrityError,
    NotFound,
    PeerUnavailable,
)
from fedllm.ids import Digest
from fedllm.registry.model import AdapterVersion
from fedllm.rng import Rng
from fedllm.serving.access import Ticket
from fedllm.serving.openai import read_chat, read_completion
from fedllm.serving.router.replica_file import ReplicaConfig
from fedllm.serving.router.upstream import Blame, ReplicaFailed
from fedllm.telemetry import event

_LOG = logging.getLogger("fedllm.serving.vllm")
PREFIX = "fedllm-"
_PROBE_SCOPE = "router-probe"
_PASSED = (
    *("messages", "prompt", "n", "stop", "stop_token_ids", "ignore_eos", "seed", "logit_bias"),
    *("presence_penalty", "frequency_penalty", "logprobs", "top_logprobs", "response_format"),
    *("tools", "tool_choice", "parallel_tool_calls", "stream", "stream_options", "return_token_ids"),
)
"""What is passed on as it was asked for. vLLM knows more: priorities, salts, transfers of the cache between servers.
None of that is a tenant's to say."""


@dataclass(frozen=True)
class VllmOptions:
    """What ``replicas.toml`` says of a vLLM replica beyond address and key.

    Parameters
    ----------
    slots : int
        Its ``--max-loras``: versions that run at once. vLLM does not tell it, so it is written down.
    base : bool
        Whether it may be asked for the base. vLLM on a CPU (0.32) applies an adapter to rows of the base that share a
        step with rows of adapters.
    adapters : str
        Folder on a shared disk in which versions lie, each under its digest, at the same path here and there. Empty:
        the replica has the resolver plugin.
    min_ready : int or None
        Replicas that must have a version before an alias moves to it; None: all that are healthy.
    """

    slots: int
    base: bool = False
    adapters: str = ""
    min_ready: int | None = None

    @classmethod
    def read(cls, table: Mapping[str, Any], where: str) -> VllmOptions:
        """Read a replica's table, the common keys left out.

        Raises
        ------
        ConfigError
            Naming the key.
        """
        for key, value in table.items():
            if key not in _OPTIONS:
                raise unknown_key(key, list(_OPTIONS), where=where)
            if type(value) is not _OPTIONS[key]:
                raise ConfigError(f"{where} {key} is a {type(value).__name__}, {_OPTIONS[key].__name__} expected")
        if "slots" not in table:
            raise ConfigError(f"{where} slots is missing", hint="it is the --max-loras that vLLM was started with")
        for key in ("slots", "min_ready"):
            if table.get(key, 1) < 1:
                raise ConfigError(f"{where} {key} is {table[key]}, at least 1 expected")
        return cls(**table)


_OPTIONS: dict[str, type] = {"slots": int, "base": bool, "adapters": str, "min_ready": int}


def slots_needed(aliases: int, versions_in_flight: int = 1) -> int:
    """Return the slots of a replica that serves so many aliases.

    Parameters
    ----------
    aliases : int
    versions_in_flight : int
        Versions of one alias beside the one that it serves: a new one that is made ready, old ones whose streams run.
    """
    return aliases * (1 + versions_in_flight)


def enough(replicas: Iterable[tuple[int | None, bool]]) -> bool:
    """Whether an alias may move to a version.

    Parameters
    ----------
    replicas : Iterable of (int or None, bool)
        Of each healthy replica its `min_ready`, and whether it is ready.
    """
    rows = list(replicas)
    ready = sum(is_ready for _, is_ready in rows)
    return ready > 0 and all(is_ready if least is None else ready >= least for least, is_ready in rows)


def served_name(digest: Digest) -> str:
    """Return a version's name on every vLLM replica."""
    return PREFIX + digest


class VllmKind:
    """A vLLM server. It implements `fedllm.serving.router.kinds.ReplicaKind`.

    Parameters
    ----------
    config : ReplicaConfig
    client : httpx.AsyncClient
        Its base address is the replica's.
    options : VllmOptions
    rng : Rng
        For salts of requests that share their prefix cache with nobody.
    base_name : str
        Its ``--served-model-name``.
    """

    on_demand = False

    def __init__(
        self, config: ReplicaConfig, client: httpx.AsyncClient, options: VllmOptions, rng: Rng, *, base_name: str
    ) -> None:
        self._name = config.name
        self._key = {"authorization": f"Bearer {config.key}"} if config.key else {}
        self._client = client
        self._options = options
        self._rng = rng
        self._base_name = base_name
        self._base: Digest | None = None
        self._held: set[Digest] = set()
        self._preparing: set[Digest] = set()
        self._aliases: dict[str, Digest] = {}
        self._told = ""
        self._turns: defaultdict[Digest, asyncio.Lock] = defaultdict(asyncio.Lock)

    @property
    def min_ready(self) -> int | None:
        """See `VllmOptions`."""
        return self._options.min_ready

    def body(
        self,
        asked: dict[str, Any],
        version: AdapterVersion | None,
        alias: str,  # noqa: ARG002 - the protocol's
        scope: str = "",
    ) -> dict[str, Any]:
        """Return the body for ``fedllm-<digest>``; it means what it means at a native replica.

        Fields are judged by the same reader, and defaults are written out: vLLM's own depend on the route and on the
        base's ``generation_config.json``.

        Parameters
        ----------
        alias : str
            Not sent: one name for a version, whatever aliases lead to it.
        scope : str
            Whose prefix cache is used; empty: nobody else's.

        Raises
        ------
        RequestInvalid
            If a native replica would refuse the request.
        ReplicaFailed
            If it is for the base, which this replica does not serve; another one may.
        """
        if version is None and not (self._options.base and self._base):
            raise ReplicaFailed("the base is not served here", Blame.NONE)
        read = read_chat if "messages" in asked else read_completion
        params = read(asked, stop_token_ids=frozenset()).params
        return {
            **{name: asked[name] for name in _PASSED if asked.get(name) is not None},
            "model": self._base_name if version is None else served_name(version.digest),
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "min_p": params.min_p,
            "repetition_penalty": params.repetition_penalty,
            "cache_salt": f"scope:{scope}" if scope else f"once:{self._rng.token(16).hex()}",
        }

    def headers(self, ticket: Ticket, alias: str) -> dict[str, str]:  # noqa: ARG002 - the protocol's
        """Return key and trace; vLLM needs to know no tenant."""
        return {**self._key, **ticket.trace}

    def answered(self, headers: Mapping[str, str] | None, body: Mapping[str, Any]) -> list[str]:  # noqa: ARG002
        """Return the digest in the model's name, which vLLM writes into every answer and every event."""
        model = body.get("model")
        if model == self._base_name and self._options.base and self._base:
            return [self._base]
        return [model.removeprefix(PREFIX)] if isinstance(model, str) and model.startswith(PREFIX) else []

    async def health(self, client: httpx.AsyncClient) -> bool:
        """Whether its engine lives and serves this router's base."""
        if not (await client.get("/health", headers=self._key)).is_success:
            return False
        answer = await client.get("/v1/models", headers=self._key)
        if self._base_name in _model_ids(answer):
            return True
        self._tell(
            f"replica {self._name} lives, and its /v1/models ({answer.status_code}) does not name {self._base_name}",
            "its --served-model-name must be the router's base_name, and key_file hold its --api-key",
        )
        return False

    async def prepare(self, version: AdapterVersion, alias: str) -> None:
        """Have a version loaded and prove it by one token.

        Raises
        ------
        ConfigError
            If it would need a slot more than there are; nothing was sent then.
        NotFound
            If the replica finds no such version, or could not verify it: its log has the reason.
        AdapterInvalid
            If it has the version and cannot load it.
        DigestMismatch, IntegrityError
            If the shared folder holds other files; if something else answered.
        AuthenticationError, PeerUnavailable
        """
        digest = version.digest
        with self._wanted(digest) as ahead:
            async with self._turns[digest]:
                await self._check_slots(version, alias, ahead)
                if self._options.adapters:
                    await self._load(version)
                await self._probe(version)
                self._held.add(digest)
                self._aliases[alias] = digest
                self._base = version.manifest.base

    async def unload(self, version: AdapterVersion) -> None:
        """Have the version's name forgotten; its weights give way when another version needs the slot.

        A version that is being prepared again stays.

        Raises
        ------
        PeerUnavailable, AuthenticationError
        """
        digest = version.digest
        if digest in self._preparing:
            return
        async with self._turns[digest]:
            self._held.discard(digest)
            self._aliases = {alias: held for alias, held in self._aliases.items() if held != digest}
            answer = await self._post("/v1/unload_lora_adapter", {"lora_name": served_name(digest)})
            if not answer.is_success and answer.status_code != httpx.codes.NOT_FOUND:
                raise self._error(answer.status_code, version, "an unload")

    @contextmanager
    def _wanted(self, digest: Digest) -> Iterator[set[Digest]]:
        """Note that a version is being prepared; yield those that were before it."""
        ahead = set(self._preparing)
        self._preparing.add(digest)
        try:
            yield ahead
        finally:
            self._preparing.discard(digest)

    async def _check_slots(self, version: AdapterVersion, alias: str, ahead: set[Digest]) -> None:
        """Raise if a version more would be too many.

        Of several at once the first ones get what is free: if each counted all, none would. Versions that a restart
        has taken with it do not count.
        """
        answer = await self._get("/v1/models")
        if not answer.is_success:
            raise self._error(answer.status_code, version, "a look at its slots")
        self._held &= {Digest(model.removeprefix(PREFIX)) for model in _model_ids(answer)}
        at_once = self._held | ahead | {version.digest}
        if len(at_once) <= self._options.slots:
            return
        refusal = ConfigError(
            f"replica {self._name} would run {len(at_once)} versions at once for {version.name}, "
            f"slots is {self._options.slots}",
            hint=f"{slots_needed(len({alias, *self._aliases}))} slots let each of its aliases move: start vLLM with "
            "that --max-loras and set slots, or wait until older versions have drained",
        )
        self._tell(refusal.message, refusal.hint)
        raise refusal

    def _tell(self, message: str, hint: str | None) -> None:
        """Log what an operator must mend, once: it is met again every second."""
        if message != self._told:
            self._told = message
            event(_LOG, message, level=logging.ERROR, hint=hint)

    async def _load(self, version: AdapterVersion) -> None:
        """Have a version loaded from the shared folder, whose files are verified before."""
        folder = Path(self._options.adapters) / version.digest
        await asyncio.to_thread(_verify, version, folder)
        asked = {"lora_name": served_name(version.digest), "lora_path": str(folder)}
        answer = await self._post("/v1/load_lora_adapter", asked)
        # 400 says that the name is loaded already. A name is for ever, so that is as good; the probe decides.
        if not answer.is_success and answer.status_code != httpx.codes.BAD_REQUEST:
            raise self._error(answer.status_code, version, "a load")

    async def _probe(self, version: AdapterVersion) -> None:
        asked = {"model": "", "prompt": "a", "max_tokens": 1, "temperature": 0}
        answer = await self._post("/v1/completions", self.body(asked, version, "", _PROBE_SCOPE))
        if not answer.is_success:
            raise self._error(answer.status_code, version, "a probe")
        if self.answered(None, _object(answer)) != [version.digest]:
            raise IntegrityError(
                f"replica {self._name} answered a probe of {version.name} by another model",
                hint="VLLM_SKIP_MODEL_NAME_VALIDATION must not be set there",
            )

    def _error(self, status: int, version: AdapterVersion, what: str) -> FedllmError:
        """Return vLLM's refusal in our terms; its own text could quote anything, so it stays in its log."""
        said = f"replica {self._name} answered {status} to {what} of {version.name}"
        if status in (401, 403):
            return AuthenticationError(said, hint="key_file must hold the replica's --api-key")
        if status == httpx.codes.NOT_FOUND:
            return NotFound(said, hint="its log says why the resolver found nothing, or that no resolver is there")
        if status in (400, 422, 500):
            return AdapterInvalid(said, hint="its log says why; a rank above --max-lora-rank is the usual reason")
        return PeerUnavailable(said)

    async def _get(self, path: str) -> httpx.Response:
        try:
            return await self._client.get(path, headers=self._key)
        except httpx.HTTPError as error:
            raise self._silent(error) from None

    async def _post(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        try:
            return await self._client.post(path, json=body, headers=self._key)
        except httpx.HTTPError as error:
            raise self._silent(error) from None

    def _silent(self, error: httpx.HTTPError) -> PeerUnavailable:
        return PeerUnavailable(f"replica {self._name} does not answer ({type(error).__name__})")


def _model_ids(answer: httpx.Response) -> set[str]:
    """Return the names that ``/v1/models`` lists; none if it does not answer so."""
    rows = _object(answer).get("data") if answer.is_success else None
    return {str(row.get("id")) for row in rows if isinstance(row, dict)} if isinstance(rows, list) else set()


def _object(answer: httpx.Response) -> dict[str, Any]:
    try:
        body = answer.json()
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def _verify(version: AdapterVersion, folder: Path) -> None:
    """Raise `NotFound` or `DigestMismatch` unless a folder holds exactly a version's files."""
    if not folder.is_dir():
        raise NotFound(f"{folder} is not there", hint="the files of a version are put there before it is published")
    version.manifest.check_files({file.name: file.read_bytes() for file in folder.iterdir()})
