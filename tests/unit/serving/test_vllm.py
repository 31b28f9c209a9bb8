"""vLLM as a kind of replica: names, bodies, slots, preparing, errors. A fake server in a few lines stands for vLLM."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from patience import PATIENCE_S
from unit.serving.registry_fake import make_version
from unit.serving.tiny_llama import make_adapter

from fedllm.errors import (
    AdapterInvalid,
    AuthenticationError,
    ConfigError,
    DigestMismatch,
    IntegrityError,
    NotFound,
    PeerUnavailable,
    RequestInvalid,
)
from fedllm.rng import SeededRng
from fedllm.serving.router.replica_file import ReplicaConfig
from fedllm.serving.router.upstream import Blame, ReplicaFailed
from fedllm.serving.vllm import VllmKind, VllmOptions, enough, served_name, slots_needed

ALIAS = "acme/tools"
V1, V2, V3 = (make_version(make_adapter(seed), seed) for seed in (1, 2, 3))


class FakeVllm:
    """Answers as vLLM 0.32 does.

    Attributes
    ----------
    known : set of str
        What its resolver finds.
    held : str
        Path that waits for `gate`.
    loaded : set of str
        Names that it has.
    refuse : deque of (str, int)
        Path and status of answers to come.
    """

    def __init__(self, *versions: Any, resolver: bool = True) -> None:
        self.known = {served_name(v.version.digest) for v in versions} if resolver else set()
        self.loaded: set[str] = set()
        self.refuse: deque[tuple[str, int]] = deque()
        self.asked: list[tuple[str, Any]] = []
        self.echo = ""
        self.base = "tiny"
        self.gate = asyncio.Event()
        self.held = ""

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        """Answer one request."""
        path, body = request.url.path, json.loads(request.content or b"null")
        self.asked.append((path, body))
        if path == self.held:
            await self.gate.wait()
        if self.refuse and self.refuse[0][0] == path:
            return httpx.Response(self.refuse.popleft()[1], json={"error": {"message": "secret text"}})
        if path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": name} for name in (self.base, *self.loaded)]})
        if path == "/v1/load_lora_adapter":
            status = 400 if body["lora_name"] in self.loaded else 200
            self.loaded.add(body["lora_name"])
            return httpx.Response(status, json={})
        if path == "/v1/unload_lora_adapter":
            status = 200 if body["lora_name"] in self.loaded else 404
            self.loaded.discard(body["lora_name"])
            return httpx.Response(status, json={})
        if path == "/v1/completions":
            return self._complete(body["model"])
        return httpx.Response(200)

    def _complete(self, model: str) -> httpx.Response:
        if model not in self.loaded | {self.base}:
            if model not in self.known:
                return httpx.Response(404, json={"error": {"message": "does not exist"}})
            self.loaded.add(model)
        return httpx.Response(200, json={"model": self.echo or model, "choices": [{"index": 0, "text": "x"}]})

    def paths(self, name: str) -> list[Any]:
        """Return the bodies that a path was sent."""
        return [body for path, body in self.asked if path == name]


def kind_of(fake: Any, **options: Any) -> VllmKind:
    """Return the kind of a replica that the fake serves."""
    client = httpx.AsyncClient(transport=httpx.MockTransport(fake), base_url="http://replica")
    config = ReplicaConfig("r1", "http://replica", "vllm", "secret-key")
    return VllmKind(config, client, VllmOptions(**{"slots": 2, **options}), SeededRng(1), base_name="tiny")


async def until(true: Callable[[], Any]) -> None:
    """Wait until something is true."""
    async with asyncio.timeout(PATIENCE_S):
        while not true():  # noqa: ASYNC110 - a list that a request grows has no event
            await asyncio.sleep(0)


def prepare(kind: VllmKind, *versions: Any, alias: str = ALIAS) -> None:
    """Prepare versions, one after another."""

    async def body() -> None:
        for version in versions:
            await kind.prepare(version.version, alias)

    asyncio.run(body())


def test_the_name_on_a_replica_is_the_digest() -> None:
    """One name for the same bytes for ever, and no alias in it that could move."""
    body = kind_of(FakeVllm()).body({"model": ALIAS, "prompt": "a"}, V1.version, ALIAS, "acme")
    assert body["model"] == f"fedllm-{V1.version.digest}"
    assert ALIAS not in json.dumps(body)


def test_a_request_means_what_it_means_at_a_native_replica() -> None:
    """Defaults are written out: vLLM's differ by route and by the base's generation_config.json."""
    kind = kind_of(FakeVllm())
    plain = kind.body({"model": ALIAS, "prompt": "a", "stop": ["x"]}, V1.version, ALIAS, "acme")
    assert {name: plain[name] for name in ("max_tokens", "temperature", "top_p", "top_k", "stop")} == {
        "max_tokens": 256,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "stop": ["x"],
    }
    chat = {"model": ALIAS, "messages": [{"role": "user", "content": "a"}], "max_completion_tokens": 3, "stream": True}
    made = kind.body(chat, V1.version, ALIAS, "acme")
    assert (made["max_tokens"], made["messages"], made["stream"]) == (3, chat["messages"], True)


@pytest.mark.parametrize("field", ["cache_salt", "priority", "kv_transfer_params", "vllm_xargs", "lora_path"])
def test_what_only_vllm_knows_is_not_passed_on(field: str) -> None:
    """A tenant must not choose another's prefix cache, a place before others, or a server to fetch blocks from."""
    body = kind_of(FakeVllm()).body({"model": ALIAS, "prompt": "a", field: "evil"}, V1.version, ALIAS, "acme")
    assert "evil" not in body.values()


