"""``fedllm client``: what a data owner's engineer does."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fedllm import telemetry
from fedllm.cli.context import CLIENT_FILE, client_settings
from fedllm.cli.files import drafts
from fedllm.cli.offer import read_offer
from fedllm.cli.output import exact, print_json, print_line, print_table, say
from fedllm.cli.plain import Noun
from fedllm.cli.privacy import limit
from fedllm.clock import SystemClock
from fedllm.errors import AuthenticationError, BaseMismatch, ConfigError, DataError, IntegrityError, NotFound
from fedllm.identity import SigningIdentity, VerifyKey
from fedllm.ids import OwnerId, check_name

if TYPE_CHECKING:
    from fedllm.client.policy import OwnerPolicy

app = Noun("Run a data owner's daemon.")
policy = Noun("The owner's own limits.")
app.add_typer(policy, name="policy")
HOME = typer.Option(..., help="The owner's folder: key, policy, ledger, audit log.")
KEY_FILE = "owner.pem"
POLICY_FILE = "policy.toml"
LEDGER_FILE = "ledger.jsonl"
CERTIFICATE_OF_COORDINATOR = "coordinator.pem"


@app.command("key")
def key(home: Path = HOME) -> None:
    """Make this owner's key pair and TLS certificate; prints the public line to send to the operator."""
    from fedllm.relay.tls import CERTIFICATE_FILE, TlsIdentity

    old = (home / KEY_FILE).exists()
    if old and (home / CERTIFICATE_FILE).exists():
        raise ConfigError(
            f"{home / KEY_FILE} exists and a key is never overwritten", hint="remove it yourself if it is not needed"
        )
    with drafts(home) as scratch:
        identity = SigningIdentity.load(home / KEY_FILE) if old else SigningIdentity.create(scratch / KEY_FILE)
        if not (home / CERTIFICATE_FILE).exists():
            TlsIdentity.create(scratch, SystemClock())
    home.chmod(0o700)
    say(f"private key in {home / KEY_FILE} (never leaves this machine); send the next line to the operator")
    say(f"for a federation of transport direct send {home / CERTIFICATE_FILE} too, and nothing else of this folder")
    print_line(str(identity.public))


@app.command("join")
def join(
    file: Path = typer.Argument(..., help="Join file from the operator."),
    owner: str = typer.Option(..., help="This owner's name in the roster."),
    home: Path = HOME,
    data: Path = typer.Option(..., help="Folder with train.jsonl and heldout.jsonl."),
    base: Path = typer.Option(..., help="Folder of the base model."),
    max_epsilon: float = typer.Option(8.0, help="Refuse any round that would pass this, per unit at delta."),
    unit: str = typer.Option("record", help="Unit that epsilon is counted in: record, person or owner."),
    unit_column: str = typer.Option("", help="Unit person: the key of each record that names the person."),
    delta: float = typer.Option(1e-5, help="Delta of the owner's limit."),
    allow_without_dp: bool = typer.Option(False, help="Accept rounds without differential privacy."),
    threads: int = typer.Option(1, help="CPU threads of training."),
    node_port: int = typer.Option(7410, help="Loopback port of the SuperNode."),
) -> None:
    """Approve a federation: pins the coordinator's key and the roster, writes client.toml and policy.toml."""
    from fedllm.basemodel.inspect import open_base
    from fedllm.client.policy import OwnerPolicy

    check_name(owner, what="owner")
    offer = read_offer(file)
    mine = SigningIdentity.load(home / KEY_FILE).public
    if offer.roster.key(OwnerId(owner)) != mine:
        raise ConfigError(
            f"the roster's key for {owner!r} is not the one in {home / KEY_FILE}",
            hint="send the line of 'fedllm client key' to the operator, who adds it and sends a fresh join file",
        )
    _check_pinned(home, offer.coordinator_key)
    if offer.certificate is not None:
        _check_own_certificate(home)
    if not data.is_dir():
        raise NotFound(f"no data folder {data}", hint="a folder with train.jsonl and heldout.jsonl")
    opened = open_base(base)
    if opened.digest != offer.base:
        raise BaseMismatch(
            f"the base model in {base} is {opened.digest[:16]}, the federation trains {offer.base[:16]}",
            hint="ask the operator which base it is, and get the same: 'fedllm model show' prints a digest",
        )
    limits = _agreed(home, OwnerPolicy(
        max_epsilon=max_epsilon, delta=delta, allowed_bases=(opened.digest,), allow_without_dp=allow_without_dp,
        unit=unit,
    ))  # fmt: skip
    settings = {
        "owner": owner, "federation": offer.federation, "data": str(data.absolute()), "base": str(base.absolute()),
        "coordinator_key": str(offer.coordinator_key), "roster": "roster.json", "superlink": offer.superlink,
        "transport": offer.transport, "max_tokens": offer.max_tokens, "threads": threads, "node_port": node_port,
        **({"direct": offer.direct} if offer.direct else {}), **({"unit_column": unit_column} if unit_column else {}),
    }  # fmt: skip
    lines = [f"{k} = {json.dumps(v)}" for k, v in settings.items()]
    with drafts(home) as scratch:
        offer.roster.save(scratch / "roster.json")
        (scratch / CLIENT_FILE).write_text("[client]\n" + "\n".join(lines) + "\n", encoding="utf-8")
        if offer.certificate is not None:
            (scratch / CERTIFICATE_OF_COORDINATOR).write_bytes(offer.certificate.pem)
        if limits is not None:
            limits.save(scratch / POLICY_FILE)
    members = offer.roster.members
    say(f"pinned coordinator {offer.coordinator_key}")
    if offer.certificate is not None:
        say(f"pinned the coordinator's TLS certificate {offer.certificate.fingerprint[:16]} at {offer.direct}")
    say(f"pinned roster {offer.roster.digest[:16]} of {len(members)}: {', '.join(m.owner for m in members)}")
    least = OwnerPolicy.load(home / POLICY_FILE).min_cohort
    if least < len(members):
        say(
            f"rounds of {least} of these {len(members)} owners are accepted, and what you train is open to the"
            " coordinator if all others in one collude with it"
        )
        say(f"for larger rounds only: fedllm client policy set min_cohort {len(members)} --home {home}")
    print_line(offer.roster.digest)


