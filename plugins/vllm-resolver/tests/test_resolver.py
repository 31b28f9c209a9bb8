"""The resolver beside a fake vLLM: what it finds, what it refuses, what it leaves on disk."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fedllm.clock import SystemClock
from fedllm.errors import ConfigError, FedllmError, PeerUnavailable
from fedllm.identity import SigningIdentity
from fedllm.ids import sha256
from fedllm.messages.plan import Recipe
from fedllm.registry.model import FetchedVersion, PrivacyRecord
from fedllm.registry.store import Registry, VersionDraft
from unit.serving.registry_fake import FakeSource, make_version
from unit.serving.tiny_llama import BASE, make_adapter, make_tiny_model

import fedllm_vllm_resolver
from fedllm_vllm_resolver.settings import ResolverSettings

V1, V2 = (make_version(make_adapter(seed), seed) for seed in (1, 2))
KEY = SigningIdentity.from_seed(bytes(32)).public
DIGEST = V1.version.digest
NAME = f"fedllm-{DIGEST}"


class Source(FakeSource):
    """A source that answers what the test says, whatever is asked for."""

    def __init__(self, *versions: FetchedVersion) -> None:
        super().__init__()
        self.stored = {version.version.digest: version for version in versions}


def resolver(source: FakeSource | None, folder: Path, **changes: Any) -> Any:
    """Return a resolver that reads from a source; the served base is the tests' own."""
    from fedllm_vllm_resolver.resolver import DigestResolver

    settings = ResolverSettings("http://registry", KEY, folder, BASE)
    return DigestResolver(replace(settings, **changes), source)


def resolve(made: Any, name: str = NAME, base: str = "tiny") -> Any:
    """Return what vLLM would be given for a name."""
    return asyncio.run(made.resolve_lora(base, name))


def test_a_version_is_fetched_once_and_kept_by_its_digest(fake_vllm: Any, tmp_path: Path) -> None:
    """Files as they were signed, in a folder that the next process finds without a registry."""
    source = Source(V1)
    for reader in (source, source, Source()):
        found = resolve(resolver(reader, tmp_path))
        assert (found.lora_name, found.lora_path) == (NAME, str(tmp_path / BASE / DIGEST))
        assert not found.load_inplace
    assert source.fetches == 1
    files = {file.name: file.read_bytes() for file in (tmp_path / BASE / DIGEST).iterdir()}
    assert files == dict(V1.files)
    assert [folder.name for folder in (tmp_path / BASE).iterdir()] == [DIGEST]


def test_the_number_is_the_digests(fake_vllm: Any, tmp_path: Path) -> None:
    """The same after every start, unlike Python's hash of a text; another for other bytes."""
    from fedllm_vllm_resolver.resolver import int_id

    ids = {resolve(resolver(Source(V1), tmp_path / str(i))).lora_int_id for i in range(2)}
    assert ids == {int(DIGEST[:15], 16) + 1}
    assert 1 <= int_id(V2.version.digest) < 2**63
    assert int_id(V2.version.digest) not in ids


@pytest.mark.parametrize(
    "name", ["tools", "fedllm-", f"fedllm-{DIGEST[:-1]}", "fedllm-../../etc", f"fedllm-{DIGEST.upper()}"]
)
def test_other_names_are_left_alone(fake_vllm: Any, tmp_path: Path, name: str) -> None:
    """No path is ever made from a name that is no digest, and nobody is asked."""
    source = Source(V1)
    assert resolve(resolver(source, tmp_path), name) is None
    assert source.fetches == 0
    assert list(tmp_path.iterdir()) == []


def wrong_version() -> FakeSource:
    """Return a source that answers with another version than was asked for, itself in order."""
    source = Source()
    source.stored = {DIGEST: V2}
    return source


def wrong_file() -> FakeSource:
    """Return a source that verifies nothing and has a changed file."""
    files = {**V1.files, "adapter_config.json": b"{}"}
    source = Source()
    source.stored = {DIGEST: FetchedVersion(V1.version, files)}
    return source


def unreachable() -> FakeSource:
    """Return a source that cannot be asked."""
    source = Source(V1)
    source.failure = PeerUnavailable("no answer")
    return source


class Broken(Source):
    """A source with a defect."""

    async def fetch(self, digest: str) -> FetchedVersion:
        """Fail as nobody thought of."""
        raise KeyError(digest)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (wrong_version, "digest-mismatch"),
        (wrong_file, "digest-mismatch"),
        (Source, "not-found"),
        (unreachable, "peer-unavailable"),
        (Broken, "KeyError"),
    ],
)
def test_every_doubt_is_a_refusal_with_its_reason(
    fake_vllm: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, source: Any, reason: str
) -> None:
    """None makes vLLM answer 404; nothing is left on disk that a later request could find."""
    assert resolve(resolver(source(), tmp_path)) is None
    assert reason in caplog.text
    assert not (tmp_path / BASE / DIGEST).exists()


