"""Which method runs under what: supported, or refused when a round is planned, with one sentence.

The table in ``docs/methods.md`` is written from `table`, and plans are checked with `check`: both ask `refusal`.
"""

from __future__ import annotations

from fedllm.aggregation.methods import METHODS, NOT_SUMS, get_method
from fedllm.errors import PolicyRefused
from fedllm.messages.mechanism import NONE, UNIT_OWNER, UNIT_RECORD, Mechanism

SECAGG = "secure aggregation"
RANKS = "mixed ranks"
CONDITIONS = (SECAGG, f"unit {UNIT_RECORD}", f"unit {UNIT_OWNER}", RANKS)
"""What a round may ask of a method; secure aggregation always."""


def refusal(method: str, condition: str) -> str | None:
    """Return why a method does not run under a condition of `CONDITIONS`, None if it does.

    Raises
    ------
    ConfigError
        If there is no such method.
    """
    if condition not in CONDITIONS:
        raise ValueError(f"condition {condition!r}: one of {CONDITIONS}")
    if method in NOT_SUMS:
        return NOT_SUMS[method] if condition == SECAGG else "it needs single updates, which are never opened"
    found = get_method(method)
    return found.one_rank if condition == RANKS else None


def check(method: str, mechanism: Mechanism, *, mixed_ranks: bool) -> None:
    """Return if a method runs under a round's mechanism and ranks.

    Raises
    ------
    PolicyRefused
        With the sentence of the first condition that it does not.
    ConfigError
        If there is no such method.
    """
    get_method(method)
    asked = [SECAGG]
    if mechanism.kind != NONE:
        asked.append(f"unit {mechanism.unit}")
    if mixed_ranks:
        asked.append(RANKS)
    for condition in asked:
        why = refusal(method, condition)
        if why is not None:
            raise PolicyRefused(
                f"method {method!r} is refused with {condition}: {why}", hint=f"choose one of: {', '.join(METHODS)}"
            )


def table() -> list[tuple[str, list[str | None]]]:
    """Return every method with its refusals, in the order of `CONDITIONS`; None where it is supported."""
    return [(name, [refusal(name, each) for each in CONDITIONS]) for name in (*METHODS, *NOT_SUMS)]
