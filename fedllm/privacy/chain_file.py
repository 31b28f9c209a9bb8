"""The file that a chain of signed lines is kept in: locked, synced, repaired after a crash.

Kill -9 may strike between any two system calls, in a repair as well. A line cut short is copied to a file of its own
before it is cut off, and every such copy is reported in the chain, by the next process if not by this one.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedllm.clock import Clock, iso_utc
from fedllm.errors import LedgerCorrupt, NotFound
from fedllm.identity import SigningIdentity, VerifyKey
from fedllm.ids import sha256
from fedllm.privacy import chain
from fedllm.privacy.chain import Entry

Line = tuple[str, dict[str, Any]]
"""Kind and fields of a line to be written."""


class ChainFile:
    """Signed lines that were read and verified once, and any that another process added since.

    Parameters
    ----------
    path : Path
    key : VerifyKey
        The owner's public key.
    identity, clock : optional
        Without them the file can be read only.

    Attributes
    ----------
    entries : tuple[Entry, ...]
        What was read or written last, oldest first.
    """

    def __init__(self, path: Path, key: VerifyKey, identity: SigningIdentity | None, clock: Clock | None) -> None:
        self.path = path
        self.entries: tuple[Entry, ...] = ()
        self._key = key
        self._identity = identity
        self._clock = clock
        self._verified = b""

    def verify(self) -> None:
        """Read the file again and check every line; raise `LedgerCorrupt` naming the first that is wrong."""
        if not self.path.is_file():
            raise self._missing()
        with self.path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            torn = self._learn(file.read())
        if torn:
            raise LedgerCorrupt(
                f"ledger line {len(self.entries) + 1} was cut short by a crash ({len(torn)} bytes)",
                hint="start the daemon: it sets the line aside, charges what can be read of it and says so",
            )

    @contextmanager
    def locked(self, *, create: bool = False) -> Iterator[int]:
        """Hold the file alone, with what is in it now read and verified and a torn end repaired.

        Yields
        ------
        int
            The descriptor to `append` to.
        """
        self._writer()
        flags = os.O_RDWR | os.O_APPEND | (os.O_CREAT if create else 0)
        try:
            descriptor = os.open(self.path, flags, 0o600)
        except FileNotFoundError:
            raise self._missing() from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            data = self.path.read_bytes()
            if data != self._verified or not data:  # every line is verified, but the same bytes only once
                torn = self._learn(data)
                if torn:
                    self._set_aside(descriptor, torn)
                self._report_torn(descriptor)
            yield descriptor
        finally:
            os.close(descriptor)  # and with it the lock

    def append(self, descriptor: int, *lines: Line) -> None:
        """Write lines at once; they are on disk, file and folder, before this returns."""
        identity, clock = self._writer()
        added: list[Entry] = []
        data = b""
        previous = self.entries[-1].digest if self.entries else chain.GENESIS
        for kind, fields in lines:
            line = chain.write_line(identity, previous, iso_utc(clock.now()), kind, fields)
            added.append(chain.read_line(line.rstrip(b"\n"), len(self.entries) + len(added) + 1))
            previous = added[-1].digest
            data += line
        _write(descriptor, data)
        self._sync_folder()
        self.entries = (*self.entries, *added)
        self._verified += data

    def _writer(self) -> tuple[SigningIdentity, Clock]:
        if self._identity is None or self._clock is None:
            raise TypeError("this ledger was opened for reading")
        return self._identity, self._clock

    def _learn(self, data: bytes) -> bytes:
        """Verify what is in the file and return what follows its last whole line."""
        self._verified = b""
        whole, torn = chain.split(data)
        self.entries = chain.verify(whole, self._key)
        self._verified = data[: len(data) - len(torn)]
        return torn

    def _set_aside(self, descriptor: int, torn: bytes) -> None:
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.torn-{number}")).exists():
            number += 1
        copy = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            _write(copy, torn)
        finally:
            os.close(copy)
        self._sync_folder()  # the copy is there to stay before the original goes
        os.ftruncate(descriptor, len(self._verified))

    def _report_torn(self, descriptor: int) -> None:
        """Report every line that was set aside and is in no report yet, and charge what can be read of it."""
        if not self.entries:
            return  # the very first line never became durable: nothing was promised yet
        reported = {entry.fields["file"] for entry in self.entries if entry.kind == "torn"}
        for aside in sorted(self.path.parent.glob(f"{self.path.name}.torn-*")):
            if aside.name in reported:
                continue
            torn = aside.read_bytes()
            report: Line = ("torn", {"file": aside.name, "sha256": sha256(torn), "line": len(self.entries) + 1})
            charged = [entry.fields["plan"] for entry in self.entries if entry.kind == "reserve"]
            fields = chain.salvage(torn)
            if fields is None or fields["plan"] in charged:
                self.append(descriptor, report)
            else:  # the charge first: cut short here, the report is missing and all of it is done again
                self.append(descriptor, ("reserve", {**fields, chain.SALVAGED: aside.name}), report)

    def _sync_folder(self) -> None:
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _missing(self) -> NotFound:
        return NotFound(f"no ledger at {self.path}", hint="the daemon begins it when it first starts")


def _write(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)
