"""A data owner's own commands over a real ledger: what was spent, what the limit is, who changed it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from cli.command_line import Said, fedllm, files, process
from cli.conftest import OWNERS, Scene

from fedllm.clock import FakeClock
from fedllm.identity import SigningIdentity
from fedllm.ids import sha256
from fedllm.messages.mechanism import RELATION_ADD_REMOVE, UNIT_RECORD, Mechanism
from fedllm.privacy.ledger import Ledger

MECHANISM = Mechanism("dp-sgd", UNIT_RECORD, RELATION_ADD_REMOVE, 2.0, 0.05, 0.25, 2, 1e-5)


@pytest.fixture
def home(scene: Scene) -> Path:
    """Return an owner's folder with a ledger that was charged once."""
    folder = scene.owner("east")
    identity = SigningIdentity.load(folder / "owner.pem")
    ledger = Ledger.open(
        folder / "ledger.jsonl", identity, FakeClock(), dataset=sha256(b"data"), limit_epsilon=8.0, delta=1e-5
    )
    ledger.reserve(federation="tools", round_number=1, plan_digest=sha256(b"plan"), mechanism=MECHANISM)
    return folder


def test_show_says_epsilon_with_unit_and_delta(home: Path) -> None:
    """An epsilon never stands alone, in words or as JSON."""
    said = fedllm("privacy", "show", "--home", home)
    assert said.exit_code == 0, said
    assert "per record (add-or-remove-one), δ = 1e-05 of 8" in said.out
    found = fedllm("privacy", "show", "--home", home, "--json").json()
    assert 0 < found["epsilon"] < found["limit"] == 8.0
    assert (found["unit"], found["relation"], found["delta"]) == (UNIT_RECORD, RELATION_ADD_REMOVE, 1e-5)
    assert found["reservations"] == 1


def test_verify_names_the_line_that_was_changed(home: Path) -> None:
    """A good ledger passes; one changed digit is found, exit 1."""
    assert fedllm("privacy", "verify", "--home", home).out == "2 entries, chain and signatures good\n"
    assert fedllm("privacy", "verify", "--home", home, "--json").json()["entries"] == 2
    ledger = home / "ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes().replace(b'"steps":2', b'"steps":1'))
    before = files(home)
    fedllm("privacy", "verify", "--home", home).fails(1, "ledger-corrupt", "line 2")
    fedllm("privacy", "show", "--home", home).fails(1, "ledger-corrupt", "line 2")
    assert files(home) == before


def test_a_raised_budget_is_a_signed_line_of_the_ledger(home: Path) -> None:
    """`policy set max_epsilon` writes the policy and the ledger; the reason is in the chain."""
    said = fedllm("client", "policy", "set", "max_epsilon", 12, "--home", home, "--reason", "board, 3 May")
    assert (said.exit_code, said.out) == (0, "max_epsilon = 12.0\n"), said
    entry = Ledger.read(home / "ledger.jsonl", SigningIdentity.load(home / "owner.pem").public).entries()[-1]
    assert (entry.kind, entry.fields) == ("limit", {"limit": 12.0, "reason": "board, 3 May"})
    assert fedllm("privacy", "show", "--home", home, "--json").json()["limit"] == 12.0
    assert fedllm("client", "policy", "show", "--home", home, "--json").json()["max_epsilon"] == 12.0


def test_other_limits_leave_the_ledger_alone(home: Path) -> None:
    """Only the budget is the ledger's affair, and its delta never changes."""
    ledger = (home / "ledger.jsonl").read_bytes()
    assert fedllm("client", "policy", "set", "max_rank", 8, "--home", home).exit_code == 0
    before = files(home)
    fedllm("client", "policy", "set", "delta", 1e-6, "--home", home).fails(2, "config", "one delta")
    fedllm("client", "policy", "set", "max_epsilon", 9, "--home", home, "--reason", " ").fails(2, "config", "reason")
    assert files(home) == before
    assert before["ledger.jsonl"] == ledger


def test_without_dp_there_is_no_limit_and_json_says_null(home: Path) -> None:
    """Accepting rounds without a guarantee is recorded too; JSON has no infinity."""
    assert fedllm("client", "policy", "set", "allow_without_dp", "true", "--home", home).exit_code == 0
    assert fedllm("privacy", "show", "--home", home, "--json").json()["limit"] is None
    assert "of no limit" in fedllm("privacy", "show", "--home", home).out


def test_calibrate_prints_a_number_and_nothing_else() -> None:
    """The noise multiplier on stdout, no library's advice on stderr, not even for a hopeless budget."""
    said = process("privacy", "calibrate", "--epsilon", 2, "--delta", 0.01, "--steps", 1, "--sample-rate", 1, "--json")
    assert (said.exit_code, said.err) == (0, "")
    assert 0.5 < said.json()["noise_multiplier"] < 1.5
    rough = (
        "from fedllm.messages.plan import Mechanism\nfrom fedllm.privacy.accountant import epsilon\n"
        "epsilon([Mechanism('dp-sgd', 'record', 'add-or-remove-one', 0.02, 1.0, 0.5, 50, 1e-5)], 1e-5)"
    )
    assert process("version", first=rough).err == ""


