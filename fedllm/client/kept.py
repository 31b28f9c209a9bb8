"""What an owner keeps on its own disk while a round is under way: the trained update, and what it answered once.

A daemon that is killed after training takes part in the next attempt at the sum without training, and without
paying, again. What it answered before it was killed stays answered: a second answer to the same step, or a second
masking of an update that it helped to open, would let the coordinator subtract.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from fedllm import telemetry, wire
from fedllm.adapter import F32
from fedllm.client.records import append, unwritable
from fedllm.errors import FedllmError, IntegrityError, TwoViews
from fedllm.ids import Digest
from fedllm.messages.plan import SignedPlan

_LOG = logging.getLogger(__name__)
UPDATE_FILE = "update.npz"
ANSWERS_FILE = "answers.jsonl"
_UNMASK = "unmask"


@dataclass(frozen=True)
class LocalUpdate:
    """What training left behind; never crosses the line unmasked.

    Attributes
    ----------
    update : F32
        Local minus global in the method's factors, shape ``(layout_size,)``; noised already under DP-SGD.
    records : int
        Training records held.
    mean_loss : float or None
        None under DP.
    train_s : float
        Wall seconds of training.
    """

    update: F32 = field(repr=False)
    records: int
    mean_loss: float | None
    train_s: float


@dataclass(frozen=True)
class Kept:
    """A round that has been trained: the plan it was trained for, the head it started from, and the update."""

    plan: SignedPlan
    head: bytes = field(repr=False)
    local: LocalUpdate


class UpdateStore:
    """One trained update at a time, on disk until its round is over.

    Parameters
    ----------
    path : Path
        Mode 0600, in the owner's folder, which no relay process can read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def save(self, kept: Kept) -> None:
        """Write it whole and durably, or not at all; raise `DiskFull` or `IntegrityError` if that is impossible."""
        draft = self._path.with_suffix(".tmp")
        local = kept.local
        facts = {"records": local.records, "mean_loss": local.mean_loss, "train_s": local.train_s}
        try:
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                np.savez(
                    file, update=local.update, facts=np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8),
                    head=np.frombuffer(kept.head, dtype=np.uint8),
                    plan=np.frombuffer(wire.encode(kept.plan), dtype=np.uint8),
                )  # fmt: skip
                file.flush()
                os.fsync(file.fileno())
            draft.replace(self._path)
        except OSError as error:
            draft.unlink(missing_ok=True)
            raise unwritable(self._path, error) from None

    def load(self) -> Kept | None:
        """Return what was kept, None if there is nothing; what cannot be read is removed and said in the log."""
        if not self._path.exists():
            return None
        try:
            with self._path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                facts = json.loads(arrays["facts"].tobytes())
                local = LocalUpdate(
                    arrays["update"].astype(np.float32), int(facts["records"]), facts["mean_loss"],
                    float(facts["train_s"]),
                )  # fmt: skip
                return Kept(wire.decode(SignedPlan, arrays["plan"].tobytes()), arrays["head"].tobytes(), local)
        except (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, BadZipFile, FedllmError) as error:
            # without it this owner sits the round out, which loses nothing but the round
            telemetry.event(_LOG, "kept update is damaged", level=logging.WARNING, error=type(error).__name__)
            self.forget()
            return None

    def forget(self) -> None:
        """Remove it."""
        self._path.unlink(missing_ok=True)
        self._path.with_suffix(".tmp").unlink(missing_ok=True)


class Answers:
    """The steps of this round's sums that are answered once, durable before the answer leaves.

    Parameters
    ----------
    path : Path

    Attributes
    ----------
    unmasked : bool
        Whether this owner has helped to open a sum of this round, of either purpose.

    Raises
    ------
    IntegrityError
        If the file is there and is not what this class wrote.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[tuple[str, str], str] = {}
        self.unmasked = False
        if path.exists():
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if whole != data:  # cut off by a crash before its answer could leave
                os.truncate(path, len(whole))
            try:
                for line in whole.decode().splitlines():
                    self._learn(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise IntegrityError(
                    f"{path} is damaged", hint="restore it, or remove it once the round under way has ended"
                ) from None

    def once(self, purpose: str, ctx: bytes, step: str, asked: Digest) -> None:
        """Record what a step of a sum was asked; the same again changes nothing.

        Raises
        ------
        TwoViews
            If it was asked something else before.
        DiskFull, IntegrityError
            If it cannot be made durable: then nothing may be answered.
        """
        known = self._known.get((ctx.hex(), step))
        if known == asked:
            return
        if known is not None:
            raise TwoViews(
                f"{step} of this sum was answered before this daemon started, for another question",
                hint="an owner that restarts in mid-attempt is out of that attempt; plan another one",
            )
        entry = {"purpose": purpose, "sum": ctx.hex(), "step": step, "asked": asked}
        append(self._path, entry, durable=True)
        self._learn(entry)

    def clear(self) -> None:
        """Begin a new round: no step of the one before can be asked any more, its number was accepted."""
        self._path.unlink(missing_ok=True)
        self._known.clear()
        self.unmasked = False

    def _learn(self, entry: dict[str, Any]) -> None:
        self._known[str(entry["sum"]), str(entry["step"])] = str(entry["asked"])
        if entry["step"] == _UNMASK:
            self.unmasked = True
