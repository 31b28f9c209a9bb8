"""What an owner agrees to: limits in a file of its own, checked against every plan before anything is done."""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm.adapter import AdapterState
from fedllm.aggregation.methods import get_method
from fedllm.aggregation.secagg import graph
from fedllm.client.limits import check_privacy, check_same_shares, check_weights
from fedllm.config import settle, unknown_key
from fedllm.errors import (
    BaseMismatch,
    CohortRefused,
    ConfigError,
    DigestMismatch,
    NotFound,
    PlanChanged,
    PolicyRefused,
    RosterMismatch,
    RoundReplayed,
    ThresholdRefused,
)
from fedllm.identity import Roster
from fedllm.ids import Digest, OwnerId, check_digest
from fedllm.messages.mechanism import DP_FTRL, DP_SGD, UNIT_OWNER, UNIT_PERSON, UNIT_RECORD
from fedllm.messages.plan import MAX_ATTEMPTS, RoundPlan

LEAST_SURVIVORS = 3
"""Of a sum of two, each owner could subtract its own and read the other's."""
UNITS = (UNIT_RECORD, UNIT_PERSON, UNIT_OWNER)
_SECTION = "policy"


_MOST_RATE = 1e4
_MOST_BATCH = 4096
_MOST_MICROBATCH = 64
"""Records in memory at once: with more, running out of it would tell the size of a private sample."""


@dataclass(frozen=True)
class OwnerPolicy:
    """The limits of one owner, kept in ``policy.toml`` and changed only by its own people.

    Attributes
    ----------
    max_epsilon, delta : float
        Refuse any round after which epsilon at `delta`, over all rounds so far, would pass `max_epsilon`.
    unit : str
        What epsilon is counted per: ``record``, ``person`` (records grouped by `unit_column` of the client's
        settings) or ``owner``. Fixed once the ledger is begun.
    allowed_bases : tuple[Digest, ...]
        Content digests of the base models that may be fine-tuned.
    allowed_methods : tuple[str, ...]
    allow_without_dp : bool
        Whether a round without differential privacy is accepted. Nothing limits epsilon then, of any round.
    min_cohort, min_survivors : int
        Fewer owners in a round, or in an opened sum, are refused; never under 3 survivors.
    max_rank, max_tokens, max_local_steps : int
        Bounds of what a plan may make this machine do.
    min_corruption : float
        Where a cohort is too large for the complete graph: the share of owners that must be assumed to collude
        with the coordinator.
    max_size_ratio : float
        Largest over smallest declared size in a cohort: a plan that weighs the others to nothing would open one
        owner's update as a "sum".
    """

    max_epsilon: float
    delta: float
    allowed_bases: tuple[str, ...]
    allowed_methods: tuple[str, ...] = ("ffa", "fedit")
    allow_without_dp: bool = False
    min_cohort: int = LEAST_SURVIVORS
    min_survivors: int = LEAST_SURVIVORS
    max_rank: int = 64
    max_tokens: int = 4096
    max_local_steps: int = 1000
    max_size_ratio: float = 20.0
    min_corruption: float = 0.05
    unit: str = UNIT_RECORD

    def __post_init__(self) -> None:
        """Refuse limits that limit nothing."""
        if not 0 < self.max_epsilon < math.inf or not 0 < self.delta < 1:
            raise ConfigError(
                f"max_epsilon {self.max_epsilon}, delta {self.delta}: positive and finite, and in (0, 1)",
                hint="to accept rounds without any guarantee, set allow_without_dp",
            )
        if self.min_cohort < LEAST_SURVIVORS or self.min_survivors < LEAST_SURVIVORS:
            raise ConfigError(
                f"min_cohort {self.min_cohort}, min_survivors {self.min_survivors}: {LEAST_SURVIVORS} at least",
                hint="with two owners in a sum, each can subtract its own part and read the other's",
            )
        if self.unit not in UNITS:
            raise ConfigError(f"unit {self.unit!r}: {', '.join(UNITS)} allowed")
        if min(self.max_rank, self.max_tokens, self.max_local_steps) < 1:
            raise ConfigError("max_rank, max_tokens and max_local_steps must be positive")
        for base in self.allowed_bases:
            check_digest(base, what="allowed_bases")

    @property
    def limit_epsilon(self) -> float:
        """What the ledger enforces: nothing, if rounds without any guarantee are accepted too."""
        return math.inf if self.allow_without_dp else self.max_epsilon

    @classmethod
    def load(cls, path: Path) -> OwnerPolicy:
        """Read ``policy.toml``.

        Raises
        ------
        NotFound
            If there is none: nothing is agreed to by default.
        ConfigError
            If it is not TOML, or a key is unknown (the nearest known one is named), missing or of a wrong type.
        """
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise NotFound(f"no policy at {path}", hint="'fedllm client join' writes one") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not TOML: {type(error).__name__}") from None
        for key in table:
            if key != _SECTION:
                raise unknown_key(key, [_SECTION], where=str(path))
        return _settled(table.get(_SECTION, {}), {})

    def save(self, path: Path) -> None:
        """Write the policy as TOML, whole or not at all."""
        lines = [f"{key} = {json.dumps(value)}" for key, value in self.to_table().items()]
        draft = path.with_suffix(".tmp")
        try:
            draft.write_text(f"[{_SECTION}]\n" + "\n".join(lines) + "\n", encoding="utf-8")
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)

    def to_table(self) -> dict[str, Any]:
        """Return names and values as TOML and JSON hold them."""
        table = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in table.items()}

    def with_value(self, name: str, value: str) -> OwnerPolicy:
        """Return a policy with one limit changed; `value` is text as typed, lists are comma-separated.

        Raises
        ------
        ConfigError
            If there is no such limit, or the value is not one.
        """
        known = [f.name for f in dataclasses.fields(self)]
        if name not in known:
            raise unknown_key(name, known, where="policy")
        return _settled(self.to_table(), {name: value})


