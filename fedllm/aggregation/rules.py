"""Server rules: from the mean of the owners' updates to the step of the global adapter.

A rule sees the mean only, so every rule is post-processing under differential privacy and needs nothing but
sums from secure aggregation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedllm.adapter import F32
from fedllm.errors import ConfigError


class Rule(Protocol):
    """Turns a mean update into a step."""

    def apply(self, mean: F32) -> F32:
        """Return the step for a mean update, float32 of the same shape ``(d,)``."""


@dataclass(frozen=True)
class FedAvg:
    """Step by the mean, scaled (McMahan et al. 2017, arXiv 1602.05629).

    Attributes
    ----------
    server_lr : float
        1.0 replaces the global factors by the weighted mean of the owners' factors.
    """

    server_lr: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a rate that would not move, or would move backwards."""
        if not (math.isfinite(self.server_lr) and self.server_lr > 0):
            raise ConfigError(f"server_lr {self.server_lr}: a positive number is needed")

    def apply(self, mean: F32) -> F32:
        """Return ``server_lr * mean``."""
        return np.multiply(mean, np.float32(self.server_lr), dtype=np.float32)
