"""Prompts and answers of tenants who opted in, redacted, in a file per tenant and day; off unless there is a folder.

Redaction is a table of patterns and checksums: it finds what has a form. Names, addresses and stories have none, so the
logs are private text all the same: mode 0600, and deleted after each tenant's days. Text waits in memory for one
thread, which redacts and appends; a request neither waits for it nor fails by it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime
from ipaddress import IPv6Address
from pathlib import Path

from fedllm.clock import Clock, iso_utc
from fedllm.ids import check_name
from fedllm.serving.tenants import Tenant
from fedllm.telemetry import event

HELD_CHARACTERS = 1 << 24
"""Text that waits to be written at most; more is not logged, which is counted."""
DAY_S = 86_400
_LOG = logging.getLogger("fedllm.serving.prompt_log")
_DAYS = "retention-days"
_UNSAID_DAYS = 30


@dataclass(frozen=True)
class Rule:
    """One kind of private data.

    Every pattern takes time linear in the text: runs are possessive and begin only where no longer one does, everything
    else has a bound. What may be found within something that fails its check is looked for by lookahead, in group 1.

    Parameters
    ----------
    kind : str
        Stands in the text's place, in brackets.
    pattern : re.Pattern
    length : callable
        Characters of a candidate that are the thing; 0: it is none.
    """

    kind: str
    pattern: re.Pattern[str]
    length: Callable[[str], int] = len


def luhn(text: str) -> int:
    """Return the length of a card number with a good check digit (ISO/IEC 7812-1), else 0."""
    digits = [int(c) for c in text if c.isdigit()]
    doubled = [d if i % 2 == 0 else d * 2 - 9 * (d > 4) for i, d in enumerate(reversed(digits))]
    return len(text) if 13 <= len(digits) <= 19 and any(digits) and sum(doubled) % 10 == 0 else 0


def iban(text: str) -> int:
    """Return how much of a candidate is an IBAN (ISO 13616, mod 97): words behind it may look like its end."""
    head = int("".join(str(int(c, 36)) for c in text[:4]))
    left, count, end = 0, 4, 0
    for at, char in enumerate(text[4:], start=4):
        if char.isalnum():
            value = int(char, 36)
            left, count = (left * (100 if value > 9 else 10) + value) % 97, count + 1
            last = at + 1 == len(text) or not text[at + 1].isalnum()
            if last and 15 <= count <= 34 and (left * 10**6 + head) % 97 == 1:
                end = at + 1
    return end


def phone(text: str) -> int:
    """Return the length of a number with as many digits as phone numbers have (ITU-T E.164, and 00), else 0."""
    return len(text) if 9 <= sum(c.isdigit() for c in text) <= 17 else 0


def ipv6(text: str) -> int:
    """Return how much of a candidate is an IPv6 address; a sentence's end is none of it."""
    for end in (len(text), len(text.rstrip(".")), len(text.rstrip(".:"))):
        try:
            if 2 < end <= 45 and IPv6Address(text[:end]):
                return end
        except ValueError:
            continue
    return 0