@pytest.mark.parametrize("asked", [{"prompt": ["a", "b"]}, {"prompt": "a", "guided_json": {}}, {"prompt": 3}])
def test_what_a_native_replica_refuses_is_refused(asked: dict[str, Any]) -> None:
    """The reader is the endpoint's own; nothing slips through to a server that would take it."""
    with pytest.raises(RequestInvalid):
        kind_of(FakeVllm()).body({"model": ALIAS, **asked}, V1.version, ALIAS, "acme")


def test_prefix_caches_are_shared_within_a_scope_only() -> None:
    """The salt is the scope; without one, no two requests have the same."""
    kind = kind_of(FakeVllm())
    asked = {"model": ALIAS, "prompt": "a"}
    scopes = ["acme", "acme", "other", "", ""]
    salts = [kind.body(asked, V1.version, ALIAS, scope)["cache_salt"] for scope in scopes]
    assert salts[0] == salts[1]
    assert len(set(salts)) == 4


def test_the_base_is_refused_unless_allowed() -> None:
    """Another replica may take it, so it is no fault of this one."""
    asked = {"model": "tiny", "prompt": "a"}
    for kind in (kind_of(FakeVllm(V1)), kind_of(FakeVllm(V1), base=True)):
        with pytest.raises(ReplicaFailed) as refused:  # allowed, but nobody knows yet which base it is
            kind.body(asked, None, "base")
        assert refused.value.blame is Blame.NONE
    prepare(kind, V1)
    assert kind.body(asked, None, "base")["model"] == "tiny"
    assert kind.answered(None, {"model": "tiny"}) == [V1.version.manifest.base]


def test_who_answered_is_read_from_the_models_name() -> None:
    """A base that answers in a version's place is noticed."""
    kind = kind_of(FakeVllm())
    assert kind.answered(None, {"model": served_name(V1.version.digest)}) == [V1.version.digest]
    assert [kind.answered(None, body) for body in ({"model": "tiny"}, {"model": 3}, {})] == [[], [], []]


def test_preparing_names_the_version_and_probes_it() -> None:
    """The resolver fetches when a name is first used; the probe has a scope of its own and one token."""
    fake = FakeVllm(V1)
    prepare(kind_of(fake), V1)
    (probe,) = fake.paths("/v1/completions")
    assert (probe["max_tokens"], probe["cache_salt"]) == (1, "scope:router-probe")
    assert fake.paths("/v1/load_lora_adapter") == []


