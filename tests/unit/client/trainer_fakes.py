"""Plans as far as a trainer reads them, for one small adapter."""

from __future__ import annotations

import dataclasses

from fedllm.adapter import AdapterSpec, AdapterState
from fedllm.ids import Digest, OwnerId, RoundNumber
from fedllm.messages.mechanism import RELATION_ADD_REMOVE, UNIT_RECORD, Mechanism
from fedllm.messages.plan import PLAN_VERSION, Recipe, Ring, RoundPlan

BASE = Digest("ab" * 32)
SPEC = AdapterSpec(BASE, 4, 8, {"q_proj": (64, 64), "v_proj": (32, 64)}, (0, 1))
EAST = OwnerId("east")
PRIVATE = Mechanism("dp-sgd", UNIT_RECORD, RELATION_ADD_REMOVE, 0.6, 0.05, 0.5, 3, 1e-5)


def plan(recipe: Recipe, mechanism: Mechanism, head: AdapterState, *owners: OwnerId) -> RoundPlan:
    """Return a plan for some owners (one by default), as far as a trainer reads it."""
    cohort = owners or (EAST,)
    return RoundPlan(
        version=PLAN_VERSION, federation="tools", round=RoundNumber(1), attempt=1, nonce=bytes(32), cohort=cohort,
        threshold=1, neighbours=len(cohort) - 1, corruption=0.05, dropout=0.05, min_survivors=1,
        roster=Digest("0" * 64), spec=head.spec, head=head.digest, head_version=None,
        layout=head.spec.layout(("B",)).digest, method="ffa", weights=dict.fromkeys(cohort, 1.0),
        declared_records=dict.fromkeys(cohort, 40), recipe=recipe, mechanism=mechanism, ring=Ring(24, 16, 4.0),
        train_deadline_s=60.0, phase_deadline_s=60.0,
    )  # fmt: skip


def adamw(**changes: object) -> Recipe:
    """Return a plain recipe with a few numbers changed."""
    return dataclasses.replace(Recipe("adamw", 1e-2, 6, 8, 4, 200), **changes)  # type: ignore[arg-type]
