"""Any history of acts and crashes: the ledger never forgets a charge, never passes its limit, never verifies a lie."""

from __future__ import annotations

import dataclasses
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.clock import FakeClock
from fedllm.errors import BudgetExhausted, LedgerCorrupt, PolicyRefused
from fedllm.identity import SigningIdentity
from fedllm.ids import Digest, sha256
from fedllm.messages.mechanism import (
    RELATION_ADD_REMOVE,
    RELATION_ZERO_OUT,
    UNIT_OWNER,
    UNIT_RECORD,
    Mechanism,
    NoiseShares,
    Stream,
)
from fedllm.privacy.accountant import epsilon
from fedllm.privacy.ledger import Ledger

OWNER = SigningIdentity.from_seed(b"p" * 32)
# few distinct mechanisms: every price is computed once
SAMPLED = tuple(
    Mechanism("dp-sgd", UNIT_RECORD, RELATION_ADD_REMOVE, noise, 0.05, 0.25, 2, 1e-5) for noise in (1.5, 3.0)
)
STREAMED = tuple(
    Mechanism("dp-ftrl", UNIT_RECORD, RELATION_ADD_REMOVE, noise, 0.05, 1.0, steps, 1e-5, stream=Stream(name, 4, 1, 4))
    for name, noise, steps in (("f/1", 6.0, 1), ("f/1", 6.0, 2), ("f/1", 7.0, 1), ("f/2", 6.0, 3))
)
NOISED = tuple(
    Mechanism("skellam", UNIT_OWNER, RELATION_ZERO_OUT, noise, 0.05, 1.0, 1, 1e-5, shares=NoiseShares(2, 24, 1 << 15))
    for noise in (3.0, 8.0)
)
LIMIT = 3.0
PLANS = st.integers(0, 4)
MIXES = ((UNIT_RECORD, (*SAMPLED, *STREAMED, *NOISED)), (UNIT_RECORD, STREAMED), (UNIT_OWNER, (*NOISED, SAMPLED[0])))


def histories(mix: tuple[str, tuple[Mechanism, ...]]) -> st.SearchStrategy[Any]:
    """Return a ledger's unit and what is done with it."""
    unit, mechanisms = mix
    reserve = st.tuples(st.just("reserve"), PLANS, st.sampled_from(mechanisms))
    acts = st.one_of(
        reserve,
        reserve,
        st.tuples(st.just("again"), PLANS, st.none()),
        st.tuples(st.just("realised"), PLANS, st.integers(1, 12)),
        st.tuples(st.just("settle"), PLANS, st.sampled_from(["completed", "aborted"])),
        st.tuples(st.just("dataset"), st.integers(0, 2), st.none()),
        st.tuples(st.just("crash"), st.integers(1, 400), st.none()),
    )
    return st.tuples(st.just(unit), st.lists(acts, min_size=3, max_size=12))


def plan(number: int) -> Digest:
    """Return a plan's digest."""
    return sha256(f"plan {number}".encode())


def opened(path: Path, dataset: int = 0, unit: str = UNIT_RECORD) -> Ledger:
    """Open the ledger as a fresh process does."""
    return Ledger.open(
        path, OWNER, FakeClock(), dataset=sha256(bytes([dataset])), limit_epsilon=LIMIT, delta=1e-5, unit=unit
    )  # fmt: skip


