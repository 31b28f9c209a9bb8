"""JUDGED: the gate's verdict, written down before the alias moves, and the move by compare-and-swap."""

from __future__ import annotations

from fedllm.aggregation.vector import ScoreSum
from fedllm.errors import AliasConflict
from fedllm.registry.model import AdapterVersion
from fedllm.server.ports import Gate, RoundState, Verdict
from fedllm.server.rounds.context import RoundContext


def judge(context: RoundContext, scores: ScoreSum | None, shortfall: str, gate: Gate) -> Verdict:
    """Return the verdict after journalling it; a candidate without scores is held, `shortfall` says why."""
    verdict = Verdict(False, f"held without scores: {shortfall}") if scores is None else gate.judge(scores)
    context.stop_watch()
    context.state = RoundState.JUDGED
    context.journal.judge(context.name, context.number, verdict)
    return verdict


def publish(context: RoundContext, version: AdapterVersion, verdict: Verdict) -> bool:
    """Move the alias to a promoted version and return whether it is published.

    Idempotent: a restarted coordinator finds the round's own move in the alias's history and makes no second.
    If somebody else moved the alias since the plan was made, their move stands and the journal says so.
    """
    if not verdict.promote:
        return False
    alias, actor = context.federation.alias, f"gate/{context.name}/round-{context.number}"
    registry = context.registry
    done = any(m.actor == actor for m in registry.history(alias))
    if done or version.digest == context.plan.head_version:
        return True
    try:
        registry.promote(alias, version.digest, expected=context.plan.head_version, actor=actor, reason=verdict.reason)
    except AliasConflict as error:
        context.journal.note(context.name, context.number, code=error.code, reason=error.message)
        return False
    return True
