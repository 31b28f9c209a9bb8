"""One answer to each step: what makes a repeated request harmless and a second view of the sum impossible."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

from fedllm import wire
from fedllm.errors import StepMismatch, TwoViews
from fedllm.ids import Digest, OwnerId, sha256
from fedllm.messages.secagg import ShareDelivery, UnmaskRequest

T = TypeVar("T")
STEPS = ("advertise", "share_keys", "mask", "confirm", "unmask")
Once = Callable[[bytes, str, Digest], None]
"""Remembers, for good, what a step of a sum was asked: (context, step, digest).

It returns if nothing, or the same, was recorded for that context and step, and raises `TwoViews` otherwise. Steps
recorded are ``advertise`` (the digest of the bundle), ``confirm`` and ``unmask`` (of what was asked).
"""


@dataclass(frozen=True)
class Asked:
    """What a step was asked, as it is hashed; `transcript` stands for the list of keys."""

    transcript: bytes = b""
    delivery: ShareDelivery | None = None
    owners: tuple[OwnerId, ...] = ()
    subject: bytes = b""
    request: UnmaskRequest | None = None

    @property
    def digest(self) -> Digest:
        """SHA-256 of the canonical encoding."""
        return sha256(wire.encode(self))


class Steps:
    """The steps of one owner in one sum: each in its turn, each answered once.

    Attributes
    ----------
    asked : dict[str, Digest]
        What each step done was asked.
    """

    def __init__(self) -> None:
        self.asked: dict[str, Digest] = {}
        self._answers: dict[str, object] = {}
        self._closed = False

    def answer(self, step: str, asked: Digest, make: Callable[[], T]) -> T:
        """Make the answer if it is this step's turn, repeat it if the same was asked before, else refuse.

        Raises
        ------
        TwoViews
            If the step was asked before with something else.
        StepMismatch
            If it is out of order, or the sum is closed.
        """
        if self._closed:
            raise StepMismatch(f"{step}: this sum is closed, its secrets are gone")
        if step in self.asked:
            if self.asked[step] != asked:
                raise TwoViews(f"{step} was asked before with something else, and is answered once")
            return cast("T", self._answers[step])
        done = len(self.asked)
        if done >= len(STEPS) or STEPS[done] != step:
            raise StepMismatch(f"{step} is out of order: {STEPS[done] if done < len(STEPS) else 'nothing'} is next")
        made = make()
        self.asked[step], self._answers[step] = asked, made
        return made

    def close(self) -> None:
        """Let go of the answers and refuse every further step."""
        self._closed = True
        self._answers.clear()
