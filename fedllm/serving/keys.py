"""API keys: 256 random bits shown once, of which only the hash is kept; each with a life of its own.

A key that nobody can guess needs no slow hash: a plain SHA-256 of 256 random bits cannot be searched.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, field
from typing import Literal

from fedllm.rng import KEY_BYTES, Rng

KeyState = Literal["valid", "expired", "revoked"]
_PREFIX = "fedllm-"


@dataclass(frozen=True)
class ApiKey:
    """What is kept of one key.

    Parameters
    ----------
    name : str
        Its name within the tenant; records and lists show it, the key itself is nowhere.
    sha256 : str
        Hex SHA-256 of the key.
    created : float
        Seconds since the Unix epoch.
    expires : float or None
        From then on it is refused; None: never.
    revoked : float or None
        When it was taken back.
    """

    name: str
    sha256: str = field(repr=False)
    created: float
    expires: float | None = None
    revoked: float | None = None

    def state(self, now: float) -> KeyState:
        """Return whether the key opens anything at `now`, seconds since the Unix epoch."""
        if self.revoked is not None:
            return "revoked"
        return "valid" if self.expires is None or now < self.expires else "expired"


def new_secret(rng: Rng) -> str:
    """Return a new key, to be shown once."""
    return _PREFIX + base64.urlsafe_b64encode(rng.token(KEY_BYTES)).rstrip(b"=").decode()


def hash_key(secret: str) -> str:
    """Return the hex SHA-256 that is kept of a key."""
    return hashlib.sha256(secret.encode()).hexdigest()