def test_a_shared_folder_is_verified_and_loaded_without_load_inplace(tmp_path: Any) -> None:
    """Without the resolver vLLM would load whatever lies at a path."""
    folder = tmp_path / V1.version.digest
    folder.mkdir()
    for name, data in V1.files.items():
        (folder / name).write_bytes(data)
    fake = FakeVllm(resolver=False)
    kind = kind_of(fake, adapters=str(tmp_path))
    prepare(kind, V1, V1)  # the second time vLLM answers 400: it has the name
    first = fake.paths("/v1/load_lora_adapter")[0]
    assert first == {"lora_name": served_name(V1.version.digest), "lora_path": str(folder)}
    (folder / "adapter_config.json").write_bytes(b"{}")
    sent = len(fake.asked)
    with pytest.raises(DigestMismatch):
        prepare(kind, V1)
    with pytest.raises(NotFound):
        prepare(kind, V2)
    assert {path for path, _ in fake.asked[sent:]} == {"/v1/models"}


@pytest.mark.parametrize(
    ("status", "error"),
    [(404, NotFound), (400, AdapterInvalid), (500, AdapterInvalid), (401, AuthenticationError), (503, PeerUnavailable)],
)
def test_refusals_become_errors_of_ours(status: int, error: type[Exception]) -> None:
    """What vLLM writes stays in its log: it could quote anything."""
    fake = FakeVllm(V1)
    fake.refuse.append(("/v1/completions", status))
    with pytest.raises(error) as refused:
        prepare(kind_of(fake), V1)
    assert "secret" not in str(refused.value)
    assert "r1" in str(refused.value)


def test_another_models_answer_to_a_probe_is_refused() -> None:
    """With VLLM_SKIP_MODEL_NAME_VALIDATION set, vLLM answers any name by the base."""
    fake = FakeVllm(V1)
    fake.echo = "tiny"
    with pytest.raises(IntegrityError):
        prepare(kind_of(fake), V1)


