"""Keys are shown once and stored hashed; access is denied unless listed; the file is never half of anything."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.clock import FakeClock
from fedllm.errors import AuthenticationError, ConfigError, NotFound
from fedllm.rng import SeededRng
from fedllm.serving import tenants as tenants_module
from fedllm.serving.keys import ApiKey, hash_key
from fedllm.serving.quota import Limits
from fedllm.serving.tenant_changes import change_access, remove_tenant, revoke_keys, rotate_key, set_limits
from fedllm.serving.tenant_file import format_table, parse_table
from fedllm.serving.tenant_toml import read_tables, write_tables
from fedllm.serving.tenants import Tenant, TenantFile, TenantTable, authenticate, create_tenant, load_tenants

NOW = 1_700_000_000.0
HASH = "0" * 64
KEY = f'[tenants.acme.keys.key-1]\nsha256 = "{HASH}"\ncreated = 2026-01-31T12:00:00Z\n'


def who(tenants, key: str, now: float = NOW) -> str:
    """Return the name of the tenant whose key it is."""
    return authenticate(tenants, key, now)[0].name


def test_a_key_is_not_in_the_file_and_opens_its_tenant(tmp_path) -> None:
    """Only the hash is stored, readable by the owner only; each key opens exactly its own tenant."""
    path = tmp_path / "tenants.toml"
    acme, rival = create_tenant(path, "acme", ["acme/tools", "base"]), create_tenant(path, "rival", [])
    assert acme not in path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    tenants = load_tenants(path)
    assert who(tenants, acme) == "acme"
    assert not authenticate(tenants, rival, NOW)[0].may_use("acme/tools")
    assert tenants[0].keys[0].sha256 == hash_key(acme)
    assert hash_key(acme) not in repr(tenants)


@pytest.mark.parametrize("key", ["", "fedllm-", "wrong", "é"])
def test_unknown_keys_are_refused(tmp_path, key: str) -> None:
    """Whatever is sent, it is the same error."""
    create_tenant(tmp_path / "t.toml", "acme", [])
    with pytest.raises(AuthenticationError, match="missing or not known"):
        authenticate(load_tenants(tmp_path / "t.toml"), key, NOW)


def test_every_hash_is_compared_in_constant_time(tmp_path, monkeypatch) -> None:
    """As many comparisons for the first key as for the last and for none, all by `hmac.compare_digest`."""
    path = tmp_path / "t.toml"
    keys = [create_tenant(path, name, []) for name in ("a", "b", "c")]
    keys.append(rotate_key(path, "b", SeededRng(1), FakeClock(NOW), overlap_s=60))
    seen = []
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: (seen.append((a, b)), a == b)[1])
    tenants = load_tenants(path)
    for key in keys:
        seen.clear()
        authenticate(tenants, key, NOW)
        assert len(seen) == 4
    seen.clear()
    with pytest.raises(AuthenticationError):
        authenticate(tenants, "wrong", NOW)
    assert len(seen) == 4


def test_only_who_has_a_key_learns_that_it_is_over(tmp_path) -> None:
    """Expired at its second and revoked at once, each said by name; anything else is just not known."""
    path, clock = tmp_path / "t.toml", FakeClock(NOW)
    key = create_tenant(path, "acme", [], clock=clock, expires_s=60)
    assert who(load_tenants(path), key, NOW + 59.9) == "acme"
    with pytest.raises(AuthenticationError, match="'key-1' has expired"):
        authenticate(load_tenants(path), key, NOW + 60)
    assert revoke_keys(path, "acme", clock) == ["key-1"]
    assert revoke_keys(path, "acme", clock) == []
    with pytest.raises(AuthenticationError, match="'key-1' was revoked"):
        authenticate(load_tenants(path), key, NOW)
    with pytest.raises(AuthenticationError, match="missing or not known"):
        authenticate(load_tenants(path), key[:-1], NOW)


def test_rotation_has_an_overlap(tmp_path) -> None:
    """Both keys open until the overlap ends, then only the new one; a key that ends earlier ends as it would have."""
    path, clock = tmp_path / "t.toml", FakeClock(NOW)
    short = create_tenant(path, "acme", [], clock=clock, expires_s=10)
    old = rotate_key(path, "acme", SeededRng(1), clock, overlap_s=100)
    new = rotate_key(path, "acme", SeededRng(2), clock, overlap_s=100)
    tenants = load_tenants(path)
    assert [key.name for key in tenants[0].keys] == ["key-1", "key-2", "key-3"]
    assert [who(tenants, key, NOW + 9) for key in (short, old, new)] == ["acme"] * 3
    with pytest.raises(AuthenticationError, match="key-1"):
        authenticate(tenants, short, NOW + 10)
    assert who(tenants, old, NOW + 99) == "acme"
    with pytest.raises(AuthenticationError, match="key-2"):
        authenticate(tenants, old, NOW + 100)
    assert who(tenants, new, NOW + 1e9) == "acme"
    assert revoke_keys(path, "acme", clock, key="key-2") == ["key-2"]
    with pytest.raises(NotFound, match="no key 'key-9'"):
        revoke_keys(path, "acme", clock, key="key-9")


def test_the_file_is_read_again_when_it_changes(tmp_path) -> None:
    """A tenant added while serving is known at its first request."""
    path = tmp_path / "t.toml"
    create_tenant(path, "acme", [])
    tenants = TenantFile(path)
    key = create_tenant(path, "late", [])
    assert tenants.authenticate(key, NOW)[0].name == "late"


def test_bad_names_and_aliases_are_named_and_change_nothing(tmp_path) -> None:
    """Mistakes name the tenant, the file or the form allowed."""
    path = tmp_path / "t.toml"
    with pytest.raises(NotFound, match="no tenants file"):
        load_tenants(path)
    with pytest.raises(NotFound, match="no tenants file"):
        remove_tenant(path, "acme")
    create_tenant(path, "acme", [])
    before = path.read_bytes()
    for name, allow, words in (
        ("acme", [], "'acme' is in"),
        ("other", ["tools"], "tenant/name"),
        ("other", ["*"], "for routers only"),
        ("Other", [], "is not a name"),
    ):
        with pytest.raises(ConfigError, match=words):
            create_tenant(path, name, allow)
    with pytest.raises(ConfigError, match=r"weight is 11\.0"):
        create_tenant(path, "other", [], weight=11.0)
    with pytest.raises(NotFound, match="no tenant 'other'"):
        set_limits(path, "other", {"concurrent": 1})
    with pytest.raises(ConfigError, match="no key 'concurent'"):
        set_limits(path, "acme", {"concurent": 1})
    with pytest.raises(ConfigError, match="concurrent is 0"):
        set_limits(path, "acme", {"concurrent": 0})
    with pytest.raises(NotFound, match="'acme/tools' is not on"):
        change_access(path, "acme", deny=["acme/tools"])
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "words", "hint"),
    [
        (f'[acme]\nkey_sha256 = "{HASH}"\nallow = []\n', "form of an older release", r"\[tenants.NAME\]"),
        ("[tenant.acme]\n", "no key 'tenant'", "did you mean 'tenants'"),
        ("[tenants.acme]\nalow = []\n", "'acme' has no key 'alow'", "did you mean 'allow'"),
        ("[tenants.acme.limits]\ntoken_per_minute = 1\n", "'token_per_minute'", "did you mean 'tokens_per_minute'"),
        ("[tenants.acme.limits]\nconcurrent = 0\n", "concurrent is 0", ""),
        ("[tenants.acme.limits]\nconcurrent = true\n", "concurrent is True", ""),
        ("[tenants.acme]\noperator = 1\n", "operator is a int, a bool expected", ""),
        ('[tenants.acme]\noperator = "true"\n', "operator is a str", ""),
        ("[tenants.acme]\nweight = 0.01\n", r"weight is 0.01, 0.1 to 10 allowed", ""),
        ("[tenants.acme]\nweight = nan\n", "weight is nan", ""),
        ("[tenants.acme]\nretention_days = -1\n", "retention_days is -1", ""),
        ('[tenants.acme]\nallow = "acme/tools"\n', "allow is a str, a list expected", ""),
        ("[tenants.acme]\nallow = [1]\n", "an entry of allow is a int", ""),
        ('[tenants.acme]\nallow = ["*"]\n', "for routers only", ""),
        ("[tenants]\nacme = 1\n", "'acme' is a int, a dict expected", ""),
        (KEY.replace(HASH, "é" * 64), "64 hex digits", ""),
        (KEY.replace("sha256", "sha265"), "'sha265'", "did you mean 'sha256'"),
        (KEY.replace("created", "# created"), "created is no time", ""),
        (KEY.replace("12:00:00Z", "12:00:00"), "created is no time with a zone", ""),
        (KEY + KEY.replace("key-1", "key-2"), "one key is listed twice", ""),
        ('[aliases."acme/tools"]\nshare = true\n', "no key 'share'", "'share_cache'"),
        ("[aliases.tools]\nshare_cache = true\n", "tenant/name", ""),
        ("[tenants.acme", "is not TOML", ""),
    ],
)
def test_a_malformed_file_is_an_error_that_names_it(tmp_path, text: str, words: str, hint: str) -> None:
    """The tenant and the key are named, and the nearest key that there is."""
    path = tmp_path / "t.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=words) as caught:
        load_tenants(path)
    assert re.search(hint, caught.value.hint or "")


names = st.from_regex(r"[a-z0-9]([a-z0-9_-]{0,8}[a-z0-9])?", fullmatch=True)
aliases = st.tuples(names, names).map("/".join)
counts = st.none() | st.integers(1, 2**53 - 1)
seconds = st.integers(0, 4_000_000_000).map(float)
keys = st.builds(
    ApiKey,
    name=names,
    sha256=st.binary(min_size=32, max_size=32).map(bytes.hex),
    created=seconds,
    expires=st.none() | seconds,
    revoked=st.none() | seconds,
)
tenants = st.builds(
    Tenant,
    name=names,
    keys=st.lists(keys, max_size=3, unique_by=lambda key: key.name).map(tuple),
    allow=st.lists(aliases | st.just("base"), max_size=3).map(tuple),
    operator=st.booleans(),
    router=st.booleans(),
    weight=st.floats(0.1, 10),
    limits=st.builds(Limits, counts, counts, counts, counts),
    share_cache=st.booleans(),
    log_prompts=st.booleans(),
    retention_days=st.integers(1, 4000),
)


def _apart(tenants: list[Tenant]) -> bool:
    hashes = [key.sha256 for tenant in tenants for key in tenant.keys]
    return len(set(hashes)) == len(hashes)


@given(st.lists(tenants, max_size=4, unique_by=lambda tenant: tenant.name).filter(_apart), st.frozensets(aliases))
def test_what_is_written_is_read_back(tmp_path_factory, made: list[Tenant], shared: frozenset[str]) -> None:
    """Every table that there can be survives the file."""
    path = tmp_path_factory.getbasetemp() / "any.toml"
    table = TenantTable(tuple(made), shared)
    write_tables(path, format_table(table))
    assert parse_table(read_tables(path), "t.toml") == table


def test_changes_at_the_same_time_are_all_kept(tmp_path) -> None:
    """Eight threads and a process of its own add and change tenants: nobody's change is lost, no draft is left."""
    path = tmp_path / "t.toml"
    create_tenant(path, "acme", [])
    program = (
        "import sys; from pathlib import Path; from fedllm.serving.tenants import create_tenant\n"
        "for i in range(5): create_tenant(Path(sys.argv[1]), f'far-{i}', [])"
    )
    other = subprocess.Popen([sys.executable, "-c", program, str(path)])
    threads = [
        threading.Thread(
            target=lambda i=i: (create_tenant(path, f"t{i}", []), change_access(path, "acme", allow=[f"a/{i}"]))
        )
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert other.wait(60) == 0
    found = {tenant.name: tenant for tenant in load_tenants(path)}
    assert set(found) == {"acme", *(f"t{i}" for i in range(8)), *(f"far-{i}" for i in range(5))}
    assert set(found["acme"].allow) == {f"a/{i}" for i in range(8)}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.toml", "t.toml.lock"]


def test_a_file_that_others_may_read_is_closed_by_a_change(tmp_path) -> None:
    """A copy made by hand with mode 0644 is 0600 after the next command, and so is a draft that a crash left."""
    path = tmp_path / "t.toml"
    create_tenant(path, "acme", [])
    path.chmod(0o644)
    draft = tmp_path / "t.toml.new"
    draft.touch()
    draft.chmod(0o644)
    set_limits(path, "acme", {"concurrent": 3})
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_tenants(path)[0].limits == Limits(concurrent=3)


def test_access_is_what_is_listed_and_nothing_else() -> None:
    """An empty list opens nothing; '*' is a router's word, and means nothing in another's list."""
    assert not Tenant("acme").may_use("base")
    assert not Tenant("acme").may_use("")
    assert not Tenant("acme", allow=("*",)).may_use("acme/tools")
    router = Tenant("front", allow=("*",), router=True)
    assert router.may_use("acme/tools")
    assert router.may_use("base")
    assert not router.may_use("")
    assert not replace(router, allow=("acme/tools",)).may_use("base")


@pytest.mark.parametrize("harm", ["missing", "malformed", "unreadable"])
def test_a_file_broken_while_served_keeps_the_last_good_list(tmp_path, caplog, harm: str) -> None:
    """Known keys stay, strangers stay strangers, one log line has a code and no text; mending it is noticed."""
    path = tmp_path / "t.toml"
    key = create_tenant(path, "acme", [])
    tenants, good = TenantFile(path), path.read_text()
    path.unlink()
    if harm == "malformed":
        path.write_text("[private-text")
    elif harm == "unreadable":
        path.mkdir()
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            assert tenants.authenticate(key, NOW)[0].name == "acme"
            with pytest.raises(AuthenticationError):
                tenants.authenticate("wrong", NOW)
    assert len(caplog.records) == 1
    assert "private-text" not in caplog.text
    assert str(path) not in caplog.text
    if harm == "unreadable":
        path.rmdir()
    path.write_text(good)
    late = create_tenant(path, "late", [])
    assert tenants.authenticate(late, NOW)[0].name == "late"


def test_a_broken_file_is_parsed_once_and_not_by_every_request(tmp_path, monkeypatch) -> None:
    """A slip of the pen in a long file must not stop the loop at each request; the mended file is read at once."""
    path = tmp_path / "t.toml"
    key = create_tenant(path, "acme", [])
    tenants, good, reads = TenantFile(path), path.read_text(), []
    load = tenants_module.load_table
    monkeypatch.setattr(tenants_module, "load_table", lambda path: (reads.append(path), load(path))[1])
    path.write_text(good + "[tenants")
    for _ in range(5):
        assert tenants.authenticate(key, NOW)[0].name == "acme"
    assert len(reads) == 1
    path.write_text(good.replace("acme", "other"))
    assert tenants.authenticate(key, NOW)[0].name == "other"
    assert len(reads) == 2


def test_a_change_leaves_the_file_to_its_owner(tmp_path, monkeypatch) -> None:
    """An administrator who revokes a key must not lock out the service, which would then go on taking that key."""
    path, given = tmp_path / "t.toml", []
    create_tenant(path, "acme", [])
    monkeypatch.setattr(os, "fchown", lambda descriptor, user, group: given.append((user, group)))
    set_limits(path, "acme", {"concurrent": 3})
    stat = path.stat()
    assert given == [(stat.st_uid, stat.st_gid)]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_change_by_root_leaves_the_file_to_its_owner(tmp_path) -> None:
    """The same without a double."""
    path = tmp_path / "t.toml"
    create_tenant(path, "acme", [])
    os.chown(path, 1234, 1235)
    set_limits(path, "acme", {"concurrent": 3})
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 1235)


@pytest.mark.parametrize("days", [float("nan"), float("inf"), 1e9, 1e18])
def test_a_life_beyond_the_calendar_is_an_error(tmp_path, days: float) -> None:
    """It is named, and no file is left behind."""
    path = tmp_path / "t.toml"
    with pytest.raises(ConfigError, match="is no time"):
        create_tenant(path, "acme", [], expires_s=days * 86_400)
    assert not path.exists()
