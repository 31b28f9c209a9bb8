"""Survivor sets, requests to unmask and candidates that no owner answers, and steps out of their order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from malicious.attacks_keys import LARGE_ENOUGH, STEPS
from malicious.attacks_plan import SYBIL
from malicious.removals import cut
from malicious.scene import EAST, NORTH, OWNERS, SOUTH, WEST, Attack, Play, Scene, Verdicts, begin, plan
from unit.client.owner_fakes import HEAD, SPEC, Never

from fedllm.adapter import AdapterState
from fedllm.aggregation.secagg.owner import SecAggOwner
from fedllm.aggregation.secagg.steps import Steps
from fedllm.aggregation.secagg.terms import SumTerms
from fedllm.client.daemon import Daemon
from fedllm.client.kept import Answers
from fedllm.client.pipeline import OwnerSums
from fedllm.client.round import OwnerRound
from fedllm.ids import OwnerId
from fedllm.messages.round import Body, Closed, Confirm, Evaluate, FetchScores, SendMasked, ShareKeys, Unmask
from fedllm.messages.secagg import ShareDelivery, SurvivorSignature, UnmaskRequest
from fedllm.rng import SeededRng

ONCE = (STEPS, cut(Answers.once, "known is not None"))
"""A step is answered once, in this process and in the next."""
_ENOUGH = "len(counted) < t.threshold"
_DISTINCT = "len(signers) != len(request.signatures)"
PROBE = AdapterState.initial(SPEC, SeededRng("probe"))


def another(owner: OwnerId) -> OwnerId:
    """Return an owner to leave out in the eyes of this one."""
    return WEST if owner != WEST else EAST


def others(owner: OwnerId) -> tuple[OwnerId, ...]:
    """Return the cohort less one owner."""
    return tuple(each for each in OWNERS if each != owner)


def shown(survivors: Callable[[OwnerId], Sequence[OwnerId]], *, before: bool = False) -> Play:
    """Return the attack that asks each owner to sign a survivor set, `before` it the honest one."""

    async def play(home: Path) -> Verdicts:
        at = Scene(home)
        await at.mask()
        if before:
            await at.confirm()
        return await at.verdicts({owner: Confirm("update", tuple(survivors(owner))) for owner in OWNERS})

    return play


def opened_with(change: Callable[[Scene, OwnerId, UnmaskRequest], UnmaskRequest]) -> Play:
    """Return the attack that changes the request by which each owner opens the honest set."""

    async def play(home: Path) -> Verdicts:
        at = Scene(home)
        await at.confirm()
        honest = at.request().request
        return await at.verdicts({owner: Unmask(change(at, owner, honest)) for owner in OWNERS})

    return play


def _signatures(change: Callable[[tuple[SurvivorSignature, ...]], Sequence[SurvivorSignature]]) -> Play:
    return opened_with(lambda _at, _o, honest: dataclasses.replace(honest, signatures=tuple(change(honest.signatures))))


def _smaller_set(at: Scene, owner: OwnerId, _honest: UnmaskRequest) -> UnmaskRequest:
    fewer = others(another(owner))
    return at.request(*fewer, survivors=fewer).request


def _sybil_signs(good: Sequence[SurvivorSignature]) -> list[SurvivorSignature]:
    return [*good[:2], dataclasses.replace(good[2], owner=SYBIL)]


def _renamed(good: Sequence[SurvivorSignature]) -> list[SurvivorSignature]:
    """Present the signature of the third under the name of the fourth."""
    return [*good[:2], dataclasses.replace(good[2], owner=WEST)]


def _forged(good: Sequence[SurvivorSignature]) -> list[SurvivorSignature]:
    return [dataclasses.replace(good[0], signature=bytes(64)), *good[1:]]


async def signatures_over_another_set(home: Path) -> Verdicts:
    """Show each owner everybody, the three others a set without somebody, and open with what the three signed."""
    said: Verdicts = {}
    for owner in OWNERS:
        at = Scene(home / owner)
        await at.mask()
        rest = others(owner)
        answers = await at.each({o: Confirm("update", rest) for o in rest} | {owner: Confirm("update", OWNERS)})
        at.signed["update"] = {o: answer.signature for o, answer in answers.items()}
        said[owner] = await at.verdict(owner, at.request(*rest))
    return said


async def unmask_what_was_not_confirmed(home: Path) -> Verdicts:
    """Ask an owner to open what the others signed, before it has signed anything."""
    said: Verdicts = {}
    for owner in OWNERS:
        at = Scene(home / owner)
        await at.mask()
        answers = await at.each(Confirm("update", OWNERS), others(owner))
        at.signed["update"] = {o: answer.signature for o, answer in answers.items()}
        said[owner] = await at.verdict(owner, at.request())
    return said


async def both_kinds_of_share(home: Path) -> Verdicts:
    """Open the sum of everybody, then ask for the other kind of share of one owner, as if it had been lost."""
    at = Scene(home)
    await at.open()
    return {owner: await at.verdict(owner, at.request(survivors=others(another(owner)))) for owner in OWNERS}


async def signatures_of_the_other_sum(home: Path) -> Verdicts:
    """Open the update with signatures that were given for the scores."""
    at = Scene(home)
    await at.evaluate(dict.fromkeys(OWNERS, HEAD))
    await at.confirm(purpose="evaluation")
    await at.confirm()
    scores = at.signed["evaluation"].values()
    at.signed["update"] = {s.owner: dataclasses.replace(s, purpose="update") for s in scores}
    return await at.verdicts(at.request())


async def a_second_candidate(home: Path) -> Verdicts:
    """Have the owners score one adapter, then another."""
    at = Scene(home)
    await at.evaluate(dict.fromkeys(OWNERS, HEAD))
    return await at.verdicts(Evaluate(PROBE.to_bytes()))


async def a_candidate_for_each(home: Path) -> Verdicts:
    """Have every owner score an adapter of its own, and open the sum: the score of a probe would stand out of it."""
    at = Scene(home)
    await at.evaluate({owner: AdapterState.initial(SPEC, SeededRng(owner)) for owner in OWNERS})
    await at.confirm(purpose="evaluation")
    return await at.verdicts(at.request(purpose="evaluation"))


async def an_early_candidate(home: Path) -> Verdicts:
    """Send a candidate before the update was asked for."""
    at = Scene(home)
    await at.share()
    return await at.verdicts(Evaluate(PROBE.to_bytes()))


def asked(body: Callable[[Scene, OwnerId], Body], *, after: str, **envelope: Any) -> Play:
    """Return the attack that asks for a step when the round has come no further than `after`."""

    async def play(home: Path) -> Verdicts:
        at = Scene(home)
        if after:
            await getattr(at, after)()
        return {owner: await at.verdict(owner, body(at, owner), **envelope) for owner in OWNERS}

    return play


async def keys_before_training_ends(home: Path) -> Verdicts:
    """Send a key list while the owners are still training."""
    at = Scene(home, worker=Never())
    await at.each(begin(plan()))
    return await at.verdicts(ShareKeys((), ()))


def _nothing(_at: Scene, _owner: OwnerId) -> SendMasked:
    return SendMasked(ShareDelivery("update", OWNERS, {}), ShareDelivery("evaluation", OWNERS, {}))


SUMS = [
    # survivor sets
    Attack(
        "two views of the survivors", shown(lambda owner: others(another(owner)), before=True), "two-views", ONCE,
        "Confirmed",
    ),
    Attack("two survivors", shown(lambda o: sorted((o, another(o)))), "set-refused", (LARGE_ENOUGH,), "Confirmed"),
    Attack(
        "survivors without one whose vector was sent", shown(others), "set-refused",
        (cut(SecAggOwner.confirm, "self._owner not in ordered"),), "Confirmed",
    ),
    Attack(
        "a Sybil among the survivors", shown(lambda _o: sorted((*OWNERS, SYBIL))), "set-refused",
        (cut(SumTerms.check_set, "extra"),), "Confirmed",
    ),
    Attack(
        "a survivor named twice", shown(lambda _o: (EAST, EAST, NORTH, SOUTH, WEST)), "set-refused",
        (cut(SumTerms.check_set, "sorted(set(owners))"),), "Confirmed",
    ),
    # requests to unmask
    Attack(
        "a survivor set that was not signed", opened_with(_smaller_set), "two-views",
        (cut(SecAggOwner._check_request, "self._steps.asked"),), "signature-invalid",
    ),
    Attack(
        "signatures over another survivor set", signatures_over_another_set, "signature-invalid",
        (cut(SecAggOwner._check_request, ".verify("),), "Unmasked",
    ),
    Attack(
        "shares from an owner that signed nothing", unmask_what_was_not_confirmed, "step-mismatch",
        (STEPS, cut(SecAggOwner._check_request, "self._steps.asked")), "Unmasked",
    ),
    Attack(
        "both kinds of share of one owner", both_kinds_of_share, "step-mismatch",
        (cut(Steps.answer, "self._closed"),), "two-views",
    ),
    Attack(
        "too few signatures", _signatures(lambda good: good[:2]), "signatures-missing",
        (cut(SecAggOwner._check_request, _ENOUGH),), "Unmasked",
    ),
    Attack(
        "one owner's signature twice", _signatures(lambda good: (good[0], good[0], good[1])), "signatures-missing",
        (cut(SecAggOwner._check_request, _DISTINCT, _ENOUGH),), "Unmasked",
    ),
    Attack(
        "a stranger's signature", _signatures(_sybil_signs), "signatures-missing",
        (cut(SecAggOwner._check_request, _DISTINCT),), "not-found",
    ),
    Attack(
        "one owner's signature in another's name", _signatures(_renamed), "signature-invalid",
        (cut(SecAggOwner._check_request, ".verify("),), "Unmasked",
    ),
    Attack(
        "a forged signature", _signatures(_forged), "signature-invalid",
        (cut(SecAggOwner._check_request, ".verify("),), "Unmasked",
    ),
    Attack(
        "signatures of the other sum", signatures_of_the_other_sum, "signature-invalid",
        (cut(SecAggOwner._check_request, ".verify("),), "Unmasked",
    ),
    # candidates
    Attack(
        "a second candidate", a_second_candidate, "two-views",
        (cut(OwnerRound._evaluate, "self._candidate not in"),), "Masked",
    ),
    Attack(
        "a candidate of its own for each owner", a_candidate_for_each, "signature-invalid",
        (cut(OwnerRound._evaluate, "self._sums.bind_candidate"),), "Unmasked",
    ),
    Attack(
        "a candidate before the update", an_early_candidate, "step-mismatch",
        (cut(OwnerRound._evaluate, "not self._prescored"), cut(OwnerSums.mask_scores, "self._delivery is None")),
        "failed",
    ),
    # order
    Attack("a key list while training runs", keys_before_training_ends, "step-mismatch", (STEPS,), "set-refused"),
    Attack("a masked update before shares", asked(_nothing, after="begin"), "step-mismatch", (STEPS,), "set-refused"),
    Attack(
        "survivors before a masked update", asked(lambda _at, _o: Confirm("update", OWNERS), after="share"),
        "step-mismatch", (STEPS,), "set-refused",
    ),
    Attack(
        "scores before a candidate", asked(lambda _at, _o: FetchScores(), after="mask"), "step-mismatch",
        (cut(OwnerRound._fetch_scores, "self._scoring is None"),), "failed",
    ),
    Attack(
        "a step before any round", asked(lambda _at, _o: Confirm("update", OWNERS), after=""), "step-mismatch",
        (cut(Daemon._active, "self._round is None"),), "failed",
    ),
    Attack(
        "a step of another round", asked(lambda at, _o: at.key_list(), after="begin", round_number=2), "step-mismatch",
        (cut(Daemon._active, "envelope.round !="),), "SharedKeys",
    ),
    Attack(
        "an answer sent as a request", asked(lambda _at, _o: Closed(), after="begin"), "step-mismatch",
        (cut(OwnerRound.answer, "step is None"),), "failed",
    ),
    Attack(
        "a sum that a round does not have", asked(lambda _at, _o: Confirm("gradient", OWNERS), after="mask"),
        "protocol", (cut(OwnerSums._of, "found is None"),), "failed",
    ),
]  # fmt: skip
