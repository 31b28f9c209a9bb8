"""The coordinator's own reckoning of epsilon: from public plans only, and advisory."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedllm.messages.mechanism import Mechanism


def advisory_epsilon(mechanisms: Sequence[Mechanism], delta: float) -> float | None:
    """Return epsilon of the composed mechanisms at `delta`, None if nothing bounds it.

    Counts every round that was planned, also those that an owner had no part in: an upper bound for each
    owner's ledger of record as long as that owner trains in this federation only.

    Raises
    ------
    MissingExtra
        If dp-accounting is not installed.
    """
    from fedllm.privacy.accountant import epsilon

    value = epsilon(mechanisms, delta)
    return None if math.isinf(value) else value
