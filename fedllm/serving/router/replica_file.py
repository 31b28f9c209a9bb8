"""``replicas.toml``: where the replicas are, of which kind, and with which key the router asks them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from fedllm.config import read_toml, unknown_key
from fedllm.errors import ConfigError, NotFound
from fedllm.ids import check_name

_KEYS = ("url", "kind", "key_file")
OptionReader = Callable[[Mapping[str, Any], str], object]
"""Reads what a kind wants to know of a replica beyond the common keys; takes the table and where it stands."""


@dataclass(frozen=True)
class ReplicaConfig:
    """One replica as the operator wrote it down.

    Parameters
    ----------
    name : str
        For logs, metrics and operators.
    url : str
        Address, e.g. ``http://10.0.0.7:8000``.
    kind : str
        What serves there, e.g. ``native``.
    key : str
        What the router logs in with; never printed. Empty if the replica asks for none.
    options : object
        What its kind has read; compared to know whether the replica has changed.
    """

    name: str
    url: str
    kind: str
    key: str = field(default="", repr=False)
    options: object = None


def no_options(table: Mapping[str, Any], where: str) -> None:
    """Read the options of a kind that has none."""
    for key in table:
        raise unknown_key(key, list(_KEYS), where=where)


def read_replicas(path: Path, *, kinds: Mapping[str, OptionReader]) -> dict[str, ReplicaConfig]:
    """Read the file and the key files that it names; relative ones are relative to its folder.

    Raises
    ------
    NotFound
        If there is no such file, or no key file.
    ConfigError
        If it is malformed; the message names the replica and the key.
    """
    tables = read_toml(path)
    for name in tables:
        if name != "replicas":
            raise unknown_key(name, ["replicas"], where=str(path))
    found = tables.get("replicas", {})
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: replicas is a {type(found).__name__}", hint="[replicas.NAME] begins a replica")
    return {name: _replica(path, name, table, kinds) for name, table in found.items()}


def _replica(path: Path, name: str, table: Any, kinds: Mapping[str, OptionReader]) -> ReplicaConfig:
    check_name(name, what="replica")
    where = f"{path}: [replicas.{name}]"
    if not isinstance(table, dict):
        raise ConfigError(f"{where} is a {type(table).__name__}", hint="it holds url, kind and key_file")
    for key in _KEYS:
        if not isinstance(table.get(key, ""), str):
            raise ConfigError(f"{where} {key} is a {type(table[key]).__name__}, text expected")
    kind = table.get("kind", "native")
    if kind not in kinds:
        raise ConfigError(f"{where} kind is {kind!r}, known: {', '.join(kinds)}")
    options = kinds[kind]({key: value for key, value in table.items() if key not in _KEYS}, where)
    key = _key(path, table.get("key_file"), where)
    return ReplicaConfig(name, _url(table.get("url", ""), where), kind, key, options)


def _url(text: str, where: str) -> str:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(f"{where} url is {text!r}, no http address", hint="e.g. http://10.0.0.7:8000")
    return text.rstrip("/")


def _key(path: Path, name: str | None, where: str) -> str:
    if name is None:
        return ""
    file = path.parent / Path(name).expanduser()
    if not file.is_file():
        raise NotFound(f"{where} key_file {file} does not exist", hint="'fedllm tenant add --router' prints a key")
    return file.read_text(encoding="utf-8").strip()