class Twin:
    """A dictionary that follows the same rules: what was charged, and how many shares were in the sums."""

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self.charged: dict[int, Mechanism] = {}
        self.honest: dict[int, int] = {}

    def priced(self, *more: Mechanism) -> float:
        """Return what everything charged and `more` cost together."""
        history = []
        for number, mechanism in self.charged.items():
            if mechanism.shares is not None:
                found = max(2, self.honest.get(number, 0))
                noise = mechanism.noise_multiplier * (found / 2) ** 0.5
                shares = dataclasses.replace(mechanism.shares, honest=found)
                mechanism = dataclasses.replace(mechanism, noise_multiplier=noise, shares=shares)  # noqa: PLW2901
            history.append(mechanism)
        return epsilon([*history, *more], 1e-5, unit=self.unit)

    def refuses(self, number: int, asked: Mechanism) -> bool:
        """Return whether the owner's rules, rather than its budget, are against charging a plan."""
        if number in self.charged:
            return self.charged[number] != asked
        if asked.stream is None:
            return self.unit == UNIT_OWNER != asked.unit
        mine = [m for m in self.charged.values() if m.stream is not None and m.stream.name == asked.stream.name]
        others = any((m.stream, m.noise_multiplier) != (asked.stream, asked.noise_multiplier) for m in mine)
        return self.unit == UNIT_OWNER or others or sum(m.steps for m in mine) + asked.steps > asked.stream.steps


def reserve(ledger: Ledger, twin: Twin, number: int, asked: Mechanism) -> None:
    """Charge a plan here and there; plans 2 n and 2 n + 1 are attempts of one round."""
    charging = partial(
        ledger.reserve, federation="f", round_number=number // 2 + 1, plan_digest=plan(number), mechanism=asked
    )
    if twin.refuses(number, asked):
        with pytest.raises(PolicyRefused) as caught:
            charging()
        assert not isinstance(caught.value, BudgetExhausted)
    elif number not in twin.charged and twin.priced(asked) > LIMIT:
        with pytest.raises(BudgetExhausted):
            charging()
    else:
        receipt = charging()
        twin.charged[number] = asked
        assert receipt.spent == twin.priced()


@given(history=st.sampled_from(MIXES).flatmap(histories))
@settings(deadline=None, max_examples=80)
def test_charges_are_never_lost_and_never_pass_the_limit(history: tuple[str, list[tuple[str, int, Any]]]) -> None:
    """A plain dictionary is the twin; crashes cut a half-written line, reopening mends, receipts stay charged."""
    unit, acts = history
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.jsonl"
        ledger, twin = opened(path, unit=unit), Twin(unit)
        for act, number, detail in acts:
            if act == "reserve":
                reserve(ledger, twin, number, detail)
            elif act == "again" and number in twin.charged:
                reserve(ledger, twin, number, twin.charged[number])
            elif act == "realised" and number in twin.charged:
                if twin.charged[number].shares is None:
                    with pytest.raises(ValueError, match="no noise shares"):
                        ledger.realised(plan(number), detail)
                else:
                    ledger.realised(plan(number), detail)
                    twin.honest[number] = max(detail, twin.honest.get(number, 0))
            elif act == "settle" and number in twin.charged:
                ledger.settle(plan(number), detail)
            elif act == "dataset":
                ledger = opened(path, number, unit)
            elif act == "crash":
                line = path.read_bytes().splitlines()[-1]
                with path.open("ab") as file:
                    file.write(line[: min(number, len(line) - 1)])
                ledger = opened(path, unit=unit)
            assert {r.plan_digest: r.mechanism for r in ledger.reservations()} == {
                plan(each): mechanism for each, mechanism in twin.charged.items()
            }
            assert ledger.spent() == twin.priced() <= LIMIT
        assert Ledger.read(path, OWNER.public).spent() == twin.priced()


@given(at=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
@settings(deadline=None, max_examples=60)
def test_no_byte_can_be_changed_unnoticed(at: float, flip: int) -> None:
    """One changed byte anywhere, and reading refuses; whatever still reads charges no less."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.jsonl"
        ledger = opened(path)
        for number in range(3):
            ledger.reserve(federation="f", round_number=number, plan_digest=plan(number), mechanism=SAMPLED[1])
        data = bytearray(path.read_bytes())
        data[int(at * len(data))] ^= flip
        path.write_bytes(bytes(data))
        with pytest.raises(LedgerCorrupt):
            Ledger.read(path, OWNER.public)
