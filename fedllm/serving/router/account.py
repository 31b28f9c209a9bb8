"""What one request has used, told to its ticket and to the waiting line as it becomes known."""

from __future__ import annotations

from typing import Any

from fedllm.ids import Digest
from fedllm.serving.fair import OUTPUT_WEIGHT, PROMPT_WEIGHT
from fedllm.serving.router.job import Job
from fedllm.serving.router.waiting import WaitingLine


class Account:
    """Counts one request.

    Parameters
    ----------
    line : WaitingLine
        Charges the tenant.
    job : Job
        Whose ticket makes the record.
    """

    def __init__(self, line: WaitingLine, job: Job) -> None:
        self._line = line
        self._job = job
        self._counted = 0

    def answered(self, replica: str, id: str, digest: Digest | None, *, prompt_tokens: int) -> None:  # noqa: A002
        """Note what answers, as soon as the version is known."""
        if digest is not None:
            ticket, alias = self._job.ticket, self._job.bound.alias
            ticket.bound(id, alias, digest, prompt_tokens=prompt_tokens, replica=replica)

    def tokens(self, count: int) -> None:
        """Note generated tokens."""
        if count > 0:
            self._counted += count
            ticket = self._job.ticket
            ticket.token(count)
            self._line.charge(ticket.caller.tenant.name, OUTPUT_WEIGHT * count)

    def usage(self, replica: str, digest: Digest, body: dict[str, Any]) -> None:
        """Correct what was estimated and counted by what the replica says; nonsense is passed over."""
        usage = body.get("usage")
        if not isinstance(usage, dict):
            return
        job, prompt = self._job, _count(usage, "prompt_tokens")
        self.answered(replica, str(body.get("id")), digest, prompt_tokens=prompt)
        self._line.charge(job.ticket.caller.tenant.name, PROMPT_WEIGHT * max(0, prompt - job.size.prompt))
        self.tokens(_count(usage, "completion_tokens") - self._counted)
        details = usage.get("prompt_tokens_details")
        if isinstance(details, dict):
            job.ticket.cached(min(prompt, _count(details, "cached_tokens")))


def _count(usage: dict[str, Any], name: str) -> int:
    value = usage.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0
