"""The owner's ledger in every unit: streams charged once, sums priced with their real noise, older files still read."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from unit.privacy.test_ledger import DATA, OWNER, ROUND, charge, opened, plan

from fedllm.clock import FakeClock
from fedllm.errors import ConfigError, LedgerCorrupt, NotFound, PolicyRefused
from fedllm.ids import sha256
from fedllm.messages.mechanism import (
    RELATION_ADD_REMOVE,
    RELATION_ZERO_OUT,
    UNIT_OWNER,
    UNIT_PERSON,
    UNIT_RECORD,
    AdaptiveClip,
    Mechanism,
    NoiseShares,
    Stream,
)
from fedllm.privacy import chain
from fedllm.privacy.accountant import epsilon
from fedllm.privacy.charges import RELATIONS
from fedllm.privacy.ledger import Ledger

ADAPTIVE = dataclasses.replace(ROUND, adaptive=AdaptiveClip(0.5, 0.2, 4.0))
STREAMED = Mechanism(
    "dp-ftrl", UNIT_RECORD, RELATION_ADD_REMOVE, 4.0, 0.05, 1.0, 2, 1e-5, stream=Stream("tools/1", 6, 2, 3)
)
NOISED = Mechanism(
    "skellam", UNIT_OWNER, RELATION_ZERO_OUT, 3.0, 0.05, 1.0, 1, 1e-5, shares=NoiseShares(2, 24, 1 << 15)
)


def test_a_ledger_written_before_there_were_units_still_reads(tmp_path: Path) -> None:
    """Its lines name eight numbers of a mechanism and no column; it counts per record, and goes on."""
    first = {"dataset": DATA, "unit": UNIT_RECORD, "relation": RELATION_ADD_REMOVE, "delta": 1e-5, "limit": 8.0}
    flat = {
        "kind": "dp-sgd", "unit": UNIT_RECORD, "relation": RELATION_ADD_REMOVE, "noise_multiplier": 2.0,
        "clip_norm": 0.05, "sample_rate": 0.25, "steps": 2, "delta": 1e-5,
    }  # fmt: skip
    line = chain.write_line(OWNER, chain.GENESIS, "2026-01-01T00:00:00Z", "open", first)
    charged = {"federation": "tools", "round": 1, "plan": plan(1), "mechanism": flat}
    line += chain.write_line(OWNER, sha256(line.rstrip()), "2026-01-01T00:00:00Z", "reserve", charged)
    (tmp_path / "ledger.jsonl").write_bytes(line)
    ledger = opened(tmp_path)
    assert (ledger.unit, ledger.relation, ledger.column) == (UNIT_RECORD, RELATION_ADD_REMOVE, "")
    assert charge(ledger, 1).line == 2, "the plan is known"
    assert charge(ledger, 2).spent == epsilon([ROUND, ROUND], 1e-5)


UNITS = [(UNIT_RECORD, ""), (UNIT_PERSON, "patient"), (UNIT_PERSON, "ward"), (UNIT_OWNER, "")]


@pytest.mark.parametrize("begun", UNITS, ids="-".join)
@pytest.mark.parametrize("asked", UNITS, ids="-".join)
def test_one_ledger_one_unit(tmp_path: Path, begun: tuple[str, str], asked: tuple[str, str]) -> None:
    """What was spent per record says nothing about a person, nor per patient about a ward; the file stays as it is."""
    first = opened(tmp_path, unit=begun[0], column=begun[1])
    assert (first.unit, first.column, first.relation) == (*begun, RELATIONS[begun[0]])
    before = (tmp_path / "ledger.jsonl").read_bytes()
    if asked == begun:
        assert opened(tmp_path, unit=asked[0], column=asked[1]).unit == asked[0]
    else:
        with pytest.raises(ConfigError, match=f"counts per {begun[0]}.*policy says {asked[0]}") as caught:
            opened(tmp_path, unit=asked[0], column=asked[1])
        assert "one ledger has one unit" in (caught.value.hint or "")
    assert (tmp_path / "ledger.jsonl").read_bytes() == before
    assert Ledger.resume(tmp_path / "ledger.jsonl", OWNER, FakeClock()).unit == begun[0]


@pytest.mark.parametrize(("unit", "column"), [("household", ""), (UNIT_PERSON, ""), (UNIT_RECORD, "patient")])
def test_a_unit_that_cannot_be_counted_begins_no_ledger(tmp_path: Path, unit: str, column: str) -> None:
    """An unknown unit, a person without a column, a column without persons: refused, no file."""
    with pytest.raises(ConfigError, match=unit):
        opened(tmp_path, unit=unit, column=column)
    assert not (tmp_path / "ledger.jsonl").exists()


def test_the_same_round_costs_what_its_unit_says(tmp_path: Path) -> None:
    """A sum with noise shares costs a record more than an owner; a receipt names the unit it was priced in."""
    found = {}
    for unit, column in ((UNIT_RECORD, ""), (UNIT_PERSON, "patient"), (UNIT_OWNER, "")):
        (tmp_path / unit).mkdir()
        receipt = charge(opened(tmp_path / unit, limit=100.0, unit=unit, column=column), 1, NOISED)
        assert f"per {unit} ({RELATIONS[unit]}), δ = 1e-05" in str(receipt)
        found[unit] = receipt.spent
        assert receipt.spent == epsilon([NOISED], 1e-5, unit=unit)
    assert found[UNIT_RECORD] == found[UNIT_PERSON] > found[UNIT_OWNER]


@pytest.mark.parametrize("limit", [8.0, math.inf])
@pytest.mark.parametrize("mechanism", [ROUND, STREAMED], ids=["dp-sgd", "dp-ftrl"])
def test_an_owners_ledger_takes_nothing_that_protects_records(
    tmp_path: Path, mechanism: Mechanism, limit: float
) -> None:
    """Nothing bounds what such a round tells of an owner, whatever the limit: both units are named, nothing written."""
    ledger = opened(tmp_path, limit=limit, unit=UNIT_OWNER)
    before = (tmp_path / "ledger.jsonl").read_bytes()
    with pytest.raises(PolicyRefused, match="protects a record, this ledger counts in unit 'owner'") as caught:
        charge(ledger, 1, mechanism)
    assert type(caught.value) is PolicyRefused
    assert (tmp_path / "ledger.jsonl").read_bytes() == before


def streamed(**changed: Any) -> Mechanism:
    """Return a round of the stream with some of its numbers changed."""
    assert STREAMED.stream is not None
    mine = {k: changed.pop(k) for k in ("name", "steps", "band", "separation") if k in changed}
    if "round_steps" in changed:
        changed["steps"] = changed.pop("round_steps")
    return dataclasses.replace(STREAMED, stream=dataclasses.replace(STREAMED.stream, **mine), **changed)


def test_a_stream_is_charged_once_and_then_over(tmp_path: Path) -> None:
    """Three rounds of two of its six steps cost one Gaussian; a fourth is refused, another name is another stream."""
    ledger = opened(tmp_path)
    spent = [charge(ledger, number, STREAMED).spent for number in (1, 2, 3)]
    assert spent == [epsilon([STREAMED], 1e-5)] * 3
    before = (tmp_path / "ledger.jsonl").read_bytes()
    with pytest.raises(PolicyRefused, match="is over: 6 of its 6 steps are charged, the plan takes 2 more") as caught:
        charge(ledger, 4, STREAMED)
    assert "another stream name" in (caught.value.hint or "")
    assert (tmp_path / "ledger.jsonl").read_bytes() == before
    assert charge(ledger, 3, STREAMED).spent == spent[0], "a plan that was charged before is known"
    assert charge(ledger, 4, streamed(name="tools/2")).spent > spent[0]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"noise_multiplier": 5.0}, "begun with noise multiplier 4, the plan says 5"),
        ({"clip_norm": 1.0}, "begun with clip norm 0.05, the plan says 1"),
        ({"steps": 8}, "begun with steps 6, the plan says 8"),
        ({"band": 1}, "begun with band 2, the plan says 1"),
        ({"separation": 4}, "begun with separation 3, the plan says 4"),
        ({"round_steps": 5}, "is over: 2 of its 6 steps are charged, the plan takes 5 more"),
    ],
    ids=str,
)
def test_a_stream_goes_on_with_the_numbers_it_was_begun_with(
    tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    """Its sensitivity is that of one matrix, one clip norm, so many steps: nothing else goes under its name."""
    ledger = opened(tmp_path)
    charge(ledger, 1, STREAMED)
    with pytest.raises(PolicyRefused, match=said):
        charge(ledger, 2, streamed(**changed))
    assert charge(ledger, 2, streamed(round_steps=4)).line == 3, "fewer or more steps a round are no other numbers"


def test_a_stream_belongs_to_one_federation(tmp_path: Path) -> None:
    """Two federations that name their streams alike would share one charge."""
    ledger = opened(tmp_path)
    charge(ledger, 1, STREAMED)
    with pytest.raises(PolicyRefused, match="belongs to federation 'tools', not 'other'"):
        ledger.reserve(federation="other", round_number=1, plan_digest=plan(2), mechanism=STREAMED)


def test_a_sum_is_priced_with_the_noise_that_was_in_it(tmp_path: Path) -> None:
    """More honest shares than were counted on: the price falls, for this plan only, and never below the truth."""
    ledger = opened(tmp_path, unit=UNIT_OWNER, limit=100.0)
    for number in (1, 2):
        charge(ledger, number, NOISED)
    reserved = ledger.spent()
    ledger.realised(plan(1), 8)
    noisier = dataclasses.replace(NOISED, noise_multiplier=NOISED.noise_multiplier * math.sqrt(8 / 2))
    assert ledger.spent() == epsilon([noisier, NOISED], 1e-5, unit=UNIT_OWNER) < reserved
    assert ledger.projected(NOISED) == epsilon([noisier, NOISED, NOISED], 1e-5, unit=UNIT_OWNER)
    found, other = Ledger.read(tmp_path / "ledger.jsonl", OWNER.public).reservations()
    assert found.mechanism == other.mechanism == other.effective == NOISED
    assert found.effective == NOISED.realised(8)
    assert charge(ledger, 1, NOISED).line == 2, "the plan is still known by what was planned"


def test_fewer_shares_than_before_change_nothing(tmp_path: Path) -> None:
    """Neither a number below the reserved one nor one below an earlier one writes a line; a higher one does."""
    ledger = opened(tmp_path, unit=UNIT_OWNER, limit=100.0)
    charge(ledger, 1, NOISED)
    for honest, lines in ((-1, 2), (1, 2), (2, 2), (5, 3), (5, 3), (4, 3), (6, 4)):
        ledger.realised(plan(1), honest)
        assert len(ledger.entries()) == lines, honest
    assert ledger.spent() == epsilon([NOISED.realised(6)], 1e-5, unit=UNIT_OWNER)


def test_only_shares_can_be_realised(tmp_path: Path) -> None:
    """Noise of a silo's own is what it is; a plan that was never charged has none."""
    ledger = opened(tmp_path)
    charge(ledger, 1)
    charge(ledger, 2, STREAMED)
    for number in (1, 2):
        with pytest.raises(ValueError, match="no noise shares"):
            ledger.realised(plan(number), 9)
    with pytest.raises(NotFound):
        ledger.realised(plan(9), 9)