def _check_own_certificate(home: Path) -> None:
    from fedllm.relay.tls import CERTIFICATE_FILE, TlsIdentity

    if not (home / CERTIFICATE_FILE).exists():
        raise NotFound(
            f"the federation's transport is direct, and there is no TLS certificate at {home / CERTIFICATE_FILE}",
            hint=f"make it with 'fedllm client key --home {home}' and send it to the operator",
        )
    TlsIdentity.load(home, SystemClock())


def _check_pinned(home: Path, key: VerifyKey) -> None:
    if not (home / CLIENT_FILE).exists():
        return
    pinned = VerifyKey.parse(client_settings(home)[0].coordinator_key)
    if pinned != key:
        raise AuthenticationError(
            f"the join file is of coordinator {str(key)[:20]}…, the one pinned here is {str(pinned)[:20]}…",
            hint=f"ask the operator by another way; only if the key really changed, remove {home / CLIENT_FILE}",
        )


def _agreed(home: Path, wanted: OwnerPolicy) -> OwnerPolicy | None:
    """Return the policy to write; None if the owner has one, which no join changes."""
    from fedllm.client.policy import OwnerPolicy

    path = home / POLICY_FILE
    if not path.exists():
        return wanted
    kept = OwnerPolicy.load(path)
    (base,) = wanted.allowed_bases
    if base not in kept.allowed_bases:
        raise BaseMismatch(
            f"base model {base[:16]} is not among the {len(kept.allowed_bases)} that {path} allows",
            hint=f"fedllm client policy set allowed_bases {base} --home {home}, if this owner's people agree",
        )
    say(f"{path} is kept as it is; change it with 'fedllm client policy set'")
    return None


