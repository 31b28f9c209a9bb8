"""A `Mechanism` in words and as the accountant's event."""

from __future__ import annotations

import logging
import math
from typing import Any

from fedllm.errors import MissingExtra
from fedllm.messages.mechanism import Mechanism


def describe(epsilon: float, delta: float, unit: str, relation: str) -> str:
    """Return the one sentence in which epsilon is printed everywhere.

    An epsilon without its unit, neighbouring relation and delta is not a statement; this keeps them together:
    ``ε = 3.21 per record (add-or-remove-one), δ = 1e-05``.
    """
    value = "∞ (no guarantee)" if math.isinf(epsilon) else f"{math.ceil(epsilon * 100 - 1e-9) / 100:.2f}"
    return f"ε = {value} per {unit} ({relation}), δ = {delta:g}"


def to_event(mechanism: Mechanism) -> Any:
    """Return the ``dp_accounting.DpEvent`` of one round.

    DP-SGD is the Poisson-sampled Gaussian mechanism composed with itself `steps` times (Abadi et al. 2016);
    the absence of a mechanism is `NonPrivateDpEvent`, whose epsilon is infinite.

    Raises
    ------
    MissingExtra
        If dp-accounting is not installed.
    """
    dp = load_dp_accounting()
    if mechanism.kind == "none":
        return dp.NonPrivateDpEvent()
    gaussian = dp.GaussianDpEvent(mechanism.noise_multiplier)
    return dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(mechanism.sample_rate, gaussian), mechanism.steps)


def load_dp_accounting() -> Any:
    """Import dp-accounting, or raise `MissingExtra`."""
    try:
        import dp_accounting
    except ModuleNotFoundError as error:
        raise MissingExtra("client", error.name or "dp_accounting") from None
    # Not before the import: absl must make its logger itself.
    logging.getLogger("absl").addFilter(_not_about_orders)
    return dp_accounting


def _not_about_orders(record: logging.LogRecord) -> bool:
    # Renyi accounting advises on its list of orders; every order gives an upper bound, a wider list a tighter one.
    return "dp_accounting" not in record.pathname
