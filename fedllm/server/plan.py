"""From a federation and the owners that are there to a `RoundPlan`: a pure function, signed by its caller."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from fedllm.aggregation.fixedpoint import RING_BITS, required_bits
from fedllm.aggregation.methods import get_method
from fedllm.aggregation.methods.support import check as check_method
from fedllm.aggregation.noised import needed_bits
from fedllm.aggregation.secagg import graph
from fedllm.config import FederationSettings
from fedllm.errors import NotReady, PolicyRefused
from fedllm.ids import OwnerId, RoundNumber
from fedllm.messages.mechanism import Mechanism
from fedllm.messages.plan import NONCE_BYTES, PLAN_VERSION, Recipe, Ring, RoundPlan
from fedllm.rng import Rng
from fedllm.server.federation import Federation, Head
from fedllm.server.mechanisms import least_survivors, make_mechanism, public_weights

LEAST_SURVIVORS = 3
"""A sum of fewer updates is never published: with two, each owner can subtract itself and read the other."""


def make_plan(federation: Federation, head: Head, number: int, available: Collection[OwnerId], rng: Rng) -> RoundPlan:
    """Plan one round with the owners that are there.

    Parameters
    ----------
    federation : Federation
    head : Head
        What training starts from.
    number : int
        The round's number; never used before.
    available : Collection[OwnerId]
        Owners that answered the roll call.
    rng : Rng
        Source of the nonce.

    Raises
    ------
    PolicyRefused
        If the federation's own settings allow no such round, whoever is there.
    NotReady
        If too few owners are there now.
    """
    settings = federation.settings
    least = max(settings.min_survivors, LEAST_SURVIVORS)
    members = [member.owner for member in federation.roster.members]
    if settings.min_survivors < LEAST_SURVIVORS or len(members) < least:
        raise PolicyRefused(
            f"federation {federation.name}: {len(members)} owners, min_survivors {settings.min_survivors};"
            f" a sum of fewer than {LEAST_SURVIVORS} updates is never published",
            hint="add owners to the roster, and set min_survivors to 3 or more",
        )
    cohort = tuple(owner for owner in members if owner in set(available))
    if len(cohort) < least:
        absent = [owner for owner in members if owner not in cohort]
        raise NotReady(
            f"federation {federation.name}: {len(cohort)} of {len(members)} owners are there, {least} needed",
            hint=f"waiting for {', '.join(absent)}; 'fedllm coordinator status' shows who is connected",
        )
    peers = graph.parameters(len(cohort), settings.corruption, settings.dropout)
    declared = {str(owner): settings.declared_records[owner] for owner in cohort}
    layout = federation.spec.layout(get_method(settings.method).trainable(number))
    least = least_survivors(settings, len(cohort), least)
    mechanism = make_mechanism(settings, owners=len(cohort), least=least, dimension=layout.size)
    check_method(settings.method, mechanism, mixed_ranks=any(rank != settings.rank for rank in settings.ranks.values()))
    return RoundPlan(
        version=PLAN_VERSION,
        federation=federation.name,
        round=RoundNumber(number),
        attempt=1,
        nonce=rng.token(NONCE_BYTES),
        cohort=cohort,
        threshold=peers.threshold,
        neighbours=peers.neighbours,
        corruption=settings.corruption,
        dropout=settings.dropout,
        min_survivors=least,
        roster=federation.roster.digest,
        spec=federation.spec,
        head=head.state.digest,
        head_version=head.version,
        layout=layout.digest,
        method=settings.method,
        weights=public_weights(mechanism, declared),
        declared_records=declared,
        recipe=Recipe(
            optimizer=settings.optimizer,
            learning_rate=settings.learning_rate,
            steps=settings.local_steps,
            batch_size=settings.batch_size,
            microbatch=settings.microbatch,
            max_tokens=settings.max_tokens,
        ),
        mechanism=mechanism,
        ring=_ring(settings, mechanism, len(cohort)),
        train_deadline_s=settings.train_deadline_s,
        phase_deadline_s=settings.phase_deadline_s,
    )


def next_attempt(plan: RoundPlan, left: Collection[OwnerId], rng: Rng) -> RoundPlan | None:
    """Return the plan of another attempt at a round's sum with the owners that are left, None if they are too few.

    Everything that decides training stays; declared sizes and weights are those of the attempt before.
    """
    cohort = tuple(owner for owner in plan.cohort if owner in set(left))
    if len(cohort) < max(plan.min_survivors, LEAST_SURVIVORS):
        return None
    peers = graph.parameters(len(cohort), plan.corruption, plan.dropout)
    return dataclasses.replace(
        plan,
        attempt=plan.attempt + 1,
        nonce=rng.token(NONCE_BYTES),
        cohort=cohort,
        threshold=peers.threshold,
        neighbours=peers.neighbours,
        weights=None if plan.weights is None else {owner: plan.weights[owner] for owner in cohort},
        declared_records={owner: plan.declared_records[owner] for owner in cohort},
    )


def ring_bits(value_bits: int, owners: int) -> int:
    """Return the smallest ring of whole bytes in which `owners` entries of `value_bits` bits never wrap around."""
    return _whole_bytes(required_bits(owners, value_bits), value_bits, owners)


def _ring(settings: FederationSettings, mechanism: Mechanism, owners: int) -> Ring:
    if mechanism.shares is None:
        return Ring(ring_bits(settings.value_bits, owners), settings.value_bits, settings.clip_range)
    needed = needed_bits(owners, mechanism.shares.clip_steps, mechanism.sum_std(owners))
    return Ring(_whole_bytes(needed, settings.value_bits, owners), settings.value_bits, mechanism.clip_norm)


def _whole_bytes(needed: int, value_bits: int, owners: int) -> int:
    for bits in RING_BITS:
        if bits >= needed and bits > value_bits:
            return bits
    raise PolicyRefused(
        f"{owners} owners at value_bits {value_bits} need a ring of {needed} bits, 32 is the largest",
        hint="set value_bits lower",
    )
