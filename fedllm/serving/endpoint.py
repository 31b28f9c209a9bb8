"""What an endpoint's routes are made of. No web framework."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from fedllm.clock import Clock
from fedllm.rng import Rng
from fedllm.serving.access import Access
from fedllm.serving.delivery import STALL_S
from fedllm.serving.engine import Engine
from fedllm.serving.feedback import Feedbacks
from fedllm.serving.intake import BODY_S
from fedllm.serving.metrics import Counters
from fedllm.serving.tenants import Tenant
from fedllm.serving.text import TextCodec
from fedllm.serving.versions import Versions
from fedllm.serving.watch import AliasWatcher

VERSION_HEADER = "x-fedllm-version"


class PromptNotes(Protocol):
    """Keeps what tenants asked and were answered, of those tenants only that have opted in."""

    def note(self, tenant: Tenant, record_id: str, asked: str, answered: str) -> None:
        """Keep one exchange, or not; returns at once and never raises."""


@dataclass(frozen=True)
class Endpoint:
    """Everything the routes need; made by the composition root.

    Parameters
    ----------
    access : Access
        The front door.
    stall_s : float
        Seconds after which a client that does not read its stream is cut off.
    body_s : float
        Seconds that a request's body may take to arrive.
    prompt_log : PromptNotes, optional
        Nothing that is asked or answered is kept without one.
    feedbacks : Feedbacks
        Takes ratings of answers; one of the observers of `access`, or it knows of no answer.
    """

    engine: Engine
    versions: Versions
    watcher: AliasWatcher
    codec: TextCodec
    access: Access
    counters: Counters
    clock: Clock
    rng: Rng
    stall_s: float = STALL_S
    body_s: float = BODY_S
    prompt_log: PromptNotes | None = None
    feedbacks: Feedbacks = field(default_factory=Feedbacks)
