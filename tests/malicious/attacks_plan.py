"""Plans that no owner takes part in: each is signed with the coordinator's own key, and refused before any work."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from malicious.removals import cut
from malicious.scene import OWNERS, POLICY, Attack, Play, Scene, Verdicts, begin, plan
from unit.client.owner_fakes import DP, IDENTITIES, SPEC

from fedllm.adapter import AdapterState
from fedllm.aggregation.methods import get_method
from fedllm.aggregation.noised import NoisedVector
from fedllm.aggregation.secagg import graph
from fedllm.aggregation.secagg.owner import SecAggOwner
from fedllm.aggregation.secagg.terms import SumTerms
from fedllm.client import limits, policy
from fedllm.client.daemon import Daemon
from fedllm.identity import Roster, SigningIdentity
from fedllm.ids import Digest, OwnerId, RoundNumber, sha256
from fedllm.messages.mechanism import RELATION_ZERO_OUT, SKELLAM, UNIT_OWNER, Mechanism, NoiseShares
from fedllm.messages.plan import Ring, RoundPlan, SignedPlan, honest_threshold
from fedllm.messages.round import Close
from fedllm.privacy.ledger import Ledger
from fedllm.rng import SeededRng

NOT_NEW = cut(policy.check_plan, "plan.round <= last_round")
ANY_GRAPH = cut(graph.check, "least <= threshold", "threshold <= neighbours", "_improbable")
BEGUN = "Advertised"
"""What an owner says to a plan that it accepts: the trainer of these tests is done at once."""
SYBIL = OwnerId("sybil")
ATTACKER = SigningIdentity.from_seed(b"\xee" * 32)


def _pinned(members: Sequence[OwnerId]) -> Roster:
    """Return a roster of the four owners and of others whose keys do not matter."""
    seeds = {owner: SigningIdentity.from_seed(bytes.fromhex(sha256(owner.encode()))).public for owner in members}
    return Roster.of({**seeds, **{owner: IDENTITIES[owner].public for owner in OWNERS}})


GROWN = Roster.of({**{owner: IDENTITIES[owner].public for owner in OWNERS}, SYBIL: ATTACKER.public})
LARGE = _pinned([OwnerId(f"peer-{i:03d}") for i in range(196)])
"""200 owners, which is past the complete graph."""
SAFE = graph.parameters(200, 0.05, 0.05)


def cohort(owners: Sequence[OwnerId], **changes: Any) -> RoundPlan:
    """Return a plan for a cohort, with some fields changed."""
    fields: dict[str, Any] = {
        "cohort": tuple(owners), "threshold": honest_threshold(len(owners)), "neighbours": len(owners) - 1,
        "weights": dict.fromkeys(owners, 1.0), "declared_records": dict.fromkeys(owners, 40),
    }  # fmt: skip
    return plan(**{**fields, **changes})


def large(**changes: Any) -> RoundPlan:
    """Return a plan for 200 owners, with some fields changed."""
    k_and_t = {"neighbours": SAFE.neighbours, "threshold": SAFE.threshold}
    return cohort([member.owner for member in LARGE.members], roster=LARGE.digest, **{**k_and_t, **changes})


def offered(made: RoundPlan, *, envelope: Mapping[str, Any] | None = None, **scene: Any) -> Play:
    """Return the attack that begins a round with this plan."""

    async def play(home: Path) -> Verdicts:
        at = Scene(home, **scene)
        asked = begin(made)
        return {owner: await at.verdict(owner, asked, **(envelope or {})) for owner in OWNERS if owner in made.cohort}

    return play


async def begun_twice(home: Path) -> Verdicts:
    """Begin a second round under the first one's number, while that is under way."""
    at = Scene(home)
    await at.begin()
    return await at.verdicts(begin(plan(nonce=b"x" * 32)))


async def begun_after_a_restart(home: Path) -> Verdicts:
    """Begin the round again when the owners' processes have forgotten it."""
    at = Scene(home)
    await at.begin()
    at.restart()
    return await at.verdicts(begin(plan(nonce=b"x" * 32)))


async def begun_after_it_ended(home: Path) -> Verdicts:
    """End the round, and begin it again."""
    at = Scene(home)
    await at.begin()
    await at.each(Close("aborted", None))
    return await at.verdicts(begin(plan(nonce=b"x" * 32)))


async def an_older_round(home: Path) -> Verdicts:
    """Begin round 1 after round 2."""
    at = Scene(home)
    await at.begin(plan(round=RoundNumber(2)))
    return {owner: await at.verdict(owner, begin(plan()), round_number=1) for owner in OWNERS}


