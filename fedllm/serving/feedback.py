"""``POST /v1/feedback``: an app says whether an answer was good, and the version that gave it is credited.

Which version answered which id is remembered for a while, for each tenant on its own: only who got an answer may rate
it, an id of somebody else's looks like one that never was, and a busy tenant pushes out nobody's answers but its own.
Where so many tenants are busy that all their answers are too many, whoever has the most loses its oldest.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from fedllm.errors import AnswerUnknown, RequestInvalid
from fedllm.ids import Digest
from fedllm.serving.access import Ticket
from fedllm.serving.records import RequestRecord

ANSWERS_KEPT = 4096
"""Answers of one tenant that can be rated; the oldest is forgotten first."""
MOST_ANSWERS = 1 << 17
"""Answers of all tenants together; about 60 MB."""
MAX_ID_CHARS = 128


@dataclass(frozen=True)
class Feedback:
    """One rating.

    Parameters
    ----------
    id : str
        The answer's id, e.g. ``chatcmpl-...``.
    score : int
        1 (good) or -1.
    """

    id: str
    score: int


class FeedbackObserver(Protocol):
    """Hears of every rating, on the event loop: it returns at once and never raises."""

    def note_feedback(self, version: Digest, alias: str, good: bool, *, changed: bool = False) -> None:
        """Take one rating in; `changed`: the answer was rated the other way before."""


def read_feedback(body: object) -> Feedback:
    """Read the body of ``POST /v1/feedback``; raise `RequestInvalid` naming the field.

    A field that is not known is refused, not ignored: who sends a comment must not believe that it is read.
    """
    if not isinstance(body, dict):
        raise RequestInvalid("the body must be a JSON object")
    fields: Mapping[str, Any] = body
    answer, score = fields.get("id"), fields.get("score")
    if not isinstance(answer, str) or not 1 <= len(answer) <= MAX_ID_CHARS:
        raise RequestInvalid(f"id must be the text of an answer's id, up to {MAX_ID_CHARS} characters")
    if type(score) is not int or score not in (1, -1):
        raise RequestInvalid("score must be 1 or -1")
    if len(fields) > 2:
        raise RequestInvalid(f"feedback has id and score only, {len(fields) - 2} fields more were given")
    return Feedback(answer, score)


@dataclass(slots=True)
class _Answer:
    version: Digest
    alias: str
    score: int = 0


class Feedbacks:
    """Remembers answers and takes their ratings; a `RequestObserver`.

    Parameters
    ----------
    observer : FeedbackObserver, optional
        Whom to tell, e.g. a `fedllm.serving.report.Reporter`.
    kept : int
        Answers remembered for each tenant.
    most : int
        Answers remembered for all of them.
    """

    def __init__(
        self, observer: FeedbackObserver | None = None, *, kept: int = ANSWERS_KEPT, most: int = MOST_ANSWERS
    ) -> None:
        self._observer = observer
        self._kept = kept
        self._most = most
        self._count = 0
        self._answers: dict[str, OrderedDict[str, _Answer]] = {}

    def observe(self, record: RequestRecord) -> None:
        """Remember who was answered by which version; a request without an answer is nothing to rate."""
        if not record.id or not record.tenant or record.version is None:
            return
        mine = self._answers.setdefault(record.tenant, OrderedDict())
        self._count += record.id not in mine
        mine[record.id] = _Answer(record.version, record.alias.partition("@")[0])
        if len(mine) > self._kept:
            self._forget(mine)
        if self._count > self._most:
            self._forget(max(self._answers.values(), key=len))

    def _forget(self, answers: OrderedDict[str, _Answer]) -> None:
        answers.popitem(last=False)
        self._count -= 1

    def rate(self, tenant: str, answer_id: str, score: int) -> tuple[Digest, str]:
        """Rate an answer; rating it again the same way counts once, the other way corrects the count.

        Returns
        -------
        tuple of Digest and str
            The version that answered, and the alias it was asked by.

        Raises
        ------
        AnswerUnknown
            If this tenant got no such answer, or it was too long ago.
        """
        mine = self._answers.get(tenant)
        found = None if mine is None else mine.get(answer_id)
        if found is None:
            raise AnswerUnknown(
                f"no answer of this id is remembered here; at most the last {self._kept} of a tenant are"
            )
        if found.score != score:
            changed, found.score = found.score != 0, score
            if self._observer is not None:
                self._observer.note_feedback(found.version, found.alias, score > 0, changed=changed)
        return found.version, found.alias


def feedback_body(feedbacks: Feedbacks, ticket: Ticket, rated: Feedback) -> dict[str, Any]:
    """Take a rating in and return the answer's body; raise `AnswerUnknown` if it is of no answer of this tenant."""
    # What a router's tenant was answered is the router's affair; one of the same name here is somebody else.
    tenant = "" if ticket.caller.delegated else ticket.caller.tenant.name
    version, alias = feedbacks.rate(tenant, rated.id, rated.score)
    return {"object": "feedback", "id": rated.id, "score": rated.score, "model": alias, "system_fingerprint": version}
