"""Any history of acts and crashes: the ledger never forgets a charge, never passes its limit, never verifies a lie."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.clock import FakeClock
from fedllm.errors import BudgetExhausted, LedgerCorrupt
from fedllm.identity import SigningIdentity
from fedllm.ids import Digest, sha256
from fedllm.messages.mechanism import RELATION_ADD_REMOVE, UNIT_RECORD, Mechanism
from fedllm.privacy.accountant import epsilon
from fedllm.privacy.ledger import Ledger

OWNER = SigningIdentity.from_seed(b"p" * 32)
# few distinct mechanisms: every price is computed once
MECHANISMS = tuple(
    Mechanism("dp-sgd", UNIT_RECORD, RELATION_ADD_REMOVE, noise, 0.05, 0.25, 2, 1e-5) for noise in (1.5, 3.0)
)
LIMIT = 3.0
ACTS = st.one_of(
    st.tuples(st.just("reserve"), st.integers(0, 5), st.sampled_from(MECHANISMS)),
    st.tuples(st.just("settle"), st.integers(0, 5), st.sampled_from(["completed", "aborted"])),
    st.tuples(st.just("dataset"), st.integers(0, 2), st.none()),
    st.tuples(st.just("crash"), st.integers(1, 400), st.none()),
)


def plan(number: int) -> Digest:
    """Return a plan's digest."""
    return sha256(f"plan {number}".encode())


def opened(path: Path, dataset: int = 0) -> Ledger:
    """Open the ledger as a fresh process does."""
    return Ledger.open(
        path, OWNER, FakeClock(), dataset=sha256(bytes([dataset])), limit_epsilon=LIMIT, delta=1e-5
    )  # fmt: skip


@given(acts=st.lists(ACTS, max_size=12))
@settings(deadline=None, max_examples=40)
def test_charges_are_never_lost_and_never_pass_the_limit(acts: list[tuple[str, int, object]]) -> None:
    """A plain dictionary is the twin; crashes cut a half-written line, reopening mends, receipts stay charged."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.jsonl"
        ledger = opened(path)
        charged: dict[Digest, Mechanism] = {}
        for act, number, detail in acts:
            if act == "reserve":
                assert isinstance(detail, Mechanism)
                mechanism = charged.get(plan(number), detail)
                fits = plan(number) in charged or epsilon([*charged.values(), mechanism], 1e-5) <= LIMIT
                if fits:
                    ledger.reserve(
                        federation="f", round_number=number, plan_digest=plan(number), mechanism=mechanism
                    )  # fmt: skip
                    charged[plan(number)] = mechanism
                else:
                    with pytest.raises(BudgetExhausted):
                        ledger.reserve(
                            federation="f", round_number=number, plan_digest=plan(number), mechanism=mechanism
                        )  # fmt: skip
            elif act == "settle" and plan(number) in charged:
                ledger.settle(plan(number), str(detail))
            elif act == "dataset":
                ledger = opened(path, number)
            elif act == "crash":
                line = path.read_bytes().splitlines()[-1]
                with path.open("ab") as file:
                    file.write(line[: min(number, len(line) - 1)])
                ledger = opened(path)
            assert {r.plan_digest: r.mechanism for r in ledger.reservations()} == charged
            assert ledger.spent() == epsilon(list(charged.values()), 1e-5) <= LIMIT
        Ledger.read(path, OWNER.public)


@given(at=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
@settings(deadline=None, max_examples=60)
def test_no_byte_can_be_changed_unnoticed(at: float, flip: int) -> None:
    """One changed byte anywhere, and reading refuses; whatever still reads charges no less."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.jsonl"
        ledger = opened(path)
        for number in range(3):
            ledger.reserve(federation="f", round_number=number, plan_digest=plan(number), mechanism=MECHANISMS[1])
        data = bytearray(path.read_bytes())
        data[int(at * len(data))] ^= flip
        path.write_bytes(bytes(data))
        with pytest.raises(LedgerCorrupt):
            Ledger.read(path, OWNER.public)
