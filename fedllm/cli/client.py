"""``fedllm client``: what a data owner's engineer does."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import typer

from fedllm import telemetry
from fedllm.cli.context import CLIENT_FILE, client_settings
from fedllm.cli.output import print_json, print_line, print_table, say
from fedllm.clock import SystemClock
from fedllm.errors import ConfigError, DataError, NotFound
from fedllm.identity import Roster, SigningIdentity, VerifyKey
from fedllm.ids import OwnerId, check_name

app = typer.Typer(no_args_is_help=True, help="Run a data owner's daemon.")
policy = typer.Typer(no_args_is_help=True, help="The owner's own limits.")
app.add_typer(policy, name="policy")
HOME = typer.Option(..., help="The owner's folder: key, policy, ledger, audit log.")
KEY_FILE = "owner.pem"


@app.command("key")
def key(home: Path = HOME) -> None:
    """Make this owner's key pair; prints the public line to send to the operator."""
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    home.chmod(0o700)
    identity = SigningIdentity.create(home / KEY_FILE)
    say(f"private key in {home / KEY_FILE} (never leaves this machine); send the next line to the operator")
    print_line(str(identity.public))


@app.command("join")
def join(
    file: Path = typer.Argument(..., help="Join file from the operator."),
    owner: str = typer.Option(..., help="This owner's name in the roster."),
    home: Path = HOME,
    data: Path = typer.Option(..., help="Folder with train.jsonl and heldout.jsonl."),
    base: Path = typer.Option(..., help="Folder of the base model."),
    max_epsilon: float = typer.Option(8.0, help="Refuse any round that would pass this, per record at delta."),
    delta: float = typer.Option(1e-5, help="Delta of the owner's limit."),
    allow_without_dp: bool = typer.Option(False, help="Accept rounds without differential privacy."),
    threads: int = typer.Option(1, help="CPU threads of training."),
    node_port: int = typer.Option(7410, help="Loopback port of the SuperNode."),
) -> None:
    """Approve a federation: pins the coordinator's key and the roster, writes client.toml and policy.toml."""
    from fedllm.basemodel.inspect import open_base
    from fedllm.client.policy import OwnerPolicy

    check_name(owner, what="owner")
    offer = _read_offer(file)
    roster = Roster.of({OwnerId(o): VerifyKey.parse(k) for o, k in offer["roster"].items()})
    mine = SigningIdentity.load(home / KEY_FILE).public
    if roster.key(OwnerId(owner)) != mine:
        raise ConfigError(
            f"the roster's key for {owner!r} is not the one in {home / KEY_FILE}",
            hint="send the line of 'fedllm client key' to the operator, who adds it and sends a fresh join file",
        )
    opened = open_base(base)
    roster.save(home / "roster.json")
    settings = {
        "owner": owner, "federation": offer["federation"], "data": str(data.absolute()), "base": str(base.absolute()),
        "coordinator_key": str(VerifyKey.parse(offer["coordinator_key"])), "roster": "roster.json",
        "superlink": offer["superlink"], "transport": offer["transport"], "max_tokens": offer["max_tokens"],
        "threads": threads, "node_port": node_port,
    }  # fmt: skip
    lines = [f"{k} = {json.dumps(v)}" for k, v in settings.items()]
    (home / CLIENT_FILE).write_text("[client]\n" + "\n".join(lines) + "\n", encoding="utf-8")
    if not (home / "policy.toml").exists():
        made = OwnerPolicy(
            max_epsilon=max_epsilon, delta=delta, allowed_bases=(opened.digest,), allow_without_dp=allow_without_dp
        )
        made.save(home / "policy.toml")
    say(f"pinned coordinator {settings['coordinator_key']}")
    say(f"pinned roster {roster.digest[:16]} of {len(roster.members)}: {', '.join(m.owner for m in roster.members)}")
    print_line(roster.digest)


@app.command("check")
def check(
    home: Path | None = typer.Option(None, help="The owner's folder; or give --data and --base."),
    data: Path | None = typer.Option(None, help="Folder with train.jsonl and heldout.jsonl."),
    base: Path | None = typer.Option(None, help="Folder of the base model (tokenizer and chat template)."),
    max_tokens: int = typer.Option(160, help="Longer records are left out."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Read the data as training would: counts, and bad lines by number and reason; text is never printed."""
    from fedllm.client.dataset import check as check_data

    if home is not None:
        settings, _ = client_settings(home)
        data, base, max_tokens = settings.data, settings.base, settings.max_tokens
    if data is None or base is None:
        raise ConfigError("nothing to check: --home, or --data and --base", hint="fedllm client check --help")
    report = check_data(data, base, max_tokens=max_tokens)
    if as_json:
        print_json(report.to_json())
    else:
        rows = [(f.name, f.accepted, f.too_long, len(f.rejected), f.mean_tokens) for f in report.files]
        print_table(f"{data}", ("file", "usable", "over limit", "bad", "mean tokens"), rows)
        bad = [(f.name, r.line, r.reason) for f in report.files for r in f.rejected]
        if bad:
            print_table("bad lines", ("file", "line", "reason"), bad)
    if any(f.rejected for f in report.files):
        raise DataError(f"{sum(len(f.rejected) for f in report.files)} bad lines", hint="mend or remove them")


@app.command("start")
def start(home: Path = HOME, threads: int | None = typer.Option(None, help="CPU threads of training.")) -> None:
    """Run the daemon until SIGTERM: keeps the model loaded, supervises its SuperNode, enforces the policy."""
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


@app.command("audit")
def audit(home: Path = HOME, as_json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """List exactly what left this machine: time, kind, round, bytes, digest."""
    path = home / "audit.jsonl"
    if not path.is_file():
        raise NotFound(f"no audit log at {path}: nothing has left this machine yet")
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if as_json:
        print_json(entries)
        return
    rows = [(e["time"], e["kind"], e["round"], e["bytes"], e["sha256"][:16]) for e in entries]
    print_table(f"{len(rows)} messages, {sum(e['bytes'] for e in entries)} bytes",
                ("time", "kind", "round", "bytes", "sha256"), rows)  # fmt: skip


@policy.command("show")
def policy_show(home: Path = HOME, as_json: bool = typer.Option(False, "--json", help="Print JSON.")) -> None:
    """Print the limits this owner enforces."""
    from fedllm.client.policy import OwnerPolicy

    table = OwnerPolicy.load(home / "policy.toml").to_table()
    if as_json:
        print_json(table)
    else:
        print_table(str(home / "policy.toml"), ("limit", "value"), sorted(table.items()))


@policy.command("set")
def policy_set(name: str, value: str, home: Path = HOME) -> None:
    """Change one limit; a raised epsilon is also a signed entry of the ledger."""
    from fedllm.client.policy import OwnerPolicy

    changed = OwnerPolicy.load(home / "policy.toml").with_value(name, value)
    changed.save(home / "policy.toml")
    print_line(f"{name} = {changed.to_table()[name]}")


def _read_offer(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise NotFound(f"no join file {file}", hint="the operator makes it with 'fedllm owner join-file'")
    try:
        offer = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ConfigError(f"{file} is not a join file: not JSON") from None
    wanted = {"fedllm_join", "federation", "coordinator_key", "superlink", "transport", "max_tokens", "roster"}
    if not isinstance(offer, dict) or set(offer) != wanted or offer["fedllm_join"] != 1:
        raise ConfigError(f"{file} is not a join file of version 1", hint="ask the operator for a fresh one")
    return dict(offer)
