"""The owner's ledger: charging, refusing, crashes and tampering."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from fedllm.clock import FakeClock
from fedllm.errors import BudgetExhausted, ConfigError, LedgerCorrupt, NotFound, PolicyRefused
from fedllm.identity import SigningIdentity
from fedllm.ids import Digest, sha256
from fedllm.messages.mechanism import RELATION_ADD_REMOVE, UNIT_RECORD, Mechanism
from fedllm.privacy.accountant import epsilon
from fedllm.privacy.ledger import Ledger, Receipt
from fedllm.privacy.mechanism import describe

OWNER = SigningIdentity.from_seed(b"o" * 32)
DATA = sha256(b"data")
ROUND = Mechanism("dp-sgd", UNIT_RECORD, RELATION_ADD_REMOVE, 2.0, 0.05, 0.25, 2, 1e-5)


def plan(number: int) -> Digest:
    """Return a plan's digest."""
    return sha256(f"plan {number}".encode())


def opened(
    path: Path, *, limit: float = 8.0, dataset: Digest = DATA, delta: float = 1e-5, unit: str = UNIT_RECORD,
    column: str = "",
) -> Ledger:  # fmt: skip
    """Open the ledger in a folder."""
    return Ledger.open(
        path / "ledger.jsonl", OWNER, FakeClock(), dataset=dataset, limit_epsilon=limit, delta=delta, unit=unit,
        column=column,
    )  # fmt: skip


def charge(ledger: Ledger, number: int, mechanism: Mechanism = ROUND) -> Receipt:
    """Reserve one round."""
    return ledger.reserve(
        federation="tools", round_number=number, plan_digest=plan(number), mechanism=mechanism
    )  # fmt: skip


def test_rounds_are_charged_and_survive_reopening(tmp_path: Path) -> None:
    """What was spent is what the accountant says of the history, also for the next process."""
    ledger = opened(tmp_path)
    expected = epsilon([ROUND, ROUND], 1e-5)
    assert ledger.projected(ROUND) == epsilon([ROUND], 1e-5)
    charge(ledger, 1)
    receipt = charge(ledger, 2)
    assert receipt.spent == ledger.spent() == expected
    assert "per record (add-or-remove-one), δ = 1e-05" in str(receipt)
    again = Ledger.read(tmp_path / "ledger.jsonl", OWNER.public)
    assert again.spent() == expected
    assert [r.round_number for r in again.reservations()] == [1, 2]
    assert again.entries()[receipt.line - 1].digest == receipt.entry
    assert (tmp_path / "ledger.jsonl").stat().st_mode & 0o777 == 0o600


def test_a_plan_is_charged_once(tmp_path: Path) -> None:
    """The same plan again, by another process even, gives the same receipt; other numbers under it are refused."""
    first = charge(opened(tmp_path), 1)
    other = opened(tmp_path)
    assert charge(other, 1) == first
    assert len(other.reservations()) == 1
    with pytest.raises(PolicyRefused, match="another mechanism"):
        charge(other, 1, Mechanism.none())


def test_a_plan_that_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """Needed, spent, limit, unit and delta are named; exit code 3; the file is untouched."""
    ledger = opened(tmp_path, limit=1.2 * epsilon([ROUND], 1e-5))
    charge(ledger, 1)
    before = (tmp_path / "ledger.jsonl").read_bytes()
    with pytest.raises(BudgetExhausted) as caught:
        charge(ledger, 2)
    assert caught.value.exit_code == 3
    needed = describe(ledger.projected(ROUND), 1e-5, UNIT_RECORD, RELATION_ADD_REMOVE)
    for part in (needed, f"spent {ledger.spent():.2f}", f"limit {ledger.limit_epsilon:g}"):
        assert part in caught.value.message
    assert (tmp_path / "ledger.jsonl").read_bytes() == before


def test_nothing_is_refunded(tmp_path: Path) -> None:
    """Aborted is as spent as completed; a settlement is said once."""
    ledger = opened(tmp_path)
    charge(ledger, 1)
    spent = ledger.spent()
    ledger.settle(plan(1), "aborted")
    ledger.settle(plan(1), "completed")
    assert ledger.spent() == spent
    assert [e.fields["outcome"] for e in ledger.entries() if e.kind == "settle"] == ["aborted"]
    with pytest.raises(NotFound):
        ledger.settle(plan(9), "completed")


def test_no_mechanism_is_infinite_and_needs_a_ledger_without_limit(tmp_path: Path) -> None:
    """Training without DP is recorded as what it is."""
    with pytest.raises(BudgetExhausted, match="∞"):
        charge(opened(tmp_path), 1, Mechanism.none())
    free = tmp_path / "free"
    free.mkdir()
    ledger = opened(free, limit=math.inf)
    assert "∞" in str(charge(ledger, 1, Mechanism.none()))
    assert Ledger.read(free / "ledger.jsonl", OWNER.public).spent() == math.inf
    ledger.set_limit(8.0, reason="DP from now on")
    with pytest.raises(BudgetExhausted):
        charge(ledger, 2)


