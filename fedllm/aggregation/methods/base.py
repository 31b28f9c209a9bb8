"""The port of a LoRA method under aggregation: which factors are trained, sent and moved.

Secure aggregation opens sums only, so a method may use nothing but the (weighted) sum of the owners' updates.
"""

from __future__ import annotations

from typing import Protocol

from fedllm.adapter import F32, AdapterState, Factor
from fedllm.errors import AdapterInvalid, PolicyRefused
from fedllm.messages.plan import RoundPlan


class Method(Protocol):
    """One LoRA method; stateless, the round number is all it knows of the past."""

    @property
    def name(self) -> str:
        """Its name in plans."""

    @property
    def one_rank(self) -> str | None:
        """Why all owners must have the same rank; None if they need not."""

    def trainable(self, round_number: int) -> tuple[Factor, ...]:
        """Return the factors trained and sent in a round."""

    def update(self, trained: AdapterState, head: AdapterState, round_number: int) -> F32:
        """Return local minus global, flat over the layout of the trainable factors."""

    def apply(self, head: AdapterState, step: F32, round_number: int) -> AdapterState:
        """Return the next global adapter: the head moved by `step`."""

    def check(self, plan: RoundPlan) -> None:
        """Return if this method can run `plan`; else raise `PolicyRefused` with one sentence."""


def difference(trained: AdapterState, head: AdapterState, factors: tuple[Factor, ...]) -> F32:
    """Return trained minus head, flat over the layout of `factors`.

    Raises
    ------
    AdapterInvalid
        If the two have different specs, or a factor outside `factors` was changed by training.
    """
    if trained.spec != head.spec:
        raise AdapterInvalid("the trained adapter has another spec than the global one; two specs never mix")
    layout = head.spec.layout(factors)
    sent = {name for name, _ in layout.entries}
    for name, array in head.factors.items():
        if name not in sent and array.tobytes() != trained.factors[name].tobytes():
            raise AdapterInvalid(f"factor {name} is frozen in this round and was changed by training")
    return layout.flatten(trained.factors) - layout.flatten(head.factors)


def moved(head: AdapterState, step: F32, factors: tuple[Factor, ...]) -> AdapterState:
    """Return the head with `step` added to the given factors; raise `AdapterInvalid` on a wrong size."""
    layout = head.spec.layout(factors)
    flat = layout.flatten(head.factors)
    if step.shape != flat.shape:
        raise AdapterInvalid(f"step of shape {step.shape}, {flat.shape} expected")
    return head.replace(layout.unflatten(flat + step))


def check_plan(method: Method, plan: RoundPlan) -> None:
    """Refuse a plan that names another method or another layout than `method` sends."""
    if plan.method != method.name:
        raise PolicyRefused(f"the plan names method {plan.method!r}, {method.name!r} was asked to run it")
    factors = method.trainable(plan.round)
    if plan.layout != plan.spec.layout(factors).digest:
        raise PolicyRefused(
            f"the plan's layout is not that of the factors {'+'.join(factors)} which {method.name!r} sends"
        )
