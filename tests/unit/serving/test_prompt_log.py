"""Prompt logs: only who opted in, redacted before it is written, deleted in time, never in a request's way."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.clock import FakeClock
from fedllm.serving import prompt_log as module
from fedllm.serving.prompt_log import DAY_S, PromptLog, iban, luhn, redact
from fedllm.serving.tenants import Tenant

NOON = datetime(2026, 11, 21, 12, tzinfo=UTC).timestamp()
ACME = Tenant("acme", log_prompts=True, retention_days=2)


@contextmanager
def opened(folder: Path, clock: FakeClock) -> Iterator[PromptLog]:
    """Open a log; at the end everything is written."""
    log = PromptLog(folder, clock)
    try:
        yield log
    finally:
        asyncio.run(log.close())


def kept(folder: Path) -> list[str]:
    """Return the log files there are."""
    return sorted(str(path.relative_to(folder)) for path in folder.glob("*/*.jsonl"))


SECRET_LINES = [
    ("mail bob.o'neil+x@mail.ex-ample.co.uk.", "mail [email]."),
    ("<ann_b@example.org>; müller@bücher.example", "<[email]>; [email]"),
    ("not one: a@b, @property, x @ y.z", "not one: a@b, @property, x @ y.z"),
    ("call +49 (0)30 1234-5678, or +1-202-555-0143!", "call [phone], or [phone]!"),
    ("0030 210 1234567 / 030 1234567 / 0171 23456789", "[phone] / [phone] / [phone]"),
    ("(555) 123-4567 or 555.123.4567 or 01 23 45 67 89", "[phone] or [phone] or [phone]"),
    ("on 2026-11-21, 01-02-2026, 03/11/2026 at 12:30:45", "on 2026-11-21, 01-02-2026, 03/11/2026 at 12:30:45"),
    ("12 4111 1111 1111 1111 and 4111111111111111.", "12 [card] and [card]."),
    ("3782 822463 10005, 3056-930902-5904, 6304 0000 0000 0000 00", "[card], [card], [card]"),
    ("4111 1111 1111 1112 and 1234567890123456", "4111 1111 1111 1112 and 1234567890123456"),
    ("DE89 3704 0044 0532 0130 00 and so on", "[iban] and so on"),
    ("gb82west12345698765432; NO93 8601 1117 947", "[iban]; [iban]"),
    ("GB82 WEST 1234 5698 7654 33", "GB82 WEST 1234 5698 7654 33"),
    ("authorization: Bearer abc.DEF-123_456~x", "authorization: [key]"),
    ("key fedllm-" + "a" * 43 + ", sk-proj-" + "B" * 20, "key [key], [key]"),
    ("ghp_" + "a" * 36 + " AKIAIOSFODNN7EXAMPLE hf_" + "c" * 30, "[key] [key] [key]"),
    ("eyJhbGciOiJI.eyJzdWIiOiIx.c2ln-x next", "[key] next"),
    ('{"api_key": "abcd1234efgh"} password=hunter22', '{"api_key": "[key]"} password=[key]'),
    ("secret: short", "secret: short"),
    ("-----BEGIN RSA PRIVATE KEY-----\nMIIabc\ndef==\n-----END", "[key]-----END"),
    ("10.0.0.1 and 192.168.1.255. 256.1.1.1, v1.2.3, 1.2.3.4.5", "[ip] and [ip]. 256.1.1.1, v1.2.3, 1.2.3.4.5"),
    ("fe80::1, 2001:db8::ff00:42:8329. [::1]:80", "[ip], [ip]. [[ip]]:80"),
    ("::ffff:10.1.2.3 but std::vector, 12:30 and ::", "[ip] but std::vector, 12:30 and ::"),
    ("ask x@y.example from 10.0.0.1", "ask [email] from [ip]"),
    ("plain words, 42 of them, cost 12,345.67", "plain words, 42 of them, cost 12,345.67"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), SECRET_LINES, ids=[text[:20] for text, _ in SECRET_LINES])
def test_known_answers(text: str, expected: str) -> None:
    """What is private by its form goes, what only looks like it stays."""
    assert redact(text) == expected


@given(st.text(), st.text(), st.sampled_from(["ann@example.org", "4111 1111 1111 1111", "10.0.0.1"]))
def test_what_surrounds_it_hides_nothing(before: str, after: str, secret: str) -> None:
    """Whatever stands before and behind it, it is found."""
    assert secret not in redact(f"{before} ; {secret} ; {after}")


def test_checksums_have_their_standards_examples() -> None:
    """Luhn and mod 97 as they are published; every wrong digit is found by both."""
    assert luhn("79927398713") == 0, "eleven digits are no card"
    assert luhn("4012888888881881") == 16
    good = "DE89370400440532013000"
    assert iban(good) == len(good)
    for at in range(len(good)):
        if good[at].isdigit():
            for digit in set("0123456789") - {good[at]}:
                assert iban(good[:at] + digit + good[at + 1 :]) == 0
    card = "4111111111111111"
    for at in range(16):
        for digit in set("0123456789") - {card[at]}:
            assert luhn(card[:at] + digit + card[at + 1 :]) == 0


HOSTILE = [
    "a", "@", "a@", "a.", "a@a.", "1", "4", "4 ", "4111 ", "+1 ", "0", "01 ", "(0", "12-", "sk-", "eyJ", "eyJ.",
    "bearer ", "token:", "password= ", "AB12", "AB12 ", "::", "f:", "1.", "-----BEGIN ", "-----BEGIN PRIVATE KEY-----A",
    " ",
]  # fmt: skip


@pytest.mark.timeout(120)
@pytest.mark.parametrize("piece", HOSTILE)
def test_hostile_text_takes_linear_time(piece: str) -> None:
    """100,000 characters that almost match everywhere: a quadratic pattern would take minutes, and time out."""
    length = 100_000
    text = (piece * length)[:length]
    assert len(redact(text)) <= 2 * length


def test_nothing_is_written_for_who_did_not_opt_in(tmp_path: Path) -> None:
    """The default is off: no file, no folder."""
    with opened(tmp_path / "log", FakeClock(NOON)) as log:
        log.note(Tenant("acme"), "cmpl-1", "asked", "answered")
    assert not (tmp_path / "log").exists()


def test_a_note_is_one_redacted_line_in_the_tenants_file_of_the_day(tmp_path: Path) -> None:
    """Time, id, both texts; mode 0600 below 0700, whatever the mask; another tenant and day, another file."""
    clock, before = FakeClock(NOON), os.umask(0)
    try:
        with opened(tmp_path, clock) as log:
            log.note(ACME, "cmpl-1", "I am ann@example.org\nü", "call 10.0.0.1")
            log.note(ACME, "cmpl-2", "two", "2")
            log.note(Tenant("rival", log_prompts=True), "cmpl-3", "three", "3")
            clock.advance(DAY_S)
            log.note(ACME, "cmpl-4", "four", "4")
    finally:
        os.umask(before)
    assert kept(tmp_path) == ["acme/2026-11-21.jsonl", "acme/2026-11-22.jsonl", "rival/2026-11-21.jsonl"]
    first, second = (tmp_path / "acme/2026-11-21.jsonl").read_text().splitlines()
    assert json.loads(first) == {
        "time": "2026-11-21T12:00:00Z", "id": "cmpl-1", "asked": "I am [email]\nü", "answered": "call [ip]",
    }  # fmt: skip
    assert json.loads(second)["id"] == "cmpl-2"
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in kept(tmp_path)}
    assert modes == {0o600}
    assert stat.S_IMODE((tmp_path / "acme").stat().st_mode) == 0o700


def test_days_that_are_over_are_deleted(tmp_path: Path) -> None:
    """At start, with the days that were said last; on the first note of a day; each tenant by its own number."""
    clock, patient = FakeClock(NOON), Tenant("patient", log_prompts=True, retention_days=10)
    with opened(tmp_path, clock) as log:
        for tenant in (ACME, patient):
            log.note(tenant, "x", "", "")
    clock.advance(2 * DAY_S)
    with opened(tmp_path, clock) as log:
        assert kept(tmp_path) == ["acme/2026-11-21.jsonl", "patient/2026-11-21.jsonl"]
        clock.advance(DAY_S)
        log.note(ACME, "y", "", "")
    assert kept(tmp_path) == ["acme/2026-11-24.jsonl", "patient/2026-11-21.jsonl"]
    clock.advance(8 * DAY_S)
    with opened(tmp_path, clock):
        assert kept(tmp_path) == []


def test_every_day_the_tenants_as_they_are_then_count(tmp_path: Path) -> None:
    """The daily look is at midnight UTC; fewer days, said in the tenants file, delete what is there already."""
    clock, tenants = FakeClock(NOON), [ACME]
    with opened(tmp_path, clock) as log:
        log.note(ACME, "x", "", "")

    class Once(FakeClock):
        async def sleep(self, seconds: float) -> None:
            await super().sleep(seconds)
            looks.append(self.now())
            if len(looks) == 1:
                assert kept(tmp_path) == ["acme/2026-11-21.jsonl"]
                tenants[:] = [Tenant("acme", retention_days=0)]
            else:
                raise asyncio.CancelledError

    looks: list[float] = []
    with opened(tmp_path, Once(NOON)) as log, pytest.raises(asyncio.CancelledError):
        asyncio.run(log.run(lambda: tenants))
    assert looks == [NOON + DAY_S / 2, NOON + 1.5 * DAY_S]
    assert kept(tmp_path) == []


def test_foreign_files_stay(tmp_path: Path) -> None:
    """What is not a day's log is not deleted, whatever its age."""
    folder = tmp_path / "acme"
    folder.mkdir()
    for name in ("notes.jsonl", "2020-13-99.jsonl", "2020-01-01.txt"):
        (folder / name).touch()
    with opened(tmp_path, FakeClock(NOON)) as log:
        assert log.failed == 1
    assert len(list(folder.iterdir())) == 3


