"""``fedllm init`` and ``fedllm owner``: an operator makes a federation and enrols owners, with files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from fedllm.cli.context import COORDINATOR_FILE, coordinator_settings, pick_federation
from fedllm.cli.files import drafts
from fedllm.cli.output import print_json, print_line, print_table, say
from fedllm.cli.plain import Noun
from fedllm.clock import SystemClock
from fedllm.errors import ConfigError, NotFound
from fedllm.identity import Roster, SigningIdentity, VerifyKey
from fedllm.ids import OwnerId, check_alias, check_name
from fedllm.messages.envelope import COORDINATOR

if TYPE_CHECKING:
    from fedllm.relay.tls import Certificate, TlsIdentity

KEY_FILE = "coordinator.pem"
owners = Noun("Enrol data owners: names and pinned keys.")

_TEMPLATE = """\
# A fedllm coordinator. Every key: docs/configuration.md. Values here yield to FEDLLM_* and to flags.
[coordinator]
port = {port}
flower_port = {flower_port}
direct_port = {direct_port}
"""
_FEDERATION = """\

[federation.{name}]
base = {base}
alias = "{alias}"

# The public size each owner declared ('fedllm owner add --records'); weights and DP steps use these numbers.
[federation.{name}.declared_records]
"""


def register(app: typer.Typer) -> None:
    """Add the top-level command."""
    app.command("init")(init)


def init(
    home: Path = typer.Argument(..., help="Folder to create."),
    federation: str = typer.Option("tools", help="Name of the first federation."),
    base: Path | None = typer.Option(None, help="Folder of the base model; without it, no federation is set up."),
    alias: str = typer.Option("acme/tools", help="tenant/name that versions are published to."),
    port: int = typer.Option(7400, help="Port of the control API."),
    flower_port: int = typer.Option(7401, help="Port of the Flower SuperLink."),
    direct_port: int = typer.Option(7403, help="Port that owners of direct federations dial."),
) -> None:
    """Make a coordinator's folder: keys, configuration, empty roster. Nothing is ever overwritten.

    Without --base it keeps a registry only: 'fedllm adapter import' adds versions, 'adapter promote' moves aliases.
    """
    from fedllm.basemodel.inspect import read_config
    from fedllm.relay import tls

    check_name(federation, what="federation")
    check_alias(alias)
    for name in (COORDINATOR_FILE, KEY_FILE, tls.KEY_FILE, tls.CERTIFICATE_FILE):
        if (home / name).exists():
            raise ConfigError(f"{home / name} exists and is not overwritten", hint="choose another folder")
    text = _TEMPLATE.format(port=port, flower_port=flower_port, direct_port=direct_port)
    if base is not None:
        read_config(base)
        text += _FEDERATION.format(name=federation, base=json.dumps(str(base.absolute())), alias=alias)
    with drafts(home) as scratch:
        identity = SigningIdentity.create(scratch / KEY_FILE)
        tls.TlsIdentity.create(scratch, SystemClock())
        (scratch / COORDINATOR_FILE).write_text(text, encoding="utf-8")
    step = "'fedllm owner add' for each owner" if base is not None else "'fedllm adapter import'"
    say(f"wrote {home / COORDINATOR_FILE}; next: {step}")
    print_line(str(identity.public))


@owners.command("add")
def add(
    owner: str = typer.Argument(..., help="Name of the owner."),
    key: str = typer.Argument(..., help="Public key line that 'fedllm client key' printed."),
    records: int = typer.Option(..., min=1, help="Size of the owner's data set as it declares it, publicly."),
    home: Path = typer.Option(..., help="The coordinator's folder."),
    federation: str | None = typer.Option(None, help="Federation, if there are several."),
    certificate: Path | None = typer.Option(None, help="The owner's tls.pem; needed if the transport is direct."),
) -> None:
    """Enrol an owner: its name, its key, its declared size. Every owner approves the new roster itself."""
    check_name(owner, what="owner")
    if owner == COORDINATOR:
        raise ConfigError(f"owner {owner!r}: that name is the coordinator's own", hint="choose another")
    _, federations, _ = coordinator_settings(home)
    chosen = pick_federation(federations, federation)
    name, path = chosen.name, roster_file(home, chosen.name)
    if certificate is None and chosen.transport == "direct":
        raise ConfigError(
            f"owner {owner!r} has no --certificate, and the transport of federation {name!r} is direct",
            hint="ask the owner for the tls.pem that 'fedllm client key' wrote beside its key",
        )
    keys = {m.owner: VerifyKey(m.key) for m in Roster.load(path).members} if path.is_file() else {}
    if OwnerId(owner) in keys:
        raise ConfigError(f"owner {owner!r} is enrolled already", hint="names are never reused")
    if any(VerifyKey.parse(key) == known for known in keys.values()):
        raise ConfigError(f"the key of {owner!r} is another owner's already", hint="each owner makes its own key")
    keys[OwnerId(owner)] = VerifyKey.parse(key)
    roster = Roster.of(keys)
    declared = _declared(home, name, owner, records)
    brought = None if certificate is None else _usable(home, name, owner, certificate)
    with drafts(home) as scratch:
        draft = roster_file(scratch, name)
        draft.parent.mkdir()
        roster.save(draft)
        if brought is not None:
            _pin(home, scratch, name, owner, brought)
        (scratch / COORDINATOR_FILE).write_text(declared, encoding="utf-8")
    say(f"roster of {name}: {len(roster.members)} owners; every owner joins again with a fresh join file")
    print_line(roster.digest)


@owners.command("certificate")
def certificate(
    owner: str = typer.Argument(..., help="Name of an enrolled owner."),
    file: Path = typer.Argument(..., help="The owner's tls.pem."),
    home: Path = typer.Option(..., help="The coordinator's folder."),
    federation: str | None = typer.Option(None, help="Federation, if there are several."),
) -> None:
    """Pin an enrolled owner's TLS certificate, in place of one it had; a running coordinator sees it at once."""
    _, federations, _ = coordinator_settings(home)
    name = pick_federation(federations, federation).name
    _roster(home, name).key(OwnerId(owner))
    brought = _usable(home, name, owner, file)
    with drafts(home) as scratch:
        _pin(home, scratch, name, owner, brought)
    print_line(brought.fingerprint)


