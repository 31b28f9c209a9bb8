"""Attempts at a sum that no owner takes part in: a failure that is only claimed would open one owner's update.

Or one owner's loss: what was opened of the scores counts as much.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from malicious.attacks_plan import ANY_GRAPH
from malicious.attacks_sum import others
from malicious.removals import cut
from malicious.scene import OWNERS, Attack, Play, Scene, Verdicts, again, plan, retry, verdict
from unit.client.owner_fakes import DP, HEAD, SPEC, sealed

from fedllm.adapter import AdapterState
from fedllm.aggregation.secagg.owner import SecAggOwner
from fedllm.client import policy
from fedllm.client.daemon import Daemon
from fedllm.client.kept import Answers
from fedllm.client.outbox import Outbox
from fedllm.client.round import OwnerRound
from fedllm.ids import sha256
from fedllm.messages.mechanism import Mechanism
from fedllm.messages.plan import RoundPlan, honest_threshold
from fedllm.messages.round import Close, Confirm, FetchAdvertise
from fedllm.rng import SeededRng

SPENT = (cut(Daemon._retry, "self._answers.unmasked"), cut(Daemon._restored, "self._answers.unmasked"))
"""A round of which a sum was opened has no further attempt, nor is it taken up again by another process."""
SCORED = cut(OwnerRound.retry, "self._scoring is not None")
"""Nor has one in which a candidate was scored: its sum of updates was opened, or the coordinator lies."""
_cohort = policy._check_cohort


def tried(made: RoundPlan) -> Play:
    """Return the attack that plans this second attempt after a first one that failed before its sum was opened."""

    async def play(home: Path) -> Verdicts:
        at = Scene(home)
        await at.confirm()
        return await at.retry(made)

    return play


def claimed(*, restarted: bool) -> Play:
    """Return the attack that opens a sum, claims that it failed, and plans another without somebody."""

    async def play(home: Path) -> Verdicts:
        at = Scene(home)
        await at.open()
        if restarted:
            at.restart()
        return await at.retry(again(OWNERS[:3]))

    return play


def claimed_of_the_scores(*, restarted: bool) -> Play:
    """Return the attack that opens the scores before the update, claims failure, and plans again without somebody."""

    async def play(home: Path) -> Verdicts:
        at = Scene(home)
        await at.evaluate(dict.fromkeys(OWNERS, HEAD))
        await at.open(purpose="evaluation", subject=bytes.fromhex(HEAD.digest))
        if restarted:
            at.restart()
        return await at.retry(again(OWNERS[:3]))

    return play


async def after_a_candidate(home: Path) -> Verdicts:
    """Have every owner score an adapter of its own, and plan an attempt whose scores are bound to none."""
    at = Scene(home)
    await at.evaluate({owner: AdapterState.initial(SPEC, SeededRng(owner)) for owner in OWNERS})
    return await at.retry(again())


async def a_message_of_the_attempt_before(home: Path) -> Verdicts:
    """Record a request in the first attempt, and play it back, byte for byte, in the second."""
    at = Scene(home)
    await at.mask()
    recorded = {owner: sealed(Confirm("update", OWNERS), owner) for owner in OWNERS}
    for owner, data in recorded.items():
        await at.deliver(owner, data)
    await at.retry(again())
    await at.mask()
    return {owner: verdict((await at.deliver(owner, data))[0]) for owner, data in recorded.items()}


async def with_a_newcomer(home: Path) -> Verdicts:
    """Begin with three owners, and try again with four."""
    at = Scene(home)
    three = OWNERS[:3]
    await at.begin(
        plan(
            cohort=three, threshold=honest_threshold(3), neighbours=2, weights=dict.fromkeys(three, 1.0),
            declared_records=dict.fromkeys(three, 40),
        )
    )  # fmt: skip
    return await at.verdicts(retry(again()), three)


async def without_me(home: Path) -> Verdicts:
    """Ask each owner to take part in an attempt of the three others."""
    at = Scene(home)
    await at.begin()
    return await at.verdicts({owner: retry(again(others(owner))) for owner in OWNERS})


async def an_older_attempt(home: Path) -> Verdicts:
    """Go back from the third attempt to the second."""
    at = Scene(home)
    await at.begin()
    await at.retry(again(attempt=2))
    await at.retry(again(attempt=3, nonce=b"3" * 32))
    return await at.retry(again(attempt=2, nonce=b"4" * 32))


async def after_the_round(home: Path) -> Verdicts:
    """Try again when the round was closed."""
    at = Scene(home)
    await at.begin()
    await at.each(Close("aborted", None))
    return await at.retry(again())


async def new_keys_after_a_restart(home: Path) -> Verdicts:
    """Have an owner that was restarted in mid-attempt advertise a second time: two sets of keys, two sets of masks."""
    at = Scene(home)
    await at.confirm()
    at.restart()
    return await at.verdicts(FetchAdvertise())


ANOTHER_TRAINING = cut(policy.check_retry, "plan.training() != before.training()")
NEW_NUMBERS = cut(policy.check_retry, "now[each] != then.get(each)")
LATER = cut(policy.check_retry, "plan.attempt <= before.attempt")
TRAINED_AGAIN = "Advertised"

RETRIES = [
    Attack("a sum opened, and said to have failed", claimed(restarted=False), "already-unmasked", SPENT, TRAINED_AGAIN),
    Attack(
        "a sum opened, and said to have failed to restarted owners", claimed(restarted=True), "already-unmasked", SPENT,
        "step-mismatch",  # the update is not on the disk any more
    ),
    Attack(
        "scores opened, and said to have failed", claimed_of_the_scores(restarted=False), "already-unmasked", SPENT,
        "step-mismatch",
    ),
    Attack(
        "scores opened, and said to have failed to restarted owners", claimed_of_the_scores(restarted=True),
        "already-unmasked", SPENT, TRAINED_AGAIN,
    ),
    Attack("an attempt after a candidate was scored", after_a_candidate, "step-mismatch", (SCORED,), TRAINED_AGAIN),
    Attack(
        "a message of the attempt before", a_message_of_the_attempt_before, "request-reused",
        (cut(Outbox.again, "request.request in self._stale"),), "Confirmed",
    ),
    Attack(
        "a second set of keys from a restarted owner", new_keys_after_a_restart, "two-views",
        (cut(Answers.once, "known is not None"),), TRAINED_AGAIN,
    ),
    Attack(
        "an attempt for another global adapter", tried(again(head=sha256(b"another head"))), "plan-changed",
        (ANOTHER_TRAINING,), TRAINED_AGAIN,
    ),
    Attack(
        "an attempt for another recipe", tried(again(recipe=dataclasses.replace(plan().recipe, learning_rate=2.0))),
        "plan-changed", (ANOTHER_TRAINING,), TRAINED_AGAIN,
    ),
    Attack(
        "an attempt with less noise", tried(again(mechanism=dataclasses.replace(DP, noise_multiplier=1.0))),
        "plan-changed", (ANOTHER_TRAINING,), TRAINED_AGAIN,
    ),
    Attack(
        "an attempt without differential privacy", tried(again(mechanism=Mechanism.none(), weights=None)),
        "plan-changed", (ANOTHER_TRAINING,), TRAINED_AGAIN,
    ),
    Attack(
        "an attempt with other weights", tried(again(weights={o: 1.0 if o == "east" else 1e-6 for o in OWNERS})),
        "plan-changed", (NEW_NUMBERS,), TRAINED_AGAIN,
    ),
    Attack(
        "an attempt with other sizes", tried(again(declared_records=dict.fromkeys(OWNERS, 41))), "plan-changed",
        (NEW_NUMBERS,), TRAINED_AGAIN,
    ),
    Attack(
        "an attempt under the nonce of the one before", tried(again(nonce=bytes(32))), "plan-changed",
        (cut(policy.check_retry, "plan.nonce == before.nonce"),), TRAINED_AGAIN,
    ),
    Attack("the first attempt again", tried(again(attempt=1)), "round-replayed", (LATER,), TRAINED_AGAIN),
    Attack("an older attempt", an_older_attempt, "round-replayed", (LATER,), TRAINED_AGAIN),
    Attack(
        "an attempt with one owner more", with_a_newcomer, "cohort-refused", (cut(policy.check_retry, "joined"),),
        "plan-changed",
    ),
    Attack(
        "an attempt without the one who is asked", without_me, "cohort-refused",
        (cut(_cohort, "owner not in plan.cohort"), cut(SecAggOwner.__init__, "owner not in")), TRAINED_AGAIN,
    ),
    Attack(
        "an attempt of two owners", tried(again(OWNERS[:2])), "cohort-refused",
        (cut(_cohort, "n < policy.min_cohort"),), "threshold-refused",
    ),
    Attack(
        "an attempt with a lower threshold", tried(again(threshold=2)), "threshold-refused", (ANY_GRAPH,),
        TRAINED_AGAIN,
    ),
    Attack(
        "an attempt at a round that is over", after_the_round, "step-mismatch",
        (cut(Daemon._active, "self._round is None"),), "failed",
    ),
]  # fmt: skip