_OCTET = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"
RULES = (
    Rule("email", re.compile(r"(?<![\w.%+'-])[\w.%+'-]++@[\w-]++(?:\.[\w-]++)++")),
    Rule("key", re.compile(r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----[A-Za-z0-9+/=\s]*+")),
    Rule("key", re.compile(r"(?<!\w)(?:bearer|basic)[ \t]{1,8}[\w.~+/=-]{8,}+", re.IGNORECASE)),
    Rule("key", re.compile(r"(?<![\w-])(?:fedllm-|sk-|[prs]k_|gh[a-z]_|github_pat_|glpat-|hf_|xox[a-z]-)[\w-]{16,}+")),
    Rule("key", re.compile(r"(?<![\w-])(?:(?:AKIA|ASIA)[0-9A-Z]{16}|AIza[\w-]{35})(?![\w-])")),
    Rule("key", re.compile(r"(?<![\w.-])eyJ[\w-]++\.[\w-]++(?:\.[\w-]*+)?")),
    Rule(
        "key",
        re.compile(
            r"(?<![A-Za-z0-9])(?:(?:api|access|secret|private)[_-]?key|(?:client[_-]?)?secret|(?:auth[_-]?)?token|passw(?:or)?d)"
            r"[\"']?\s{0,3}[:=]\s{0,3}[\"']?([^\s\"',;]{8,}+)",
            re.IGNORECASE,
        ),
    ),
    Rule(
        "iban",
        re.compile(r"(?<![^\W_])(?=([A-Z]{2}\d{2}(?:[ -]?[A-Z0-9]){11,30})(?![A-Z0-9]))", re.IGNORECASE | re.ASCII),
        iban,
    ),
    Rule("card", re.compile(r"(?<!\d)(?=([2-6]\d{12,18})(?!\d))"), luhn),
    Rule("card", re.compile(r"(?<!\d)(?=([2-6]\d{3}([ -])\d{4}\2\d{4}\2\d{4}(?:\2\d{1,3})?)(?!\d))"), luhn),
    Rule("card", re.compile(r"(?<!\d)(?=([2-6]\d{3}([ -])\d{4}\2\d{4}\2\d{4})(?!\d))"), luhn),
    Rule("card", re.compile(r"(?<!\d)(?=(3\d{3}([ -])\d{6}\2\d{4,5})(?!\d))"), luhn),
    Rule("phone", re.compile(r"(?<![\w+])(?=((?:\+|00)[1-9](?:[ ()./-]{0,2}\d){7,14})(?!\d))"), phone),
    Rule("phone", re.compile(r"(?<![\w.-])(?=((?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4})(?![\d-]))"), phone),
    Rule(
        "phone",
        re.compile(r"(?<![\w.,/-])(?=(\(?0[1-9]\d{0,4}\)?[ /-]{0,3}\d{2,11}(?:[ -]\d{2,8}){0,4})(?!\d))"),
        phone,
    ),
    Rule("ip", re.compile(rf"(?<![\w.])(?:{_OCTET}\.){{3}}{_OCTET}(?![\w]|\.\d)")),
    Rule("ip", re.compile(r"(?<![\w:.])(?=[0-9A-Fa-f]{0,4}:)[0-9A-Fa-f:.]{3,}+(?!\w)"), ipv6),
)  # fmt: skip
"""What is redacted, and how it is known."""


def redact(text: str) -> str:
    """Return the text with everything that the rules find replaced by its kind, as in ``[email]``.

    All rules read the original text; of two that overlap, the one that begins first names the whole. Takes time linear
    in the text, whatever the text is.
    """
    found = []
    for rule in RULES:
        for match in rule.pattern.finditer(text):
            group = 1 if match.re.groups else 0
            begin = match.start(group)
            if length := rule.length(match[group]):
                found.append((begin, begin + length, rule.kind))
    parts, done = [], 0
    for begin, end, kind in sorted(found, key=lambda span: (span[0], -span[1])):
        if begin >= done:
            parts += [text[done:begin], f"[{kind}]"]
        done = max(done, end)
    return "".join(parts) + text[done:]


class PromptLog:
    """The logs of one endpoint or router.

    Parameters
    ----------
    folder : Path
        Has a folder for each tenant, with a file ``2026-11-21.jsonl`` for each day, UTC, and the days they are kept.
    clock : Clock

    Attributes
    ----------
    failed : int
        Notes that could not be written.
    skipped : int
        Notes that came while too much waited.
    """

    def __init__(self, folder: Path, clock: Clock) -> None:
        self.failed = self.skipped = 0
        self._folder = folder
        self._clock = clock
        self._held = 0
        self._notes: deque[tuple[Tenant, float, str, str, str]] = deque()
        self._changed = threading.Condition()
        self._ending = False
        self.expire()
        self._expired_on = self._today()
        self._thread = threading.Thread(target=self._write, name="fedllm-prompt-log", daemon=True)
        self._thread.start()

    def note(self, tenant: Tenant, record_id: str, asked: str, answered: str) -> None:
        """Log one request if its tenant opted in; returns at once and never raises."""
        if not tenant.log_prompts:
            return
        size = len(asked) + len(answered)
        with self._changed:
            if self._ending or self._held + size > HELD_CHARACTERS:
                self.skipped += 1
                return
            self._held += size
            self._notes.append((tenant, self._clock.now(), record_id, asked, answered))
            self._changed.notify()

    def expire(self, tenants: Iterable[Tenant] = ()) -> None:
        """Delete the files that are older than their tenant's days; never raises.

        Parameters
        ----------
        tenants : iterable of Tenant
            The tenants as they are now. Of one who is not among them the days that were said last count.
        """
        said = {tenant.name: tenant.retention_days for tenant in tenants}
        today = self._today()
        for path in sorted(self._folder.glob("*/????-??-??.jsonl")):
            try:
                days = said.get(path.parent.name, _days_kept(path.parent))
                if (today - date.fromisoformat(path.stem)).days > days:
                    path.unlink(missing_ok=True)
            except (OSError, ValueError) as error:
                self._fail(error)

    async def run(self, tenants: Callable[[], Iterable[Tenant]]) -> None:
        """Delete what is too old now and once a day, until cancelled.

        Parameters
        ----------
        tenants : callable
            Returns the tenants as they are by then.
        """
        while True:
            await asyncio.to_thread(self.expire, list(tenants()))
            await self._clock.sleep(DAY_S - self._clock.now() % DAY_S)

    async def close(self) -> None:
        """Write what waits, then end."""
        with self._changed:
            self._ending = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join)

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._notes or self._ending)
                if not self._notes:
                    return
                tenant, now, record_id, asked, answered = self._notes.popleft()
            try:
                self._append(tenant, now, record_id, asked, answered)
            except Exception as error:  # noqa: BLE001 - whatever goes wrong here, requests are served
                self._fail(error)
            with self._changed:
                self._held -= len(asked) + len(answered)
            if self._today() != self._expired_on:
                self._expired_on = self._today()
                self.expire([tenant])

    def _append(self, tenant: Tenant, now: float, record_id: str, asked: str, answered: str) -> None:
        folder = self._folder / check_name(tenant.name, what="tenant")
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if _days_kept(folder, default=-1) != tenant.retention_days:
            (folder / _DAYS).write_text(f"{tenant.retention_days}\n", encoding="ascii")
        line = {"time": iso_utc(now), "id": record_id, "asked": redact(asked), "answered": redact(answered)}
        path = folder / f"{_day(now).isoformat()}.jsonl"
        # A link that somebody else laid here would take the text to where it leads.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(path, flags, 0o600), "ab") as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(json.dumps(line).encode() + b"\n")

    def _today(self) -> date:
        return _day(self._clock.now())

    def _fail(self, error: Exception) -> None:
        self.failed += 1
        event(_LOG, "prompt log failed", level=logging.ERROR, kind=type(error).__name__, failed=self.failed)


def _day(seconds: float) -> date:
    return datetime.fromtimestamp(seconds, tz=UTC).date()


def _days_kept(folder: Path, *, default: int = _UNSAID_DAYS) -> int:
    try:
        return int((folder / _DAYS).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return default
