"""Where commands find configuration: the one place of the command line that reads files and environment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import httpx

from fedllm import errors
from fedllm.config import (
    ClientSettings,
    CoordinatorSettings,
    FederationSettings,
    RouteSettings,
    ServeSettings,
    Sourced,
    read_toml,
    settle,
    unknown_key,
)
from fedllm.errors import (
    AliasConflict,
    AuthenticationError,
    ConfigError,
    FedllmError,
    MissingExtra,
    NotFound,
    NotReady,
    Overloaded,
    PeerUnavailable,
    PolicyRefused,
    QuotaExceeded,
)
from fedllm.ids import check_name

COORDINATOR_FILE = "fedllm.toml"
CLIENT_FILE = "client.toml"


def cache_root() -> Path:
    """Return the folder of base models and demo data: ``FEDLLM_CACHE``, else the user's cache folder."""
    if "FEDLLM_CACHE" in os.environ:
        return Path(os.environ["FEDLLM_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "fedllm"


def coordinator_settings(
    home: Path, flags: dict[str, Any] | None = None
) -> tuple[CoordinatorSettings, list[FederationSettings], list[Sourced]]:
    """Read ``<home>/fedllm.toml``: the coordinator and its federations."""
    tables = _tables(home / COORDINATOR_FILE, "coordinator", "federation")
    base = {"home": str(home.absolute()), **tables.get("coordinator", {})}
    settings, sources = settle(
        CoordinatorSettings,
        "coordinator",
        table=base,
        environ=os.environ,
        flags=flags or {},
        folder=home.absolute(),
    )
    federations = []
    for name, table in tables.get("federation", {}).items():
        check_name(name, what="federation")
        if not isinstance(table, dict):
            raise ConfigError(f"{home / COORDINATOR_FILE}: federation.{name} is no table", hint="[federation.NAME]")
        made, more = settle(
            FederationSettings, f"federation.{name}", table={"name": name, **table},
            environ=os.environ, flags={}, folder=home.absolute(),
        )  # fmt: skip
        federations.append(made)
        sources += [Sourced(f"federation.{name}.{s.key}", s.value, s.origin) for s in more]
    return settings, federations, sources


def pick_federation(federations: list[FederationSettings], name: str | None) -> FederationSettings:
    """Return the named federation, or the only one."""
    if name is None and len(federations) == 1:
        return federations[0]
    for federation in federations:
        if federation.name == name:
            return federation
    known = ", ".join(f.name for f in federations) or "none"
    raise NotFound(f"federation {name!r} is not configured (known: {known})", hint="name one with --federation")


def client_settings(home: Path, flags: dict[str, Any] | None = None) -> tuple[ClientSettings, list[Sourced]]:
    """Read ``<home>/client.toml``."""
    table = {"home": str(home.absolute()), **_tables(home / CLIENT_FILE, "client").get("client", {})}
    return settle(ClientSettings, "client", table=table, environ=os.environ, flags=flags or {}, folder=home.absolute())


def serve_settings(file: Path | None, flags: dict[str, Any]) -> tuple[ServeSettings, list[Sourced]]:
    """Read an optional serve.toml under flags."""
    table = _tables(file, "serve").get("serve", {}) if file else {}
    folder = file.absolute().parent if file else None
    return settle(ServeSettings, "serve", table=table, environ=os.environ, flags=flags, folder=folder)


def route_settings(file: Path | None, flags: dict[str, Any]) -> tuple[RouteSettings, list[Sourced]]:
    """Read an optional route.toml under flags."""
    table = _tables(file, "route").get("route", {}) if file else {}
    folder = file.absolute().parent if file else None
    return settle(RouteSettings, "route", table=table, environ=os.environ, flags=flags, folder=folder)


def _tables(path: Path, *sections: str) -> dict[str, dict[str, Any]]:
    """Return the tables of a settings file; a section nobody knows is an error, not something to pass over."""
    found = read_toml(path)
    for key, table in found.items():
        if key not in sections:
            raise unknown_key(key, list(sections), where=str(path))
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: {key!r} is a {type(table).__name__}", hint=f"[{key}] begins a section")
    return found


class ControlApi:
    """The coordinator's control API, as the command line calls it.

    Parameters
    ----------
    settings : CoordinatorSettings
        Address, and the home folder that holds the operator's token.
    """

    def __init__(self, settings: CoordinatorSettings) -> None:
        token_file = settings.home / "operator.token"
        if not token_file.is_file():
            raise NotFound(f"no operator token at {token_file}", hint="start the coordinator once; it writes it")
        self._address = f"http://{settings.host}:{settings.port}"
        self._headers = {"Authorization": f"Bearer {token_file.read_text(encoding='utf-8').strip()}"}

    def call(self, method: str, path: str, body: dict[str, Any] | None = None, *, timeout_s: float = 30.0) -> Any:
        """Return the JSON answer of one call, or raise the error that the answer stands for."""
        try:
            answer = httpx.request(
                method, self._address + path, json=body, headers=self._headers, timeout=timeout_s, trust_env=False
            )
        except httpx.TransportError as error:
            raise _no_coordinator(self._address, type(error).__name__) from None
        if answer.is_error:
            raise error_of(answer, who="the coordinator")
        try:
            return answer.json()
        except ValueError:
            raise _no_coordinator(self._address, "an answer that is not JSON") from None

    def blob(self, digest: str) -> bytes:
        """Return a blob's bytes, unverified."""
        try:
            answer = httpx.get(f"{self._address}/v1/blobs/{digest}", timeout=60.0, trust_env=False)
        except httpx.TransportError as error:
            raise _no_coordinator(self._address, type(error).__name__) from None
        if answer.is_error:
            raise error_of(answer, who="the coordinator")
        return answer.content


def _no_coordinator(address: str, why: str) -> PeerUnavailable:
    return PeerUnavailable(
        f"no coordinator answers at {address} ({why})",
        hint="start it with 'fedllm coordinator start', or mend its port in fedllm.toml",
    )


def error_class(code: str) -> type[FedllmError] | None:
    """Return the class of an error code that another program gave, None if this release knows no such code."""
    for found in vars(errors).values():
        if isinstance(found, type) and issubclass(found, FedllmError) and found.code == code:
            # which extra is the other machine's affair, and the limit's name is in the message already
            return None if found is MissingExtra else Overloaded if found is QuotaExceeded else found
    return None


def error_of(answer: httpx.Response, *, who: str) -> FedllmError:
    """Return the error that an HTTP answer stands for: by its code, else by its status."""
    by_status: dict[int, type[FedllmError]] = {
        400: ConfigError, 401: AuthenticationError, 403: PolicyRefused, 404: NotFound, 409: AliasConflict,
        422: ConfigError, 429: NotReady, 503: NotReady,
    }  # fmt: skip
    try:
        detail = answer.json()["error"]
        message, code, hint = str(detail["message"]), str(detail.get("code")), detail.get("hint")
    except (ValueError, KeyError, TypeError, AttributeError):
        message, code, hint = f"{who} answered {answer.status_code}", "", None
    found = error_class(code) or by_status.get(answer.status_code, FedllmError)
    return found(message, hint=hint if isinstance(hint, str) else None)
