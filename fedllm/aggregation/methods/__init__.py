"""LoRA methods that need nothing but sums, and a sentence for those that need more."""

from __future__ import annotations

from fedllm.aggregation.methods.base import Method
from fedllm.aggregation.methods.fedit import FedIt
from fedllm.aggregation.methods.ffa import Ffa
from fedllm.errors import ConfigError, PolicyRefused

METHODS: dict[str, Method] = {method.name: method for method in (Ffa(), FedIt())}
"""Name to method; add one here and every plan may name it."""

NOT_SUMS: dict[str, str] = {
    "flora": "it stacks every owner's own A and B at the coordinator",
    "flexlora": "it needs the dense mean of B·A, built from every owner's own factors",
    "fedex": "it corrects the base weights by the sum of every owner's own product B·A",
    "florist": "it stacks every owner's own A and B before a thresholded SVD",
    "lora-fair": "its residual is fitted to every owner's own product B·A",
    "hetlora": "it weighs each owner by the norm of its own update",
    "scaffold": "its control variates are a second release of each owner's own gradient",
}
"""Methods that cannot run under secure aggregation, and why."""


def get_method(name: str) -> Method:
    """Return the method of a name.

    Raises
    ------
    PolicyRefused
        If the method needs individual updates, which secure aggregation never opens.
    ConfigError
        If there is no such method.
    """
    if name in METHODS:
        return METHODS[name]
    known = ", ".join(sorted(METHODS))
    if name in NOT_SUMS:
        raise PolicyRefused(
            f"method {name!r} is refused: {NOT_SUMS[name]}, and secure aggregation opens only the sum of updates",
            hint=f"choose one of: {known}",
        )
    raise ConfigError(f"method {name!r} is unknown", hint=f"choose one of: {known}")


__all__ = ["METHODS", "NOT_SUMS", "Method", "get_method"]
