"""Which replicas a request goes to, the best one first. Pure.

Rendezvous hashing (Thaler and Ravishankar 1998): every replica has a score for every key, the highest wins, and a
replica that leaves moves nobody's keys but its own. The key is the version's digest and the digest of the beginning of
the prompt: what shares a prefix meets the cache that has it. Loads bend the order (consistent hashing with bounded
loads, Mirrokni, Thorup and Zadimoghaddam, arXiv 1608.01350): a replica whose load in tokens is above (1 + epsilon)
times the mean is passed over, for the next in the key's own order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

EPSILON = 0.25
_BEGINNING_CHARS = 256
_BEGINNING_TOKENS = 64


def rendezvous(key: bytes, names: Iterable[str]) -> list[str]:
    """Return the names in the key's own order."""
    return sorted(names, key=lambda name: (_score(key, name), name), reverse=True)


def place(key: bytes, loads: Mapping[str, int], *, epsilon: float = EPSILON) -> list[str]:
    """Return all replicas in the order in which a request tries them.

    Parameters
    ----------
    key : bytes
        See `placement_key`.
    loads : Mapping of str to int
        Tokens in flight at each replica.
    epsilon : float
        A replica may have this much more than the mean, as a fraction of it.

    Returns
    -------
    list of str
        Replicas within the bound in the key's order, then the others in the same order. The first one is within it
        always, for nobody's least load is above the mean; so after each placement at the first, no replica has more
        than (1 + epsilon) times the mean and one request.
    """
    bound = (1.0 + epsilon) * sum(loads.values()) / max(1, len(loads))
    order = rendezvous(key, loads)
    return [n for n in order if loads[n] <= bound] + [n for n in order if loads[n] > bound]


def placement_key(digest: str, body: Mapping[str, Any]) -> bytes:
    """Return the key of a request's body, which holds a digest of its prompt's beginning and none of its text.

    A conversation's beginning is its first messages up to the first that is no system message, cut off at
    256 characters each: it stays the same from turn to turn.

    Parameters
    ----------
    digest : str
        Of the version; empty for the base.
    body : Mapping
        A chat or text completion as asked for; what is malformed has some key too.
    """
    hashed = hashlib.blake2b(digest.encode(), digest_size=16)
    messages, prompt = body.get("messages"), body.get("prompt")
    for message in messages if isinstance(messages, list) else []:
        if not isinstance(message, dict):
            break
        role = str(message.get("role"))
        hashed.update(f"{role}:{message.get('content')!s:.{_BEGINNING_CHARS}}\n".encode(errors="replace"))
        if role not in ("system", "developer"):
            break
    beginning = prompt[:_BEGINNING_TOKENS] if isinstance(prompt, list) else prompt
    hashed.update(f"{beginning!s:.{_BEGINNING_CHARS}}".encode(errors="replace"))
    return hashed.digest()


def _score(key: bytes, name: str) -> bytes:
    return hashlib.blake2b(name.encode(), key=key[:64], digest_size=8).digest()
