"""What a plan says about privacy, held against what this owner agreed to."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

from fedllm.aggregation.methods import get_method
from fedllm.aggregation.noised import NoisedVector
from fedllm.errors import PlanChanged, PolicyRefused
from fedllm.messages.mechanism import DP_FTRL, DP_SGD, NONE, SKELLAM, UNIT_OWNER, NoiseShares, Stream
from fedllm.messages.plan import RoundPlan
from fedllm.privacy.adaptive import step_grid
from fedllm.privacy.correlated import CorrelatedSum
from fedllm.privacy.skellam import SumGrid

if TYPE_CHECKING:
    from fedllm.client.policy import OwnerPolicy

_LEAST_NOISE, _MOST_NOISE = 0.2, 1e4
_LEAST_SAMPLE = 1.0
_LEAST_CLIP = 1e-6
_MOST_STREAM_BYTES = 1 << 31
_HELD_BYTES = 16
"""Of one entry and step that a stream keeps: a gradient sum and an estimate, float64."""


def check_privacy(plan: RoundPlan, policy: OwnerPolicy) -> None:
    """Return if the plan's mechanism is one that this owner's ledger counts, with numbers that mean something.

    Raises
    ------
    PolicyRefused
    """
    mechanism = plan.mechanism
    if mechanism.kind == NONE:
        if not policy.allow_without_dp:
            raise PolicyRefused(
                "the plan trains without differential privacy; dp-sgd, dp-ftrl or skellam is required here",
                hint="fedllm client policy set allow_without_dp true, if this owner's people agree",
            )
        return
    if policy.unit == UNIT_OWNER and mechanism.unit != UNIT_OWNER:
        raise PolicyRefused(
            f"the plan's mechanism {mechanism.kind} protects one {mechanism.unit}, this ledger counts by {policy.unit}",
            hint="nothing bounds what it tells of all that an owner holds; ask for a plan with mechanism skellam",
        )
    _check_numbers(plan, policy)
    if mechanism.kind == DP_SGD:
        _check_sampling(plan)
        step_grid(mechanism, mechanism.clip_norm, _layout_size(plan))
    if mechanism.stream is not None:
        _check_stream(plan, mechanism.stream)
    if mechanism.shares is not None:
        _check_shares(plan, mechanism.shares, policy)


def check_weights(plan: RoundPlan, policy: OwnerPolicy) -> None:
    """Refuse weights and sizes by which one owner's update would be all there is in the sum (`PolicyRefused`)."""
    declared = plan.declared_records
    largest, smallest = max(declared.values()), min(declared.values())
    if largest > policy.max_size_ratio * smallest:
        raise PolicyRefused(
            f"the plan's declared sizes run from {smallest} to {largest}, "
            f"a ratio of at most {policy.max_size_ratio:g} is allowed",
            hint="fedllm client policy set max_size_ratio, if the sizes are true",
        )
    if plan.mechanism.kind == NONE:
        if plan.weights is not None:
            raise PolicyRefused("the plan sets weights; without DP each owner weighs by its own masked count")
    elif plan.mechanism.unit == UNIT_OWNER:
        if plan.weights != dict.fromkeys(declared, 1.0):
            raise PolicyRefused("the plan's weights are not 1 each, which noise shares are made for")
    elif plan.weights != {owner: count / largest for owner, count in declared.items()}:
        raise PolicyRefused("the plan's weights are not the declared sizes over the largest declared size")


def check_same_shares(plan: RoundPlan, before: RoundPlan) -> None:
    """Refuse a further attempt that opens sums with less honest noise in them than was counted on (`PlanChanged`)."""
    if plan.mechanism.kind == SKELLAM and plan.min_survivors < before.min_survivors:
        raise PlanChanged(
            f"attempt {plan.attempt} at round {plan.round} opens a sum of {plan.min_survivors} owners,"
            f" {before.min_survivors} at least were agreed: their noise is what was counted on"
        )


def _check_numbers(plan: RoundPlan, policy: OwnerPolicy) -> None:
    """Refuse numbers that cost the accountant minutes, or make rounds that train nothing and still score."""
    mechanism = plan.mechanism
    if not _LEAST_NOISE <= mechanism.noise_multiplier <= _MOST_NOISE:
        raise PolicyRefused(
            f"the plan's noise multiplier is {mechanism.noise_multiplier:g}, {_LEAST_NOISE} to {_MOST_NOISE:g} allowed"
        )
    if not _LEAST_CLIP <= mechanism.clip_norm <= 1 / _LEAST_CLIP:
        raise PolicyRefused(f"the plan's clip norm is {mechanism.clip_norm:g}, {_LEAST_CLIP:g} to {1 / _LEAST_CLIP:g}")
    if mechanism.delta > policy.delta:
        raise PolicyRefused(f"the plan's delta is {mechanism.delta:g}, at most {policy.delta:g} allowed")
    if mechanism.kind in {DP_SGD, DP_FTRL} and mechanism.steps != plan.recipe.steps:
        raise PolicyRefused(
            f"the plan charges {mechanism.steps} noisy steps and trains {plan.recipe.steps}; the two must be equal"
        )


def _check_sampling(plan: RoundPlan) -> None:
    mechanism = plan.mechanism
    if mechanism.sample_rate * min(plan.declared_records.values()) < _LEAST_SAMPLE:
        raise PolicyRefused(
            f"the plan samples {mechanism.sample_rate:g} of each owner's records: at least {_LEAST_SAMPLE} expected"
        )


def _check_stream(plan: RoundPlan, stream: Stream) -> None:
    if not stream.name.startswith(f"{plan.federation}/"):
        raise PolicyRefused(f"the plan of federation {plan.federation!r} names another federation's stream")
    if min(plan.declared_records.values()) < stream.separation:
        raise PolicyRefused(
            f"the plan's stream uses each record once in {stream.separation} steps: fewer than one a step expected"
        )
    size = _layout_size(plan)
    held = _HELD_BYTES * (stream.band - 1) * size
    if held > _MOST_STREAM_BYTES:
        raise PolicyRefused(
            f"the plan's stream keeps {held} bytes between steps, at most {_MOST_STREAM_BYTES} allowed",
            hint="a narrower band or a smaller adapter",
        )
    mechanism = plan.mechanism
    CorrelatedSum(
        stream, noise_multiplier=mechanism.noise_multiplier, clip_norm=mechanism.clip_norm, dimension=size
    )  # refuses noise whose grid is too coarse, before it is charged


def _check_shares(plan: RoundPlan, shares: NoiseShares, policy: OwnerPolicy) -> None:
    size, owners = _layout_size(plan), len(plan.cohort)
    colluders = ceil(max(plan.corruption, policy.min_corruption) * owners)
    if shares.honest > plan.min_survivors - colluders:
        raise PolicyRefused(
            f"the plan counts on {shares.honest} honest shares of noise in a sum of {plan.min_survivors} owners,"
            f" at most {plan.min_survivors - colluders} can be, with {colluders} of {owners} who may collude"
        )
    if shares.dimension != size or shares.clip_steps != 1 << (plan.ring.value_bits - 1):
        raise PolicyRefused(
            f"the plan's noise is for {shares.dimension} entries of {shares.clip_steps} grid steps,"
            f" its updates have {size} of {1 << (plan.ring.value_bits - 1)}"
        )
    SumGrid.of(plan.mechanism).check()
    NoisedVector.of(plan.mechanism, ring_bits=plan.ring.bits, owners=owners, layout_size=size)


def _layout_size(plan: RoundPlan) -> int:
    return plan.spec.layout(get_method(plan.method).trainable(plan.round)).size
