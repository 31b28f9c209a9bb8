"""What a hostile plan says about privacy: refused before it is charged, or before it costs minutes and memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from unit.client.owner_fakes import BASE, DP, OWNERS, POLICY, ROSTER, plan

from fedllm.cli.privacy import limit
from fedllm.client.policy import OwnerPolicy, check_plan
from fedllm.errors import ConfigError, FedllmError, PolicyRefused
from fedllm.identity import SigningIdentity
from fedllm.messages.mechanism import AdaptiveClip, Mechanism, Stream
from fedllm.messages.plan import Recipe, RoundPlan


def check(made: RoundPlan, policy: OwnerPolicy = POLICY) -> None:
    """Check a plan as the first owner does."""
    check_plan(made, policy, roster=ROSTER, base=BASE, owner=OWNERS[0], last_round=0)


def streamed(**changes: Any) -> RoundPlan:
    """Return a plan of a stream, with some of its numbers changed."""
    stream = Stream(**{"name": "tools/1", "steps": 64, "band": 4, "separation": 16, **changes})
    made = Mechanism("dp-ftrl", "record", "add-or-remove-one", 2.0, 0.05, 1.0, 2, 1e-5, stream=stream)
    return plan(mechanism=made)


CASES: dict[str, tuple[RoundPlan, type[FedllmError], str]] = {
    "another federation's stream": (streamed(name="others/1"), PolicyRefused, "names another federation's stream"),
    "a stream that uses less than a record a step": (streamed(separation=41), PolicyRefused, "fewer than one a step"),
    "noise too coarse for its grid in a stream": (
        plan(mechanism=dataclasses.replace(streamed().mechanism, noise_multiplier=9e3)), ConfigError, "noise grid",
    ),
    "noise too coarse for its grid": (
        plan(mechanism=dataclasses.replace(DP, noise_multiplier=9e3)), ConfigError, "noise grid",
    ),
    "records in memory by the thousand": (
        plan(recipe=Recipe("sgd", 1.0, 2, 8, 65, 160)), PolicyRefused, "microbatch is 65, 1 to 64 allowed",
    ),
    "more steps trained than charged": (
        plan(mechanism=dataclasses.replace(streamed().mechanism, steps=1)), PolicyRefused, "the two must be equal",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_plan_that_would_waste_or_tell_is_refused(case: str) -> None:
    """Each before the ledger is asked; the same plan without the change is accepted."""
    check(plan())
    check(streamed())
    made, error, words = CASES[case]
    with pytest.raises(error, match=words):
        check(made)


def test_numbers_beyond_what_can_be_priced_make_no_mechanism() -> None:
    """A stream of a billion billion steps, and a count whose integer noise is coarser than the price assumes."""
    with pytest.raises(ValueError, match="1 to 1000000 steps"):
        streamed(steps=2**62)
    with pytest.raises(ValueError, match="count noise 4"):
        AdaptiveClip(0.5, 0.2, 1.0)


def test_a_limit_can_be_set_beside_a_ledger_that_a_crash_left_empty(tmp_path: Path) -> None:
    """Its first line never became durable: the daemon begins it with the policy's limit."""
    SigningIdentity.create(tmp_path / "owner.pem")
    (tmp_path / "ledger.jsonl").write_bytes(b"")
    assert limit(tmp_path, 3.0, reason="less") is False