async def without_me(home: Path) -> Verdicts:
    """Show every owner a plan for the three others."""
    at = Scene(home)
    return {
        owner: await at.verdict(owner, begin(cohort([each for each in OWNERS if each != owner]))) for owner in OWNERS
    }


async def another_adapter(home: Path) -> Verdicts:
    """Send every owner, under one plan, a global adapter of its own."""
    at = Scene(home)
    heads = {owner: AdapterState.initial(SPEC, SeededRng(f"head of {owner}")) for owner in OWNERS}
    return await at.verdicts({owner: begin(plan(), head=head) for owner, head in heads.items()})


async def signed_by_an_owner(home: Path) -> Verdicts:
    """Wrap a plan that somebody else signed into the coordinator's own envelope."""
    at = Scene(home)
    return await at.verdicts(begin(plan(), signer="stranger"))


def of_another_base() -> Play:
    """Return the attack that names another base model."""
    spec = dataclasses.replace(SPEC, base=Digest("c" * 64))
    head = AdapterState.initial(spec, SeededRng("head"))
    made = plan(spec=spec, head=head.digest)

    async def play(home: Path) -> Verdicts:
        return await Scene(home).verdicts(begin(made, head=head))

    return play


def declared(**counts: int) -> RoundPlan:
    """Return a plan for these declared sizes, weighed by them."""
    sizes = {**dict.fromkeys(OWNERS, 40), **counts}
    return plan(declared_records=sizes, weights={o: size / max(sizes.values()) for o, size in sizes.items()})


def noised(*, honest: int = 2, dimension: int = SPEC.layout(get_method("ffa").trainable(1)).size) -> dict[str, Any]:
    """Return the fields of a plan whose owners add the noise together."""
    shares = NoiseShares(honest, dimension, 1 << 15)
    made = Mechanism(SKELLAM, UNIT_OWNER, RELATION_ZERO_OUT, 8.0, 0.5, 1.0, 1, 1e-5, shares=shares)
    return {"mechanism": made, "ring": Ring(32, 16, 0.5)}


STRICT = dataclasses.replace(POLICY, min_cohort=4)
DROWNED = {owner: 1.0 if owner == OWNERS[0] else 1e-6 for owner in OWNERS}
THRIFTY = dataclasses.replace(POLICY, max_epsilon=0.5)
LONG = dataclasses.replace(plan().recipe, steps=50)
NONE = {"mechanism": Mechanism.none(), "weights": None}
SYBIL_COHORT = [*OWNERS[:3], SYBIL, OWNERS[3]]
assert sorted(SYBIL_COHORT) == SYBIL_COHORT
_cohort = policy._check_cohort
_PINNED = "plan.roster != roster.digest"
ROSTERS = (cut(_cohort, _PINNED), cut(SumTerms.of, _PINNED))