def _settled(table: dict[str, Any], flags: dict[str, str]) -> OwnerPolicy:
    policy, _ = settle(OwnerPolicy, _SECTION, table=table, environ={}, flags=flags)
    return policy


def check_plan(
    plan: RoundPlan, policy: OwnerPolicy, *, roster: Roster, base: Digest, owner: OwnerId, last_round: int
) -> None:
    """Return if this owner takes part in `plan`; else raise with the thing, the value found and the value allowed.

    The signature is checked before (`SignedPlan.open`), the budget after (the ledger reserves it).

    Parameters
    ----------
    plan : RoundPlan
    policy : OwnerPolicy
    roster : Roster
        This owner's own approved copy.
    base : Digest
        Of the base model that is loaded here.
    owner : OwnerId
    last_round : int
        The last round this owner accepted; 0 for none.

    Raises
    ------
    RoundReplayed
        If the round is not a new one.
    RosterMismatch, CohortRefused, ThresholdRefused
        If its owners, or what keeps their sum secret, are not what was agreed to.
    BaseMismatch
        If the plan is for another base model.
    PolicyRefused
        If it breaks any other limit.
    """
    if plan.round <= last_round:
        raise RoundReplayed(
            f"round {plan.round} of {plan.federation!r} is not new: round {last_round} was accepted here already",
            hint="a round is never run twice; plan a new one",
        )
    if plan.attempt != 1:
        raise RoundReplayed(f"round {plan.round} begins with attempt {plan.attempt}, 1 expected")
    _check_cohort(plan, policy, roster, owner)
    _check_base(plan, policy, base)
    check_privacy(plan, policy)
    check_weights(plan, policy)
    _check_work(plan, policy)


def check_retry(plan: RoundPlan, before: RoundPlan, policy: OwnerPolicy, *, roster: Roster, owner: OwnerId) -> None:
    """Return if `plan` is a further attempt at the sum of the update that was trained for `before`.

    Only what an attempt must change may differ: nonce, cohort (which only shrinks), and what follows from it.
    The caller checks that this owner has not helped to open a sum with the update yet.

    Raises
    ------
    RoundReplayed
        If the attempt is not a later one.
    PlanChanged
        If it is for another update.
    RosterMismatch, CohortRefused, ThresholdRefused, PolicyRefused
        As in `check_plan`.
    """
    if plan.attempt <= before.attempt:
        raise RoundReplayed(f"attempt {plan.attempt} at round {plan.round}: attempt {before.attempt} was made already")
    if plan.attempt > MAX_ATTEMPTS:
        raise PlanChanged(
            f"attempt {plan.attempt} at round {plan.round}: at most {MAX_ATTEMPTS} are made here",
            hint="plan a new round",
        )
    if plan.nonce == before.nonce:
        raise PlanChanged(f"attempt {plan.attempt} at round {plan.round} has the nonce of the one before")
    if plan.training() != before.training():
        raise PlanChanged(
            f"attempt {plan.attempt} at round {plan.round} is for another training than the one done here",
            hint="another head, recipe or mechanism needs a round of its own",
        )
    joined = sorted(set(plan.cohort) - set(before.cohort))
    if joined:
        raise CohortRefused(f"attempt {plan.attempt} adds {joined[0]!r} to the cohort, which may only shrink")
    for what, now, then in (
        ("declared size", plan.declared_records, before.declared_records),
        ("weight", plan.weights or {}, before.weights or {}),
    ):
        if any(now[each] != then.get(each) for each in now):
            raise PlanChanged(f"attempt {plan.attempt} at round {plan.round} changes a {what}")
    check_same_shares(plan, before)
    _check_cohort(plan, policy, roster, owner)