def _usable(home: Path, federation: str, owner: str, file: Path) -> Certificate:
    """Return the certificate in a file, which must not be another owner's: they would throw each other out."""
    from fedllm.relay import tls

    brought = tls.read_certificate(file, SystemClock())
    mine = tls.pinned_folder(home, federation) / f"{owner}.pem"
    for path in sorted(home.glob("certificates/*/*.pem")):
        if path != mine and path.read_bytes() == brought.pem:
            raise ConfigError(
                f"{file} is the certificate of {path.stem!r} in federation {path.parent.name!r} already",
                hint="every owner's folder has one of its own, made by 'fedllm client key'",
            )
    return brought


def _pin(home: Path, scratch: Path, federation: str, owner: str, brought: Certificate) -> None:
    from fedllm.relay import tls

    folder = tls.pinned_folder(scratch, federation)
    folder.mkdir(parents=True)
    tls.pinned_folder(home, federation).mkdir(parents=True, exist_ok=True)
    (folder / f"{owner}.pem").write_bytes(brought.pem)


@owners.command("list")
def list_owners(
    home: Path = typer.Option(..., help="The coordinator's folder."),
    federation: str | None = typer.Option(None, help="Federation, if there are several."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """List enrolled owners, their keys and declared sizes."""
    _, federations, _ = coordinator_settings(home)
    chosen = pick_federation(federations, federation)
    roster = _roster(home, chosen.name)
    rows = [(m.owner, str(VerifyKey(m.key)), chosen.declared_records.get(m.owner)) for m in roster.members]
    if as_json:
        print_json({"roster": roster.digest, "owners": [{"owner": o, "key": k, "records": n} for o, k, n in rows]})
    else:
        print_table(f"{chosen.name}: roster {roster.digest[:12]}", ("owner", "key", "declared records"), rows)


@owners.command("join-file")
def join_file(
    home: Path = typer.Option(..., help="The coordinator's folder."),
    federation: str | None = typer.Option(None, help="Federation, if there are several."),
) -> None:
    """Print what an owner needs to join: federation, coordinator key, base, roster, address. Holds no secret."""
    from fedllm.basemodel.inspect import open_base

    settings, federations, _ = coordinator_settings(home)
    chosen = pick_federation(federations, federation)
    roster = _roster(home, chosen.name)
    direct = {}
    if chosen.transport == "direct":
        address, mine = f"{settings.direct_host}:{settings.direct_port}", _own_certificate(home).certificate
        direct = {"direct": address, "certificate": mine.pem.decode("ascii")}
    print_json(
        {
            "fedllm_join": 1,
            "federation": chosen.name,
            "coordinator_key": str(SigningIdentity.load(home / KEY_FILE).public),
            "superlink": f"{settings.flower_host}:{settings.flower_port}",
            "transport": chosen.transport,
            "base": open_base(chosen.base).digest,
            "max_tokens": chosen.max_tokens,
            "roster": {m.owner: str(VerifyKey(m.key)) for m in roster.members},
            **direct,
        }
    )


def _own_certificate(home: Path) -> TlsIdentity:
    """Return the coordinator's certificate; a folder of an earlier release gets one now."""
    from fedllm.relay import tls

    if not any((home / name).exists() for name in (tls.KEY_FILE, tls.CERTIFICATE_FILE)):
        with drafts(home) as scratch:
            tls.TlsIdentity.create(scratch, SystemClock())
    return tls.TlsIdentity.load(home, SystemClock())


def roster_file(home: Path, federation: str) -> Path:
    """Return where a federation's roster lies."""
    return home / "rosters" / f"{federation}.json"


def _roster(home: Path, federation: str) -> Roster:
    path = roster_file(home, federation)
    if not path.is_file():
        raise NotFound(f"no owner is enrolled in {federation!r} yet", hint="'fedllm owner add' enrols one")
    return Roster.load(path)


def _declared(home: Path, federation: str, owner: str, records: int) -> str:
    """Return the configuration with one more owner's declared size in it, everything else as it was."""
    path = home / COORDINATOR_FILE
    header = f"[federation.{federation}.declared_records]\n"
    text = path.read_text(encoding="utf-8")
    if header not in text:
        raise NotFound(f"{path} has no section {header.strip()}", hint="add it, empty, at the end of the federation")
    return text.replace(header, f"{header}{owner} = {records}\n")
