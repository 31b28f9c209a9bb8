"""An owner's own limits: every way in which a plan can be refused, and what the refusal says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from unit.client.owner_fakes import BASE, DP, HEAD, IDENTITIES, OWNERS, POLICY, ROSTER, SPEC, plan

from fedllm.adapter import AdapterState
from fedllm.client.policy import OwnerPolicy, check_plan, open_head
from fedllm.errors import (
    BaseMismatch,
    CohortRefused,
    ConfigError,
    DigestMismatch,
    FedllmError,
    NotFound,
    PolicyRefused,
    RosterMismatch,
    RoundReplayed,
    ThresholdRefused,
)
from fedllm.identity import Roster
from fedllm.ids import Digest, OwnerId
from fedllm.messages.mechanism import Mechanism
from fedllm.messages.plan import Recipe
from fedllm.rng import SeededRng

OTHER = Digest("c" * 64)
RECIPE = Recipe("sgd", 1.0, 2, 8, 4, 160)
WIDE = Roster.of({**{o: IDENTITIES[o].public for o in OWNERS}, OwnerId("zed"): IDENTITIES["stranger"].public})


def _check(policy: OwnerPolicy = POLICY, *, last_round: int = 0, owner: str = "north", **changes: Any) -> None:
    roster = changes.pop("approved", ROSTER)
    check_plan(
        plan(**changes), policy, roster=roster, base=BASE, owner=OwnerId(owner), last_round=last_round
    )  # fmt: skip


def test_a_plan_within_all_limits_is_accepted() -> None:
    """The plan of the other tests is refused for its one change, not for itself."""
    _check()


def _small(n: int) -> dict[str, Any]:
    cohort = OWNERS[:n]
    return {
        "cohort": cohort, "weights": dict.fromkeys(cohort, 1.0), "declared_records": dict.fromkeys(cohort, 1),
        "threshold": n, "neighbours": n - 1,
    }  # fmt: skip


REFUSALS: list[tuple[str, dict[str, Any], type[FedllmError], tuple[str, ...]]] = [
    ("round again", {"last_round": 1}, RoundReplayed, ("round 1",)),
    ("older round", {"last_round": 7}, RoundReplayed, ("round 1", "round 7")),
    ("other roster", {"roster": OTHER}, RosterMismatch, ("cccccccc", ROSTER.digest[:16])),
    ("added member", {"roster": WIDE.digest}, RosterMismatch, ("roster",)),
    ("not in cohort", {"owner": "zed"}, CohortRefused, ("zed",)),
    ("small cohort", {**_small(3), "policy": dataclasses.replace(POLICY, min_cohort=4)}, CohortRefused, ("3", "4")),
    ("threshold below honest", {"threshold": 2}, ThresholdRefused, ("2 of 4", "3 to 4")),
    ("threshold above cohort", {"threshold": 5}, ThresholdRefused, ("5 of 4",)),
    ("two survivors", {"min_survivors": 2}, ThresholdRefused, ("2 owners", "3 to 4")),
    ("fewer survivors than ours", {"policy": dataclasses.replace(POLICY, min_survivors=4)}, ThresholdRefused,
     ("3", "4")),
    ("second attempt first", {"attempt": 2}, RoundReplayed, ("attempt 2", "1 expected")),
    ("fewer neighbours", {"neighbours": 2}, ThresholdRefused, ()),
    ("other base", {"spec": dataclasses.replace(SPEC, base=OTHER)}, BaseMismatch, ("cccccccc", "bbbbbbbb")),
    ("base not allowed", {"policy": dataclasses.replace(POLICY, allowed_bases=(OTHER,))}, BaseMismatch, ("bbbbbbbb",)),
    ("no dp", {"mechanism": Mechanism.none()}, PolicyRefused, ("dp-sgd",)),
    ("larger delta", {"mechanism": dataclasses.replace(DP, delta=1e-3)}, PolicyRefused, ("0.001", "1e-05")),
    ("charges fewer steps", {"mechanism": dataclasses.replace(DP, steps=1)}, PolicyRefused, ("1 noisy", "trains 2")),
    ("method", {"policy": dataclasses.replace(POLICY, allowed_methods=("fedit",))}, PolicyRefused, ("ffa", "fedit")),
    ("layout", {"layout": OTHER}, PolicyRefused, ("layout",)),
    ("layout of another method", {"layout": SPEC.layout().digest}, PolicyRefused, ("layout",)),
    ("rank", {"policy": dataclasses.replace(POLICY, max_rank=1)}, PolicyRefused, ("rank is 2", "1 to 1")),
    ("tokens", {"policy": dataclasses.replace(POLICY, max_tokens=100)}, PolicyRefused, ("max_tokens is 160",)),
    ("steps", {"policy": dataclasses.replace(POLICY, max_local_steps=1)}, PolicyRefused, ("steps is 2",)),
    ("rate", {"recipe": dataclasses.replace(RECIPE, learning_rate=-1.0)}, PolicyRefused, ("learning rate is -1",)),
    ("wild rate", {"recipe": dataclasses.replace(RECIPE, learning_rate=1e300)}, PolicyRefused, ("1e+300",)),
    ("negative microbatch", {"recipe": dataclasses.replace(RECIPE, microbatch=-1)}, PolicyRefused, ("microbatch",)),
    ("adamw under dp", {"recipe": dataclasses.replace(RECIPE, optimizer="adamw")}, PolicyRefused, ("'adamw'",)),
    ("all weight on one", {"weights": {"east": 1.0, "north": 1e-9, "south": 1e-9, "west": 1e-9}}, PolicyRefused,
     ("weights",)),
    ("all size on one", {"declared_records": {"east": 10**9, "north": 40, "south": 40, "west": 40},
                         "weights": {"east": 1.0, "north": 4e-8, "south": 4e-8, "west": 4e-8}}, PolicyRefused,
     ("1000000000",)),
    ("samples nobody", {"mechanism": dataclasses.replace(DP, sample_rate=1e-300)}, PolicyRefused, ("1e-300",)),
    ("costly noise", {"mechanism": dataclasses.replace(DP, noise_multiplier=0.01)}, PolicyRefused, ("0.01",)),
    ("denormal clip", {"mechanism": dataclasses.replace(DP, clip_norm=1e-300)}, PolicyRefused, ("1e-300",)),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "says"), [r[1:] for r in REFUSALS], ids=[r[0] for r in REFUSALS])
def test_a_plan_outside_a_limit_is_refused(
    change: dict[str, Any], error: type[FedllmError], says: tuple[str, ...]
) -> None:
    """Each refusal has its type and names the value found and the value allowed."""
    with pytest.raises(error) as caught:
        _check(**change)
    assert type(caught.value) is error
    for text in says:
        assert text in caught.value.message


def test_a_round_without_dp_needs_the_owners_consent_and_then_no_budget_holds() -> None:
    """Where rounds without any guarantee are allowed, a limit on epsilon would be a pretence."""
    consent = dataclasses.replace(POLICY, allow_without_dp=True)
    _check(consent, mechanism=Mechanism.none(), weights=None)
    assert consent.limit_epsilon == float("inf")
    assert POLICY.limit_epsilon == 8.0


def test_the_head_must_be_the_one_the_plan_names() -> None:
    """Another adapter of the same shape is refused: its owner could be told apart by its masks."""
    assert open_head(plan(), HEAD.to_bytes()).digest == HEAD.digest
    other = AdapterState.initial(SPEC, SeededRng("other"))
    with pytest.raises(DigestMismatch):
        open_head(plan(), other.to_bytes())


def test_a_policy_survives_its_file(tmp_path: Path) -> None:
    """What is saved is what is loaded, lists included."""
    policy = dataclasses.replace(POLICY, allowed_methods=("ffa",), max_rank=8)
    policy.save(tmp_path / "policy.toml")
    assert OwnerPolicy.load(tmp_path / "policy.toml") == policy


def test_nothing_is_agreed_to_by_default(tmp_path: Path) -> None:
    """No file is not the same as a file without limits."""
    with pytest.raises(NotFound):
        OwnerPolicy.load(tmp_path / "policy.toml")


def test_an_unknown_limit_is_an_error_that_names_the_nearest(tmp_path: Path) -> None:
    """A mistyped limit must not silently limit nothing."""
    path = tmp_path / "policy.toml"
    path.write_text("[policy]\nmax_epsilom = 1.0\ndelta = 1e-5\nallowed_bases = []\n")
    with pytest.raises(ConfigError) as caught:
        OwnerPolicy.load(path)
    assert "max_epsilon" in (caught.value.hint or "")
    with pytest.raises(ConfigError):
        POLICY.with_value("max_epsilom", "1")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("max_epsilon", "3.5", 3.5),
        ("allow_without_dp", "true", True),
        ("allowed_methods", "ffa,fedit", ("ffa", "fedit")),
        ("max_rank", "16", 16),
    ],
)
def test_a_limit_is_changed_by_its_text(name: str, text: str, value: object) -> None:
    """``fedllm client policy set`` takes what people type."""
    assert getattr(POLICY.with_value(name, text), name) == value


@pytest.mark.parametrize(("name", "text"), [("min_survivors", "2"), ("max_epsilon", "0"), ("allowed_bases", "abc")])
def test_a_limit_that_protects_nothing_is_refused(name: str, text: str) -> None:
    """Even the owner's own people cannot set fewer than three survivors by a slip."""
    with pytest.raises(FedllmError):
        POLICY.with_value(name, text)
