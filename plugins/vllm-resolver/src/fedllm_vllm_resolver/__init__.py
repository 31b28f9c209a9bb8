"""vLLM's plugin: adapter versions are fetched from fedllm's registry by digest when a request first names them.

vLLM calls `register` in each of its processes. Nothing of vLLM is imported before, so that the rest can be tested
where vLLM is not installed.
"""

from __future__ import annotations

import logging
import os

_LOG = logging.getLogger("vllm.fedllm_resolver")
RESOLVER_NAME = "fedllm"


def register() -> None:
    """Add the resolver to vLLM's, if the environment says where versions come from.

    Raises
    ------
    ConfigError
        If it says so only in part, or wrongly: a server that was meant to verify must not start without.
    """
    from fedllm_vllm_resolver.settings import ResolverSettings

    settings = ResolverSettings.read(os.environ)
    if settings is None:
        _LOG.info("fedllm resolver is off: FEDLLM_REGISTRY is not set")
        return
    from vllm.lora.resolver import LoRAResolverRegistry

    from fedllm_vllm_resolver.resolver import DigestResolver

    LoRAResolverRegistry.register_resolver(RESOLVER_NAME, DigestResolver(settings))