def test_a_replica_that_does_not_answer_is_unavailable() -> None:
    """The follower asks such a replica again for a while."""

    def silent(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("no", request=request)

    with pytest.raises(PeerUnavailable):
        prepare(kind_of(silent), V1)


def test_a_version_too_many_is_refused_before_it_is_sent() -> None:
    """Two slots hold the old and the new version of one alias; the third has to wait until one is let go."""
    fake = FakeVllm(V1, V2, V3)
    kind = kind_of(fake)
    prepare(kind, V1, V2)
    probes = len(fake.paths("/v1/completions"))
    with pytest.raises(ConfigError, match="3 versions at once") as refused:
        prepare(kind, V3, alias="acme/other")
    assert "4 slots" in (refused.value.hint or "")
    assert len(fake.paths("/v1/completions")) == probes
    asyncio.run(kind.unload(V1.version))
    prepare(kind, V3, alias="acme/other")


@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions"])
def test_of_versions_prepared_at_once_the_first_get_the_slots(path: str) -> None:
    """Aliases that move in one moment must not take one slot both, and not keep each other from moving for ever."""
    fake = FakeVllm(V1, V2, V3)
    kind = kind_of(fake)

    async def body() -> list[Any]:
        fake.held = path
        asks = [asyncio.create_task(kind.prepare(v.version, f"acme/{i}")) for i, v in enumerate((V1, V2, V3))]
        await until(lambda: asks[2].done() or len(fake.paths("/v1/models")) == 3)
        fake.gate.set()
        return await asyncio.gather(*asks, return_exceptions=True)

    results = asyncio.run(body())
    assert results[:2] == [None, None]
    assert isinstance(results[2], ConfigError)


def test_slots_that_cannot_be_seen_are_not_taken_for_free() -> None:
    """A replica that refuses to list its models holds what it held."""
    fake = FakeVllm(V1, V2, V3)
    kind = kind_of(fake)
    prepare(kind, V1, V2)
    fake.refuse.append(("/v1/models", 401))
    with pytest.raises(AuthenticationError):
        prepare(kind, V3)
    with pytest.raises(ConfigError):
        prepare(kind, V3)


def test_what_a_restart_has_taken_does_not_count() -> None:
    """The versions of the dead process hold no slot of the new one."""
    fake = FakeVllm(V1, V2, V3)
    kind = kind_of(fake)
    prepare(kind, V1, V2)
    fake.loaded.clear()
    prepare(kind, V3)
    assert fake.loaded == {served_name(V3.version.digest)}


def test_unloading_forgets_the_name_and_may_be_said_twice() -> None:
    """404 says that somebody was first; anything else is told."""
    fake = FakeVllm(V1)
    kind = kind_of(fake)
    prepare(kind, V1)
    asyncio.run(kind.unload(V1.version))
    asyncio.run(kind.unload(V1.version))
    assert fake.loaded == set()
    fake.refuse.append(("/v1/unload_lora_adapter", 503))
    with pytest.raises(PeerUnavailable):
        asyncio.run(kind.unload(V1.version))


def test_a_version_that_comes_back_while_it_leaves_is_there_at_the_end() -> None:
    """A rollback in the moment of the unload waits for it; an unload in the moment of a rollback is left out."""
    fake = FakeVllm(V1)
    kind = kind_of(fake)

    async def body() -> None:
        await kind.prepare(V1.version, ALIAS)
        fake.held = "/v1/unload_lora_adapter"
        leaving = asyncio.create_task(kind.unload(V1.version))
        await until(lambda: fake.paths("/v1/unload_lora_adapter"))
        back = asyncio.create_task(kind.prepare(V1.version, ALIAS))
        await asyncio.sleep(0)
        await kind.unload(V1.version)  # said once more, when it is wanted again
        fake.gate.set()
        await asyncio.gather(leaving, back)
        assert fake.loaded == {served_name(V1.version.digest)}
        assert len(fake.paths("/v1/unload_lora_adapter")) == 1

    asyncio.run(body())


def test_healthy_is_a_living_engine_with_this_base(caplog: pytest.LogCaptureFixture) -> None:
    """A server that was started on another base is not one of this router's replicas."""
    fake = FakeVllm()
    kind = kind_of(fake)

    def look() -> bool:
        client = httpx.AsyncClient(transport=httpx.MockTransport(fake), base_url="http://replica")
        return asyncio.run(kind.health(client))

    assert look()
    fake.base = "another"
    with caplog.at_level(logging.ERROR):
        assert not look()
        assert not look()
    assert caplog.text.count("does not name tiny") == 1  # said once, although looked at every second
    fake.base = "tiny"
    fake.refuse.append(("/health", 503))
    assert not look()


def test_options_are_read_strictly() -> None:
    """The message names the replica's table and the key."""
    read = VllmOptions.read
    assert read({"slots": 4}, where="r") == VllmOptions(4, base=False, adapters="", min_ready=None)
    wrong: list[dict[str, Any]] = [
        {},
        {"slots": 0},
        {"slots": True},
        {"slots": 2, "min_ready": 0},
        {"slots": 2, "base": "no"},
        {"slots": 2, "slotz": 1},
    ]
    for table in wrong:
        with pytest.raises(ConfigError, match=r"\[replicas\.r1\]"):
            read(table, where="[replicas.r1]")


@given(st.integers(0, 1000), st.integers(0, 10))
def test_slots_for_every_alias_to_move_at_once(aliases: int, in_flight: int) -> None:
    """Known by counting: each alias has the version it serves and those on their way."""
    versions = [(alias, version) for alias in range(aliases) for version in range(1 + in_flight)]
    assert slots_needed(aliases, in_flight) == len(versions)


@given(st.lists(st.tuples(st.none() | st.integers(1, 5), st.booleans()), max_size=6))
def test_an_alias_moves_when_enough_are_ready(replicas: list[tuple[int | None, bool]]) -> None:
    """Each replica has a say: its own number of ready ones, or itself; and one must be there at all."""
    count = [is_ready for _, is_ready in replicas].count(True)
    held = count == 0
    for least, is_ready in replicas:
        if (least is None and not is_ready) or (least is not None and count < least):
            held = True
    assert enough(replicas) is not held