@app.command("check")
def check(
    home: Path | None = typer.Option(None, help="The owner's folder; or give --data and --base."),
    data: Path | None = typer.Option(None, help="Folder with train.jsonl and heldout.jsonl."),
    base: Path | None = typer.Option(None, help="Folder of the base model (tokenizer and chat template)."),
    max_tokens: int = typer.Option(160, help="Longer records are left out."),
    unit_column: str = typer.Option("", help="The key of each record that names the person."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Read the data as training would: counts, and bad lines by number and reason; text is never printed."""
    from fedllm.basemodel.inspect import read_config
    from fedllm.client.dataset import check as check_data

    if home is not None:
        settings, _ = client_settings(home)
        data, base, max_tokens, unit_column = settings.data, settings.base, settings.max_tokens, settings.unit_column
    if data is None or base is None:
        raise ConfigError("nothing to check: --home, or --data and --base", hint="fedllm client check --help")
    if not data.is_dir():
        raise NotFound(f"no data folder {data}", hint="a folder with train.jsonl and heldout.jsonl")
    read_config(base)
    report = check_data(data, base, max_tokens=max_tokens, unit_column=unit_column)
    if as_json:
        print_json(report.to_json())
    else:
        rows = [(f.name, f.accepted, len(f.units), f.too_long, len(f.rejected), f.mean_tokens) for f in report.files]
        print_table(f"{data}", ("file", "usable", "units", "over limit", "bad", "mean tokens"), rows)
        bad = [(f.name, r.line, r.reason) for f in report.files for r in f.rejected]
        if bad:
            print_table("bad lines", ("file", "line", "reason"), bad)
    if any(f.rejected for f in report.files):
        raise DataError(f"{sum(len(f.rejected) for f in report.files)} bad lines", hint="mend or remove them")


@app.command("start")
def start(home: Path = HOME, threads: int | None = typer.Option(None, help="CPU threads of training.")) -> None:
    """Run the daemon until SIGTERM: keeps the model loaded, supervises its relay, enforces the policy."""
    settings, _ = client_settings(home, {"threads": threads})
    # Read by OpenMP when torch is first imported; the default policy spins and starves the other daemons.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ["OMP_NUM_THREADS"] = str(settings.threads)
    telemetry.configure(SystemClock())
    from fedllm.client.app import run

    run(settings)


@app.command("status")
def status(home: Path = HOME, as_json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """Show the daemon's state, what isolates its relay, and what the ledger says."""
    from fedllm.client.status import read_status

    report = read_status(home)
    if as_json:
        print_json(report)
    else:
        print_table(str(home), ("what", "value"), sorted(report.items()))


_LEFT = {
    "HelloReply": "name, release",
    "Started": "training began",
    "Pending": "how far training or scoring is",
    "Advertised": "fresh public keys, seconds of training",
    "SharedKeys": "shares of this round's secrets, sealed for peers",
    "Masked": "update or scores, under masks",
    "Complained": "whose shares did not open",
    "Confirmed": "signature over the survivors",
    "Unmasked": "shares that open the sum, nothing else",
    "Scoring": "scoring began",
    "Closed": "the round's secrets are gone",
    "Refused": "a no, and its code",
    "again": "an earlier answer, repeated",
}
"""What each kind of message is, in an owner's words; a test holds it to the messages there are."""


@app.command("audit")
def audit(home: Path = HOME, as_json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """List exactly what left this machine: time, kind, round, bytes, digest."""
    path = home / "audit.jsonl"
    if not path.is_file():
        raise NotFound(f"no audit log at {path}: nothing has left this machine yet", hint="fedllm client start")
    entries = [_entry(path, n, line) for n, line in enumerate(path.read_bytes().splitlines(), start=1)]
    if as_json:
        print_json(entries)
        return
    rows = [
        (e["time"], e["kind"], _LEFT.get(e["kind"], "unknown to this release"), e["round"], f"{e['bytes']:,}",
         e["sha256"][:16])
        for e in entries
    ]  # fmt: skip
    print_table(f"{len(rows)} messages, {sum(e['bytes'] for e in entries):,} bytes",
                ("time", "kind", "what it was", "round", "bytes", "sha256"), rows)  # fmt: skip


def _entry(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        return {key: json.loads(line)[key] for key in ("time", "kind", "round", "bytes", "sha256")}
    except (ValueError, KeyError, TypeError):
        raise IntegrityError(f"{path}: line {number} is no entry of an audit log", hint="a crash may cut one") from None


@policy.command("show")
def policy_show(home: Path = HOME, as_json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """Print the limits this owner enforces."""
    from fedllm.client.policy import OwnerPolicy

    table = OwnerPolicy.load(home / POLICY_FILE).to_table()
    if as_json:
        print_json(table)
    else:
        print_table(str(home / POLICY_FILE), ("limit", "value"), [(k, exact(v)) for k, v in sorted(table.items())])


@policy.command("set")
def policy_set(
    name: str = typer.Argument(..., help="Limit to change; 'fedllm client policy show' lists them."),
    value: str = typer.Argument(..., help="New value; lists are comma-separated."),
    home: Path = HOME,
    reason: str = typer.Option("changed by the owner", help="Goes into the ledger with a changed budget."),
) -> None:
    """Change one limit; a changed budget is also a signed entry of the ledger."""
    from fedllm.client.policy import OwnerPolicy

    before = OwnerPolicy.load(home / POLICY_FILE)
    changed = before.with_value(name, value)
    if changed.delta != before.delta and (home / LEDGER_FILE).is_file():
        raise ConfigError(
            f"the ledger counts at delta {before.delta:g} and cannot change to {changed.delta:g}",
            hint="one ledger has one delta",
        )
    if changed.unit != before.unit and (home / LEDGER_FILE).is_file():
        raise ConfigError(
            f"the ledger counts by {before.unit} and cannot change to {changed.unit}",
            hint="one ledger has one unit: what was spent in one says nothing in the other",
        )
    recorded = limit(home, changed.limit_epsilon, reason=reason)
    with drafts(home) as scratch:
        changed.save(scratch / POLICY_FILE)
    if recorded:
        say("the changed budget is a signed line of the ledger and holds at once; what was spent stays spent")
    else:
        say("a running daemon keeps the old limit until it is started again")
    print_line(f"{name} = {exact(changed.to_table()[name])}")
