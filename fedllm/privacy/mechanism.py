"""Epsilon and a `Mechanism` in words, and the accountant's library."""

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


def describe_noise(mechanism: Mechanism) -> str:
    """Return the numbers of a mechanism's noise in one phrase, for tables and logs.

    ``2 steps, sample rate 0.25, noise multiplier 0.81, clip norm 0.05``.
    """
    if not mechanism.covered:
        return "no noise"
    noise = f"noise multiplier {mechanism.noise_multiplier:g}, clip norm {mechanism.clip_norm:g}"
    if (shares := mechanism.shares) is not None:
        return f"{noise} ({shares.clip_steps} grid steps), {shares.honest} honest shares, {shares.dimension} entries"
    steps = f"{mechanism.steps} step{'s' if mechanism.steps > 1 else ''}"
    if (stream := mechanism.stream) is not None:
        return f"{steps} of {stream.steps} of stream {stream.name!r}, band {stream.band}, {noise} for the whole stream"
    if (adaptive := mechanism.adaptive) is not None:
        noise += (
            f" at first, then quantile {adaptive.quantile:g} (gradients' noise {mechanism.gradient_noise:.4g},"
            f" count's {adaptive.count_noise:g})"
        )
    return f"{steps}, sample rate {mechanism.sample_rate:g}, {noise}"


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