def test_joining_again_keeps_the_owners_limits(scene: Scene) -> None:
    """A fresh join file renews the roster; the owner's policy is its own and stays."""
    home = scene.owner("east")
    assert fedllm("client", "policy", "set", "max_epsilon", 3, "--home", home).exit_code == 0
    said = fedllm(*scene.join("east"))
    assert said.exit_code == 0
    assert "is kept as it is" in said.err
    assert "rounds of 3 of these 4 owners are accepted" in said.err
    assert fedllm("client", "policy", "set", "min_cohort", 4, "--home", home).exit_code == 0
    assert "are accepted" not in fedllm(*scene.join("east")).err
    assert fedllm("client", "policy", "show", "--home", home, "--json").json()["max_epsilon"] == 3.0


def test_settings_show_values_as_typed_and_where_they_came_from(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small delta is not rounded to zero; a variable beats the file, and `--origin` says so."""
    monkeypatch.setenv("FEDLLM_COORDINATOR_PORT", "7777")
    said = fedllm("config", "show", scene.home, "--origin")
    assert any(line.split() == ["port", "7777", "FEDLLM_COORDINATOR_PORT"] for line in said.out.splitlines()), said.out
    found = fedllm("config", "show", scene.home, "--json").json()
    assert found["federation.tools.delta"] == {"value": 1e-5, "origin": "default"}
    assert "1e-05" in fedllm("client", "policy", "show", "--home", scene.owner("east")).out


def test_tables_in_a_pipe_break_no_line(scene: Scene) -> None:
    """A key of 72 characters stays on one line, so that cut and grep work."""
    said = fedllm("owner", "list", "--home", scene.home)
    assert sum(line.count("ed25519:") == 1 and len(line.split()) == 3 for line in said.out.splitlines()) == 4


def test_check_counts_and_prints_no_word_of_a_record(scene: Scene) -> None:
    """Good data: numbers in a table or as JSON, and not one word that a record holds."""
    home = scene.owner("east")
    said = fedllm("client", "check", "--home", home)
    found = fedllm("client", "check", "--home", home, "--json")
    assert (said.exit_code, said.err, found.exit_code, found.err) == (0, "", 0, "")
    assert [f["accepted"] for f in found.json()["files"]] == [40, 8]
    text = (scene.data["east"] / "train.jsonl").read_text(encoding="utf-8")
    words = set(re.findall(r"[a-z]{4,}", text)) - {"file"}  # a column of the table
    assert not [word for word in words if word in said.out.lower().replace(str(scene.data["east"]), "")]
    assert not [word for word in words if word in found.out]


def _make_direct(scene: Scene) -> None:
    """Set the federation's transport, as an operator does with an editor."""
    config = scene.home / "fedllm.toml"
    alias = 'alias = "acme/tools"\n'
    config.write_text(config.read_text(encoding="utf-8").replace(alias, alias + 'transport = "direct"\n'))


def _certify(scene: Scene, *owners: str) -> None:
    for owner in owners:
        said = fedllm("owner", "certificate", owner, scene.owner(owner) / "tls.pem", "--home", scene.home)
        assert said.exit_code == 0, said


def test_a_key_comes_with_a_certificate_and_an_older_folder_gets_one(scene: Scene, tmp_path: Path) -> None:
    """Both in one step; a folder of before has its key kept; neither is ever overwritten."""
    home = tmp_path / "new"
    said = fedllm("client", "key", "--home", home)
    assert (said.exit_code, len(said.out.splitlines())) == (0, 1)
    assert "tls.pem" in said.err
    assert {p.name: p.stat().st_mode & 0o777 for p in home.iterdir()} == dict.fromkeys(
        ("owner.pem", "tls.pem", "tls.key"), 0o600
    )
    before = files(home)
    fedllm("client", "key", "--home", home).fails(2, "config", "never overwritten")
    assert files(home) == before
    for name in ("tls.pem", "tls.key"):
        (home / name).unlink()
    again = fedllm("client", "key", "--home", home)
    assert again.out == said.out
    after = files(home)
    assert after["owner.pem"] == before["owner.pem"]
    assert after["tls.pem"] != before["tls.pem"]


def test_a_direct_federation_is_enrolled_with_certificates_and_joined_with_one(scene: Scene) -> None:
    """What is missing is named at each step; the join file carries address and certificate, and no secret."""
    _make_direct(scene)
    check = ("coordinator", "check", "--home", scene.home)
    fedllm(*check).fails(5, "not-found", "'east'", "fedllm owner certificate east FILE")
    _certify(scene, "east", "north", "south")
    fedllm(*check).fails(5, "not-found", "'west'")
    _certify(scene, "west")
    assert fedllm(*check).exit_code == 0

    text = fedllm("owner", "join-file", "--home", scene.home).out
    offer = json.loads(text)
    assert (offer["fedllm_join"], offer["transport"], offer["direct"]) == (1, "direct", "127.0.0.1:7403")
    assert offer["certificate"] == (scene.home / "tls.pem").read_text(encoding="ascii")
    assert "PRIVATE" not in text
    scene.join_file.write_text(text, encoding="utf-8")
    for owner in OWNERS:
        said = fedllm(*scene.join(owner))
        assert said.exit_code == 0, said
        joined = files(scene.owner(owner))
        assert joined["coordinator.pem"] == files(scene.home)["tls.pem"]
        assert b'transport = "direct"' in joined["client.toml"]
        assert b'direct = "127.0.0.1:7403"' in joined["client.toml"]


def test_an_owner_of_a_direct_federation_is_not_enrolled_without_its_certificate(scene: Scene, tmp_path: Path) -> None:
    """No certificate, a wrong file, another owner's: refused with the reason, and nothing is written."""
    _make_direct(scene)
    _certify(scene, *OWNERS)
    line = fedllm("client", "key", "--home", tmp_path / "new").out.strip()
    add = ("owner", "add", "new", line, "--records", 40, "--home", scene.home)
    before = files(scene.home)
    fedllm(*add).fails(2, "config", "--certificate", "direct", "tls.pem")
    fedllm(*add, "--certificate", tmp_path / "none.pem").fails(5, "not-found", "none.pem")
    fedllm(*add, "--certificate", tmp_path / "new" / "tls.key").fails(2, "config", "private key")
    theirs = scene.owner("east") / "tls.pem"
    fedllm(*add, "--certificate", theirs).fails(2, "config", "'east'", "'tools'")
    fedllm("owner", "certificate", "nobody", theirs, "--home", scene.home).fails(5, "not-found", "'nobody'")
    assert files(scene.home) == before
    said = fedllm(*add, "--certificate", tmp_path / "new" / "tls.pem")
    assert said.exit_code == 0, said
    after = files(scene.home)
    assert after["certificates/tools/new.pem"] == (tmp_path / "new" / "tls.pem").read_bytes()


def test_a_certificate_is_replaced_by_the_operator_alone(scene: Scene) -> None:
    """A fresh one of the same owner takes the old one's place; its fingerprint is printed."""
    _certify(scene, "east")
    old = fedllm("owner", "certificate", "east", scene.owner("east") / "tls.pem", "--home", scene.home).out
    for name in ("tls.pem", "tls.key"):
        (scene.owner("east") / name).unlink()
    fedllm("client", "key", "--home", scene.owner("east"))
    new = fedllm("owner", "certificate", "east", scene.owner("east") / "tls.pem", "--home", scene.home).out
    assert len(new) == len(old) == 65
    assert new != old


def test_a_direct_join_file_that_is_incomplete_or_changed_is_refused(scene: Scene) -> None:
    """A missing address or certificate, one that is none, an owner without its own: nothing is written."""
    _make_direct(scene)
    _certify(scene, *OWNERS)
    offer = json.loads(fedllm("owner", "join-file", "--home", scene.home).out)
    before = files(scene.owner("east"))

    def joined_with(**changed: object) -> Said:
        table = {key: value for key, value in (offer | changed).items() if value is not None}
        scene.join_file.write_text(json.dumps(table), encoding="utf-8")
        return fedllm(*scene.join("east"))

    joined_with(certificate=None).fails(2, "config", "missing key 'certificate'")
    joined_with(direct=None).fails(2, "config", "missing key 'direct'")
    joined_with(direct=7403).fails(2, "config", "'direct' is a int")
    joined_with(certificate="none").fails(2, "config", "'certificate' of", "0 certificates")
    joined_with(transport="flower").fails(2, "config", "unknown key")
    assert files(scene.owner("east")) == before
    for name in ("tls.pem", "tls.key"):
        (scene.owner("east") / name).unlink()
    joined_with().fails(5, "not-found", "no TLS certificate", "fedllm client key")


def test_a_direct_owner_or_coordinator_without_its_key_does_not_start(scene: Scene) -> None:
    """Found before a model is loaded or a port is opened: exit 5 and the file's name; 4 for a readable key."""
    _make_direct(scene)
    _certify(scene, *OWNERS)
    scene.join_file.write_text(fedllm("owner", "join-file", "--home", scene.home).out, encoding="utf-8")
    fedllm(*scene.join("east"))
    for home, command in ((scene.owner("east"), "client"), (scene.home, "coordinator")):
        (home / "tls.key").chmod(0o644)
        port = ("--port", 0) if command == "coordinator" else ()
        process(command, "start", "--home", home, *port).fails(4, "authentication", "tls.key", "chmod 600")
        (home / "tls.key").unlink()
        process(command, "start", "--home", home, *port).fails(5, "not-found", "tls.key")


def test_the_audit_says_of_every_kind_of_message_what_it_was() -> None:
    """A kind that can leave, and that the audit cannot name, would be a surprise to the owner's people."""
    from fedllm.cli.client import _LEFT
    from fedllm.messages.round import BODIES

    down = {
        "Hello", "Begin", "Retry", "FetchAdvertise", "ShareKeys", "SendMasked", "Confirm", "Unmask", "Evaluate",
        "FetchScores", "Close",
    }  # fmt: skip
    assert set(_LEFT) == set(BODIES) - down | {"again"}
