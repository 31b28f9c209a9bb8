"""What is known of a request when it has ended: the one record that metering, metrics and feedback are made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from fedllm.ids import Digest


@dataclass(frozen=True)
class RequestRecord:
    """One ended request. It holds no text, no key and no token id.

    Parameters
    ----------
    id : str
        The answer's id, as the tenant sees it; empty where a request ended before it had one.
    tenant : str
        Who asked; empty if the key was nobody's.
    key : str
        Name of the key that was used; never the key.
    route : str
        Path of the request, or ``other``.
    alias : str
        The alias asked for, ``base``, or empty if it is nothing that this tenant may use.
    version : Digest or None
        What answered, from the first token to the last.
    status : int
        HTTP status; 499 where the client left.
    prompt_tokens, completion_tokens, cached_tokens : int
        Computed for it; cached ones are the part of the prompt that the prefix cache had.
    started : float
        Seconds since the Unix epoch at arrival.
    ttft_s : float or None
        Seconds from arrival to the first token, if one came.
    seconds : float
        From arrival to the end.
    replica : str
        Which replica answered, behind a router.
    retries : int
        Replicas that failed it before.
    trace : str
        W3C trace id, 32 hexadecimal digits; empty where requests are not traced.
    """

    id: str
    tenant: str
    key: str
    route: str
    alias: str
    version: Digest | None
    status: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    started: float
    ttft_s: float | None
    seconds: float
    replica: str = ""
    retries: int = 0
    trace: str = ""

    @property
    def gap_s(self) -> float | None:
        """Mean seconds between two tokens, if there were two."""
        if self.ttft_s is None or self.completion_tokens < 2:
            return None
        return max(0.0, self.seconds - self.ttft_s) / (self.completion_tokens - 1)


class RequestObserver(Protocol):
    """Hears of every ended request, on the event loop: it returns at once and never raises."""

    def observe(self, record: RequestRecord) -> None:
        """Take one record in."""