PLANS = [
    # replay
    Attack("a round begun twice", begun_twice, "round-replayed", (NOT_NEW,), BEGUN),
    Attack("a round begun again after a restart", begun_after_a_restart, "round-replayed", (NOT_NEW,), BEGUN),
    Attack("a round begun again after its end", begun_after_it_ended, "round-replayed", (NOT_NEW,), BEGUN),
    Attack("an older round", an_older_round, "round-replayed", (NOT_NEW,), BEGUN),
    Attack(
        "a round that begins with its second attempt", offered(plan(attempt=2)), "round-replayed",
        (cut(policy.check_plan, "plan.attempt != 1"),), BEGUN,
    ),
    # what keeps the sum secret
    Attack("a threshold lowered by one", offered(plan(threshold=2)), "threshold-refused", (ANY_GRAPH,), BEGUN),
    Attack(
        "a graph on which two views meet", offered(plan(neighbours=2, threshold=1)), "threshold-refused",
        (ANY_GRAPH,), BEGUN,
    ),
    Attack(
        "a sparse graph for a small cohort", offered(plan(neighbours=1, threshold=1)), "threshold-refused",
        (cut(graph.check, "owners <= COMPLETE_UP_TO"),), BEGUN,
    ),
    Attack(
        "a sparse graph with t below the tail bound", offered(large(threshold=SAFE.threshold - 1), roster=LARGE),
        "threshold-refused", (ANY_GRAPH,), BEGUN,
    ),
    Attack(
        "a sparse graph with k below the tail bound", offered(large(neighbours=20, threshold=13), roster=LARGE),
        "threshold-refused", (ANY_GRAPH,), BEGUN,
    ),
    Attack(
        "a sparse graph for fewer colluders than this owner assumes",
        offered(large(corruption=0.01, neighbours=17, threshold=11), roster=LARGE), "threshold-refused",
        (cut(_cohort, "plan.corruption < policy.min_corruption"),), BEGUN,
    ),
    Attack(
        "a sum published of two survivors", offered(plan(min_survivors=2)), "threshold-refused",
        (cut(_cohort, "<= plan.min_survivors"), cut(SumTerms.of, "<= plan.min_survivors")), BEGUN,
    ),
    # who is in it
    Attack(
        "a cohort of two", offered(cohort(OWNERS[:2])), "cohort-refused",
        (cut(_cohort, "n < policy.min_cohort"),), "threshold-refused",
    ),
    Attack(
        "a cohort below the owner's own least", offered(cohort(OWNERS[:3]), policy=STRICT), "cohort-refused",
        (cut(_cohort, "n < policy.min_cohort"),), BEGUN,
    ),
    Attack(
        "a cohort without the one who is asked", without_me, "cohort-refused",
        (cut(_cohort, "owner not in plan.cohort"), cut(SecAggOwner.__init__, "owner not in")), BEGUN,
    ),
    Attack(
        "a Sybil in roster and cohort", offered(cohort(SYBIL_COHORT, roster=GROWN.digest)), "roster-mismatch",
        (cut(_cohort, _PINNED, "strangers"), cut(SumTerms.of, _PINNED, "strangers")), BEGUN,
    ),
    Attack(
        "a Sybil in the cohort alone", offered(cohort(SYBIL_COHORT)), "roster-mismatch",
        (cut(_cohort, "strangers"), cut(SumTerms.of, "strangers")), BEGUN,
    ),
    Attack("another roster", offered(plan(roster=GROWN.digest)), "roster-mismatch", ROSTERS, BEGUN),
    # one owner's update as the sum
    Attack(
        "weights that drown everybody else", offered(plan(weights=DROWNED)), "policy-refused",
        (cut(limits.check_weights, "plan.weights !="),), BEGUN,
    ),
    Attack(
        "sizes that drown everybody else", offered(declared(east=1_000_000)), "policy-refused",
        (cut(limits.check_weights, "policy.max_size_ratio"),), BEGUN,
    ),
    # privacy and its price
    Attack(
        "a plan without differential privacy", offered(plan(**NONE)), "policy-refused",
        (cut(limits.check_privacy, "policy.allow_without_dp"),), "budget-exhausted",
    ),
    Attack(
        "a plan that costs more than is left", offered(plan(), policy=THRIFTY), "budget-exhausted",
        (cut(Ledger.reserve, "needed > self.limit_epsilon"),), BEGUN,
    ),
    Attack(
        "more steps trained than charged", offered(plan(recipe=LONG)), "policy-refused",
        (cut(limits._check_numbers, "mechanism.steps != plan.recipe.steps"),), BEGUN,
    ),
    Attack(
        "a weaker delta", offered(plan(mechanism=dataclasses.replace(DP, delta=1e-3))), "policy-refused",
        (cut(limits._check_numbers, "mechanism.delta > policy.delta"),), BEGUN,
    ),
    # noise that is not there
    Attack(
        "noise of owners who may collude counted as honest", offered(plan(**noised(honest=3))), "policy-refused",
        (cut(limits._check_shares, "shares.honest >"),), BEGUN,
    ),
    Attack(
        "noise for shorter updates than are sent", offered(plan(**noised(dimension=1))), "policy-refused",
        (cut(limits._check_shares, "shares.dimension != size"), cut(NoisedVector.of, "shares.dimension !=")), BEGUN,
    ),
    # another model
    Attack(
        "another global adapter for each owner", another_adapter, "digest-mismatch",
        (cut(policy.open_head, "head.digest != plan.head"),), BEGUN,
    ),
    Attack(
        "another base model", of_another_base(), "base-mismatch",
        (cut(policy._check_base, "plan.spec.base != base", "base not in"),), BEGUN,
    ),
    # whose plan it is
    Attack(
        "a plan that another signed", signed_by_an_owner, "signature-invalid",
        (cut(SignedPlan.open, "coordinator.verify"),), BEGUN,
    ),
    Attack(
        "a plan of another version", offered(plan(version=1)), "version-unsupported",
        (cut(SignedPlan.open, "version != PLAN_VERSION"),), BEGUN,
    ),
    Attack(
        "the plan of another round than its envelope", offered(plan(), envelope={"round_number": 2}), "step-mismatch",
        (cut(Daemon._opened, "plan.round"), cut(Daemon._active, "envelope.round !=")), BEGUN,
    ),
    Attack(
        "a request of another federation", offered(plan(), envelope={"federation": "others"}), "policy-refused",
        (cut(Daemon._answer, "envelope.federation != self._federation"),), "step-mismatch",
    ),
]  # fmt: skip
