"""Where commands find configuration: the one place of the command line that reads files and environment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import httpx

from fedllm.config import (
    ClientSettings,
    CoordinatorSettings,
    FederationSettings,
    ServeSettings,
    Sourced,
    read_toml,
    settle,
    unknown_key,
)
from fedllm.errors import (
    AuthenticationError,
    ConfigError,
    FedllmError,
    NotFound,
    NotReady,
    PeerUnavailable,
    PolicyRefused,
)

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
    tables = read_toml(home / COORDINATOR_FILE)
    for key in tables:
        if key not in {"coordinator", "federation"}:
            raise unknown_key(key, ["coordinator", "federation"], where=str(home / COORDINATOR_FILE))
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
    table = {"home": str(home.absolute()), **read_toml(home / CLIENT_FILE).get("client", {})}
    return settle(ClientSettings, "client", table=table, environ=os.environ, flags=flags or {}, folder=home.absolute())


def serve_settings(file: Path | None, flags: dict[str, Any]) -> tuple[ServeSettings, list[Sourced]]:
    """Read an optional serve.toml under flags."""
    table = read_toml(file).get("serve", {}) if file else {}
    folder = file.absolute().parent if file else None
    return settle(ServeSettings, "serve", table=table, environ=os.environ, flags=flags, folder=folder)


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
            raise PeerUnavailable(
                f"no coordinator answers at {self._address} ({type(error).__name__})",
                hint="start it with 'fedllm coordinator start'",
            ) from None
        if answer.is_error:
            raise _error_of(answer)
        return answer.json()


def _error_of(answer: httpx.Response) -> FedllmError:
    kinds: dict[int, type[FedllmError]] = {
        400: ConfigError, 401: AuthenticationError, 403: PolicyRefused, 404: NotFound, 422: ConfigError, 503: NotReady,
    }  # fmt: skip
    try:
        detail = answer.json().get("error", {})
    except ValueError:
        detail = {}
    message = detail.get("message") or f"the coordinator answered {answer.status_code}"
    return kinds.get(answer.status_code, FedllmError)(message, hint=detail.get("hint"))