def test_an_adapter_for_another_base_is_refused(
    fake_vllm: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Shapes may fit where weights do not."""
    assert resolve(resolver(Source(V1), tmp_path, base=sha256(b"another"))) is None
    assert "base-mismatch" in caplog.text


def test_the_served_base_is_hashed_where_it_is_a_folder(
    fake_vllm: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody has to copy a digest; a model that is no folder needs one."""
    from fedllm.basemodel.inspect import open_base

    tiny_folder = tmp_path / "tiny"
    tiny_folder.mkdir()
    make_tiny_model(tiny_folder)
    made = make_version(replace_base(open_base(tiny_folder).digest), 1)
    name = f"fedllm-{made.version.digest}"
    assert resolve(resolver(Source(made), tmp_path, base=None), name, str(tiny_folder)) is not None
    assert resolve(resolver(Source(made), tmp_path / "x", base=None), name, "org/model") is None
    assert "config" in caplog.text


def replace_base(base: str) -> Any:
    """Return an adapter for a base."""
    state = make_adapter(1)
    return type(state)(replace(state.spec, base=base), state.factors)


def test_files_that_changed_on_disk_are_not_served(
    fake_vllm: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder proves by its files that it is what its name says; the process asks once after every start."""
    place = Path(resolve(resolver(Source(V1), tmp_path)).lora_path)
    (place / "extra.json").write_bytes(b"{}")
    assert resolve(resolver(Source(V1), tmp_path)) is None
    (place / "extra.json").unlink()
    assert resolve(resolver(Source(V1), tmp_path)) is not None
    config = place / "adapter_config.json"
    config.chmod(0o600)
    config.write_bytes(config.read_bytes() + b" ")
    assert resolve(resolver(Source(V1), tmp_path)) is None
    assert "digest-mismatch" in caplog.text


def test_processes_that_fetch_at_once_agree(fake_vllm: Any, tmp_path: Path) -> None:
    """Whoever is second finds the first one's folder, whole; no half of one is ever under a digest's name."""

    async def body() -> list[Any]:
        made = [resolver(Source(V1), tmp_path) for _ in range(4)]
        return await asyncio.gather(*(r.resolve_lora("tiny", NAME) for r in made))

    assert {found.lora_path for found in asyncio.run(body())} == {str(tmp_path / BASE / DIGEST)}
    assert [folder.name for folder in (tmp_path / BASE).iterdir()] == [DIGEST]


@pytest.mark.parametrize("spoil", ["nothing", "signature", "blob", "row"])
def test_a_registry_folder_is_believed_by_its_signatures_only(
    fake_vllm: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: str
) -> None:
    """Who can write into the shared folder still cannot make a replica serve other bytes under a name."""
    coordinator = SigningIdentity.generate()
    home = tmp_path / "registry"
    registry = Registry(home, coordinator.public, SystemClock())
    privacy = PrivacyRecord("record", "add-or-remove-one", None, 1e-5, "-", "advisory")
    made = []
    for number in (1, 2):
        recipe = Recipe("sgd", 0.1, 1, 1, 1, 64)
        draft = VersionDraft("tools", "tiny", None, number, "ffa", recipe, {}, privacy, 3, 3, BASE)
        made.append(registry.add(make_adapter(number), draft, coordinator))
    registry.close()
    key = SigningIdentity.generate().public if spoil == "signature" else coordinator.public
    if spoil == "blob":
        for file in (home / "blobs").rglob("*"):
            if file.is_file():
                file.chmod(0o600)
                file.write_bytes(file.read_bytes() + b" ")
    if spoil == "row":
        swap_rows(home / "registry.sqlite", made[0].digest, made[1].digest)
    asked = resolver(None, tmp_path / "adapters", registry=str(home), key=key)
    found = resolve(asked, f"fedllm-{made[0].digest}")
    assert (found is not None) == (spoil == "nothing")
    expected = {"nothing": "", "signature": "signature-invalid", "blob": "digest-mismatch", "row": "digest-mismatch"}
    assert expected[spoil] in caplog.text


def swap_rows(database: Path, first: str, second: str) -> None:
    """Give one version's signed manifest to the other, as an intruder with the database would."""
    import sqlite3
    from contextlib import closing

    with closing(sqlite3.connect(database)) as open_, open_:
        row = open_.execute("SELECT manifest, signature FROM versions WHERE digest = ?", (second,)).fetchone()
        open_.execute("UPDATE versions SET manifest = ?, signature = ? WHERE digest = ?", (*row, first))


def environment(tmp_path: Path) -> dict[str, str]:
    """Return the plugin's variables."""
    return {
        "FEDLLM_REGISTRY": "http://127.0.0.1:7400",
        "FEDLLM_COORDINATOR_KEY": str(KEY),
        "FEDLLM_ADAPTERS": str(tmp_path),
    }


def test_registering_needs_all_or_nothing(fake_vllm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that was meant to verify must not start without; one that was not meant to is left alone."""
    whole = environment(tmp_path)
    for name in whole:
        monkeypatch.delenv(name, raising=False)
    fedllm_vllm_resolver.register()
    assert fake_vllm == {}
    for name in whole:
        monkeypatch.setattr("os.environ", {**whole, name: ""})
        with pytest.raises(ConfigError, match=name):
            fedllm_vllm_resolver.register()
    monkeypatch.setattr("os.environ", {**whole, "FEDLLM_COORDINATOR_KEY": "nonsense"})
    with pytest.raises(FedllmError):
        fedllm_vllm_resolver.register()
    monkeypatch.setattr("os.environ", whole)
    fedllm_vllm_resolver.register()
    assert list(fake_vllm) == ["fedllm"]


def test_reasons_reach_vllms_own_log() -> None:
    """VLLM configures the logger named vllm; the plugin's is below it."""
    assert fedllm_vllm_resolver._LOG.name.startswith("vllm.")
    assert isinstance(fedllm_vllm_resolver._LOG, logging.Logger)