def test_failures_are_counted_and_logged_without_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A folder that is a file, a link laid where the log goes, a name that leads elsewhere: nothing raises, no text."""
    blocked = tmp_path / "file"
    blocked.touch()
    target = tmp_path / "target"
    (tmp_path / "log/acme").mkdir(parents=True)
    (tmp_path / "log/acme/2026-11-21.jsonl").symlink_to(target)
    with caplog.at_level(logging.ERROR), opened(blocked, FakeClock(NOON)) as first:
        first.note(ACME, "x", "zanzibar", "quinquereme")
    with caplog.at_level(logging.ERROR), opened(tmp_path / "log", FakeClock(NOON)) as second:
        second.note(ACME, "x", "zanzibar", "quinquereme")
        second.note(Tenant("../up", log_prompts=True), "x", "zanzibar", "quinquereme")
    assert (first.failed, second.failed) == (1, 2)
    assert not target.exists()
    assert not (tmp_path / "up").exists()
    assert len(caplog.records) == 3
    assert all("zanzibar" not in str(vars(r)) and "quinquereme" not in str(vars(r)) for r in caplog.records)


def test_too_much_waiting_text_is_skipped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the disk stands still requests go on; memory is bounded; what was taken in is written in the end."""
    monkeypatch.setattr(module, "HELD_CHARACTERS", 100)
    gate, written = threading.Event(), module.redact
    monkeypatch.setattr(module, "redact", lambda text: gate.wait() and written(text))
    with opened(tmp_path, FakeClock(NOON)) as log:
        for _ in range(5):
            log.note(ACME, "x", "a" * 40, "")
        assert log.skipped == 3
        gate.set()
    assert len((tmp_path / "acme/2026-11-21.jsonl").read_text().splitlines()) == 2
    log.note(ACME, "x", "late", "")
    assert log.skipped == 4