def test_limits_are_signed_acts(tmp_path: Path) -> None:
    """Opening never raises a limit, it may lower it; raising takes a reason."""
    opened(tmp_path, limit=4.0)
    assert opened(tmp_path, limit=9.0).limit_epsilon == 4.0
    assert opened(tmp_path, limit=3.0).limit_epsilon == 3.0
    with pytest.raises(ConfigError, match="reason"):
        opened(tmp_path, limit=3.0).set_limit(9.0, reason=" ")
    Ledger.resume(tmp_path / "ledger.jsonl", OWNER, FakeClock()).set_limit(9.0, reason="board decision 12")
    assert opened(tmp_path, limit=9.0).limit_epsilon == 9.0


def test_other_data_same_budget(tmp_path: Path) -> None:
    """Editing the data does not buy a fresh budget: records may be in both."""
    charge(opened(tmp_path), 1)
    ledger = opened(tmp_path, dataset=sha256(b"edited"))
    assert ledger.dataset == sha256(b"edited")
    assert ledger.spent() == epsilon([ROUND], 1e-5)
    assert [e.kind for e in ledger.entries()] == ["open", "reserve", "dataset"]


def test_one_ledger_one_delta(tmp_path: Path) -> None:
    """An epsilon at another delta is another statement."""
    opened(tmp_path)
    with pytest.raises(ConfigError, match="delta"):
        opened(tmp_path, delta=1e-6)


@pytest.mark.parametrize("cut", [1, 40, 120])
def test_a_torn_line_is_set_aside_and_what_it_charged_is_charged(tmp_path: Path, cut: int) -> None:
    """A crash in mid-write: kept in a file, told in the chain, and its reservation counted if it can be read."""
    ledger = opened(tmp_path)
    charge(ledger, 1)
    path = tmp_path / "ledger.jsonl"
    whole = path.read_bytes()
    torn = whole.splitlines(keepends=True)[1][:-cut]
    path.write_bytes(whole.splitlines(keepends=True)[0] + torn)
    with pytest.raises(LedgerCorrupt, match="line 2 was cut short"):
        Ledger.read(path, OWNER.public)
    mended = opened(tmp_path)
    assert (tmp_path / "ledger.jsonl.torn-1").read_bytes() == torn
    assert [e.kind for e in mended.entries()] == ["open", "reserve", "torn"]
    assert mended.spent() == epsilon([ROUND], 1e-5)
    assert charge(mended, 1).spent == mended.spent(), "the same plan is not charged again"
    mended.verify()


def test_a_torn_line_that_says_nothing_charges_nothing(tmp_path: Path) -> None:
    """Half a name is no reservation; it is still told and kept."""
    ledger = opened(tmp_path)
    with (tmp_path / "ledger.jsonl").open("ab") as file:
        file.write(b'{"body":{"at":"2026-01-01T00:00:00Z","fields":{"feder')
    assert opened(tmp_path).spent() == 0.0
    assert [e.kind for e in opened(tmp_path).entries()] == ["open", "torn"]
    assert charge(ledger, 1).line == 3, "another process sees the mended file"


def test_every_kind_of_tampering_names_its_line(tmp_path: Path) -> None:
    """Changed, removed, swapped, re-signed by another key: the first wrong line is named."""
    ledger = opened(tmp_path)
    for number in (1, 2, 3):
        charge(ledger, number)
    path = tmp_path / "ledger.jsonl"
    good = path.read_bytes().splitlines(keepends=True)
    edited = json.loads(good[1])
    edited["body"]["fields"]["mechanism"]["noise_multiplier"] = 50.0
    forged = json.dumps(edited, sort_keys=True, separators=(",", ":")).encode() + b"\n"
    cases = {
        2: [good[0], forged, *good[2:]],
        3: [*good[:2], good[3]],
        1: good[1:],
        4: [*good[:3], b"{}\n"],
    }
    for line, lines in cases.items():
        path.write_bytes(b"".join(lines))
        with pytest.raises(LedgerCorrupt, match=f"line {line} "):
            ledger.verify()
        with pytest.raises(LedgerCorrupt, match=f"line {line} "):
            opened(tmp_path)
    path.write_bytes(b"".join(good))
    with pytest.raises(LedgerCorrupt, match="not signed"):
        Ledger.read(path, SigningIdentity.from_seed(b"x" * 32).public)


def test_the_charge_is_on_disk_before_reserve_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File and folder are synced, the file first, after the line was written."""
    ledger = opened(tmp_path)
    synced: list[tuple[bool, int]] = []
    real = os.fsync

    def watched(descriptor: int) -> None:
        is_folder = os.path.isdir(f"/proc/self/fd/{descriptor}")  # noqa: PTH112
        synced.append((is_folder, (tmp_path / "ledger.jsonl").read_bytes().count(b'"reserve"')))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    charge(ledger, 1)
    assert synced == [(False, 1), (True, 1)]


def test_a_reader_cannot_write(tmp_path: Path) -> None:
    """Without the private key there is no entry."""
    opened(tmp_path)
    with pytest.raises(TypeError, match="reading"):
        charge(Ledger.read(tmp_path / "ledger.jsonl", OWNER.public), 1)
    with pytest.raises(NotFound):
        Ledger.read(tmp_path / "none.jsonl", OWNER.public)