@pytest.mark.parametrize("honest", ["9", 9.5, True, None])
def test_a_number_of_shares_that_is_none_is_no_entry(tmp_path: Path, honest: object) -> None:
    """A line that the owner's key signed and no release of this program wrote prices nothing."""
    ledger = opened(tmp_path, unit=UNIT_OWNER)
    charge(ledger, 1, NOISED)
    line = chain.write_line(
        OWNER, ledger.entries()[-1].digest, "2026-01-01T00:00:00Z", "realised", {"plan": plan(1), "honest": honest}
    )
    with (tmp_path / "ledger.jsonl").open("ab") as file:
        file.write(line)
    with pytest.raises(LedgerCorrupt, match="line 3 is not an entry"):
        Ledger.read(tmp_path / "ledger.jsonl", OWNER.public)


@pytest.mark.parametrize(
    ("mechanism", "unit"),
    [(NOISED, UNIT_OWNER), (STREAMED, UNIT_RECORD), (ADAPTIVE, UNIT_RECORD)],
    ids=["shares", "stream", "adaptive"],
)
def test_a_torn_line_with_parts_is_charged(tmp_path: Path, mechanism: Mechanism, unit: str) -> None:
    """Wherever the crash cut it: charged as soon as its fields are whole, and repaired once."""
    ledger = opened(tmp_path, unit=unit)
    charge(ledger, 1, mechanism)
    path = tmp_path / "ledger.jsonl"
    whole = path.read_bytes()
    start = whole.index(b"\n") + 1
    complete = whole.index(b',"kind":"reserve"', start)
    for end in (start + 1, complete - 40, complete - 1, complete, complete + 1, len(whole) - 1):
        for old in tmp_path.glob("*.torn-*"):
            old.unlink()
        path.write_bytes(whole[:end])
        mended = opened(tmp_path, unit=unit)
        assert [r.mechanism for r in mended.reservations()] == ([mechanism] if end >= complete else [])
        assert len(opened(tmp_path, unit=unit).entries()) == (3 if end >= complete else 2)
