"""A ledger that stays open: the same bytes are verified once, any other bytes again."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedllm.clock import FakeClock
from fedllm.errors import LedgerCorrupt
from fedllm.identity import SigningIdentity, VerifyKey
from fedllm.ids import sha256
from fedllm.messages.mechanism import RELATION_ADD_REMOVE, UNIT_RECORD, Mechanism
from fedllm.privacy.ledger import Ledger

OWNER = SigningIdentity.from_seed(b"o" * 32)
ROUND = Mechanism("dp-sgd", UNIT_RECORD, RELATION_ADD_REMOVE, 2.0, 0.05, 0.25, 2, 1e-5)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Return a ledger in a file of its own."""
    return Ledger.open(
        tmp_path / "ledger.jsonl", OWNER, FakeClock(), dataset=sha256(b"data"), limit_epsilon=50.0, delta=1e-5
    )


def charge(ledger: Ledger, number: int) -> None:
    """Reserve one round."""
    plan = sha256(f"plan {number}".encode())
    ledger.reserve(federation="tools", round_number=number, plan_digest=plan, mechanism=ROUND)


def test_own_lines_are_verified_by_other_readers_only(ledger: Ledger, tmp_path: Path, monkeypatch) -> None:
    """Ten charges check no signature again; who reads the file anew checks all eleven lines."""
    checked: list[bytes] = []
    verify = VerifyKey.verify
    monkeypatch.setattr(VerifyKey, "verify", lambda self, *of: (checked.append(of[1]), verify(self, *of))[1])
    for number in range(10):
        charge(ledger, number)
    assert checked == []
    assert len(Ledger.read(tmp_path / "ledger.jsonl", OWNER.public).reservations()) == 10
    assert len(checked) == 11
    checked.clear()
    ledger.verify()
    assert len(checked) == 11, "an audit reads everything"


def test_what_another_process_wrote_is_seen(ledger: Ledger, tmp_path: Path) -> None:
    """A limit raised at the command line, a round charged by another daemon: both count at the next charge."""
    charge(ledger, 1)
    other = Ledger.resume(tmp_path / "ledger.jsonl", OWNER, FakeClock())
    other.set_limit(60.0, reason="the board said so")
    charge(other, 2)
    charge(ledger, 3)
    assert ledger.limit_epsilon == 60.0
    assert [r.round_number for r in ledger.reservations()] == [1, 2, 3]


@pytest.mark.parametrize("at", [40, -10])
def test_a_change_behind_an_open_ledgers_back_is_found(ledger: Ledger, tmp_path: Path, at: int) -> None:
    """One byte of a line that was verified before, or of the last one written here."""
    charge(ledger, 1)
    file = tmp_path / "ledger.jsonl"
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    with pytest.raises(LedgerCorrupt):
        charge(ledger, 2)
    with pytest.raises(LedgerCorrupt):
        charge(ledger, 2)


def test_a_torn_end_that_an_audit_found_is_still_repaired(ledger: Ledger, tmp_path: Path) -> None:
    """`verify` reports it and changes nothing; the next charge sets it aside."""
    charge(ledger, 1)
    with (tmp_path / "ledger.jsonl").open("ab") as file:
        file.write(b'{"body":')
    with pytest.raises(LedgerCorrupt, match="cut short"):
        ledger.verify()
    charge(ledger, 2)
    assert [entry.kind for entry in ledger.entries()] == ["open", "reserve", "torn", "reserve"]
    ledger.verify()