def _check_cohort(plan: RoundPlan, policy: OwnerPolicy, roster: Roster, owner: OwnerId) -> None:
    if plan.roster != roster.digest:
        raise RosterMismatch(
            f"the plan's roster is {plan.roster[:16]}, the one approved here {roster.digest[:16]}",
            hint="compare the two rosters with the operator; approve a new one by hand",
        )
    strangers = sorted(set(plan.cohort) - {member.owner for member in roster.members})
    if strangers:
        raise RosterMismatch(f"the plan's cohort names {strangers[0]!r}, who is not in the approved roster")
    if owner not in plan.cohort:
        raise CohortRefused(f"the plan's cohort does not name {owner!r}")
    n = len(plan.cohort)
    if n < policy.min_cohort:
        raise CohortRefused(f"the plan's cohort has {n} owners, at least {policy.min_cohort} are required here")
    if plan.corruption < policy.min_corruption and plan.neighbours < n - 1:
        raise ThresholdRefused(
            f"the plan assumes {plan.corruption:.1%} of the owners to collude, "
            f"at least {policy.min_corruption:.1%} is required here"
        )
    graph.check(n, plan.neighbours, plan.threshold, plan.corruption, plan.dropout)
    least = max(LEAST_SURVIVORS, policy.min_survivors)
    if not least <= plan.min_survivors <= n:
        raise ThresholdRefused(f"the plan opens a sum of {plan.min_survivors} owners, {least} to {n} allowed")


def _check_base(plan: RoundPlan, policy: OwnerPolicy, base: Digest) -> None:
    if plan.spec.base != base:
        raise BaseMismatch(
            f"the plan is for base model {plan.spec.base[:16]}, the one loaded here is {base[:16]}",
            hint="point 'base' in client.toml to the model that the federation trains",
        )
    if base not in policy.allowed_bases:
        raise BaseMismatch(
            f"base model {base[:16]} is not among the {len(policy.allowed_bases)} that policy.toml allows",
            hint=f"fedllm client policy set allowed_bases {base}",
        )


def _check_work(plan: RoundPlan, policy: OwnerPolicy) -> None:
    if plan.method not in policy.allowed_methods:
        raise PolicyRefused(f"the plan's method is {plan.method!r}, allowed here: {', '.join(policy.allowed_methods)}")
    get_method(plan.method).check(plan)
    recipe = plan.recipe
    bounds = (
        ("rank", plan.spec.rank, policy.max_rank),
        ("max_tokens", recipe.max_tokens, policy.max_tokens),
        ("steps", recipe.steps, policy.max_local_steps),
        ("alpha", plan.spec.alpha, 4 * policy.max_rank),
        ("microbatch", recipe.microbatch, _MOST_MICROBATCH),
        ("batch_size", recipe.batch_size, _MOST_BATCH),
    )
    for name, found, most in bounds:
        if not 1 <= found <= most:
            raise PolicyRefused(f"the plan's {name} is {found}, 1 to {most} allowed")
    if not 0 < recipe.learning_rate <= _MOST_RATE:
        raise PolicyRefused(f"the plan's learning rate is {recipe.learning_rate:g}, up to {_MOST_RATE:g} allowed")
    wanted = ("sgd",) if plan.mechanism.kind in {DP_SGD, DP_FTRL} else ("adamw", "sgd")
    if recipe.optimizer not in wanted:
        raise PolicyRefused(f"the plan's optimizer is {recipe.optimizer!r}, {' or '.join(wanted)} allowed")


def open_head(plan: RoundPlan, data: bytes) -> AdapterState:
    """Return the global adapter that came with a plan, if it is the one that the plan names.

    Raises
    ------
    AdapterInvalid
        If the bytes are no adapter of the plan's spec.
    DigestMismatch
        If they are another adapter: owners that train from different heads would be told apart by their masks.
    """
    head = AdapterState.from_bytes(plan.spec, data)
    if head.digest != plan.head:
        raise DigestMismatch(f"the adapter that came with the plan is {head.digest[:16]}, it names {plan.head[:16]}")
    return head
