"""Keys are shown once and stored hashed; access is denied unless listed."""

from __future__ import annotations

import logging

import pytest

from fedllm.errors import AuthenticationError, ConfigError, NotFound
from fedllm.serving.tenants import TenantFile, authenticate, create_tenant, load_tenants


def test_a_key_is_not_in_the_file_and_opens_its_tenant(tmp_path) -> None:
    """Only the hash is stored, readable by the owner only; each key opens exactly its own tenant."""
    path = tmp_path / "tenants.toml"
    acme, rival = create_tenant(path, "acme", ["acme/tools", "base"]), create_tenant(path, "rival", [])
    assert acme not in path.read_text()
    assert path.stat().st_mode & 0o077 == 0
    tenants = load_tenants(path)
    assert authenticate(tenants, acme).name == "acme"
    assert not authenticate(tenants, rival).may_use("acme/tools")
    assert tenants[0].key_sha256 not in repr(tenants)


@pytest.mark.parametrize("key", ["", "fedllm-", "wrong", "é"])
def test_unknown_keys_are_refused(tmp_path, key: str) -> None:
    """Whatever is sent, it is the same error."""
    create_tenant(tmp_path / "t.toml", "acme", [])
    with pytest.raises(AuthenticationError, match="missing or not known"):
        authenticate(load_tenants(tmp_path / "t.toml"), key)


def test_the_file_is_read_again_when_it_changes(tmp_path) -> None:
    """A tenant added while serving is known at its first request."""
    path = tmp_path / "t.toml"
    create_tenant(path, "acme", [])
    tenants = TenantFile(path)
    key = create_tenant(path, "late", [])
    assert tenants.authenticate(key).name == "late"


def test_bad_names_aliases_and_files_are_named(tmp_path) -> None:
    """Mistakes name the tenant, the file or the form allowed."""
    path = tmp_path / "t.toml"
    with pytest.raises(NotFound, match="no tenants file"):
        load_tenants(path)
    create_tenant(path, "acme", [])
    with pytest.raises(ConfigError, match="'acme' is in"):
        create_tenant(path, "acme", [])
    with pytest.raises(ConfigError, match="tenant/name"):
        create_tenant(path, "other", ["tools"])
    path.write_text('[acme]\nkey = "1"\n')
    with pytest.raises(ConfigError, match="needs exactly key_sha256 and allow"):
        load_tenants(path)


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
            assert tenants.authenticate(key).name == "acme"
            with pytest.raises(AuthenticationError):
                tenants.authenticate("wrong")
    assert len(caplog.records) == 1
    assert "private-text" not in caplog.text
    assert str(path) not in caplog.text
    if harm == "unreadable":
        path.rmdir()
    path.write_text(good)
    late = create_tenant(path, "late", [])
    assert tenants.authenticate(late).name == "late"


def test_an_operator_is_marked_by_true_and_nothing_else(tmp_path) -> None:
    """The mark survives a rewrite of the file; a number or a word for it is refused."""
    path = tmp_path / "t.toml"
    create_tenant(path, "ops", [], operator=True)
    create_tenant(path, "acme", [])
    assert [tenant.operator for tenant in load_tenants(path)] == [True, False]
    for wrong in ("1", '"true"'):
        path.write_text(f'[acme]\nkey_sha256 = "{"0" * 64}"\nallow = []\noperator = {wrong}\n')
        with pytest.raises(ConfigError, match="operator is true or false"):
            load_tenants(path)
    path.write_text(f'[acme]\nkey_sha256 = "{"é" * 64}"\nallow = []\n')
    with pytest.raises(ConfigError, match="64 hex digits"):
        load_tenants(path)
