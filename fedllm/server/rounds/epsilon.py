"""The coordinator's own reckoning of epsilon: from public plans only, and advisory."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedllm.messages.mechanism import Mechanism
from fedllm.server.journal import RoundRecord
from fedllm.server.ports import RoundState


def advisory_epsilon(mechanisms: Sequence[Mechanism], delta: float, unit: str) -> float | None:
    """Return epsilon of the composed mechanisms at `delta` for one `unit`, None if nothing bounds it.

    Counts every round that was planned, also those that an owner had no part in: an upper bound for each
    owner's ledger of record as long as that owner trains in this federation only.

    Raises
    ------
    MissingExtra
        If dp-accounting is not installed.
    """
    from fedllm.privacy.accountant import epsilon

    value = epsilon(mechanisms, delta, unit=unit)
    return None if math.isinf(value) else value


def released(record: RoundRecord) -> list[Mechanism]:
    """Return what one round cost: its mechanism, once for every attempt where the noise is in the ring.

    A sum that was opened is counted with the owners that were really in it, less those that may collude.
    """
    plan = record.plan
    shares = plan.mechanism.shares
    if shares is None:
        return [plan.mechanism]
    failed = [plan.mechanism] * len(record.measures.get("attempts", []))
    if record.state not in _OPENED:
        return [*failed, plan.mechanism]
    colluders = plan.min_survivors - shares.honest
    return [*failed, plan.mechanism.realised(int(record.measures["survivors"]) - colluders)]


_OPENED = frozenset({RoundState.AGGREGATED, RoundState.EVALUATING, RoundState.JUDGED})
