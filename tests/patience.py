"""How long the tests wait."""

PATIENCE_S = 60.0
"""How long a test waits for what should happen at once: a shared machine stands still for seconds.

A guard against waiting for ever, never a measure of how quick something is. Where the claim is that something happens
without waiting for a timer, the test makes that timer `NEVER_S` long.
"""

NEVER_S = 5 * PATIENCE_S
"""A timer that a test which passes does not live to see."""
