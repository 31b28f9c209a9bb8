"""The gate between a candidate and an alias: computed from masked sums, never from one owner's score."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedllm.aggregation.vector import ScoreSum
from fedllm.errors import ConfigError
from fedllm.server.ports import Verdict


@dataclass(frozen=True)
class ScoreGate:
    """Promote a candidate whose mean held-out loss is at most `margin` above the head's.

    The head of a federation's first round is the untrained start, which is the base model itself: the first
    version is compared with the base.

    Attributes
    ----------
    margin : float
        Nats per token that a candidate may be worse by; 0 or more.
    """

    margin: float

    def __post_init__(self) -> None:
        """Refuse margins that could never or always pass."""
        if not (math.isfinite(self.margin) and self.margin >= 0):
            raise ConfigError(f"gate_margin is {self.margin}: a finite number of 0 or more is needed")

    def judge(self, scores: ScoreSum) -> Verdict:
        """Return the verdict and the numbers behind it."""
        delta = scores.delta
        numbers = {
            "head_loss": scores.head_loss,
            "candidate_loss": scores.candidate_loss,
            "delta": delta,
            "delta_std": scores.delta_std,
            "regressed": float(scores.regressed),
            "margin": self.margin,
            "owners": float(scores.owners),
        }
        if delta <= self.margin:
            return Verdict(True, f"mean held-out loss moved by {delta:+.4f}, at most +{self.margin} allowed", numbers)
        return Verdict(False, f"mean held-out loss rose by {delta:.4f}, at most {self.margin} allowed", numbers)
