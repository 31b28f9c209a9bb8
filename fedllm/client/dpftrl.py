"""DP-FTRL on one owner's records: which unit is used when, and a stream's state on disk.

No unit is ever sampled. It has one place, a hash of its own content, and is used in every `separation`-th step from
there: adding or removing one moves no other, and no unit is used more often, or sooner again, than
`fedllm.privacy.correlated.sensitivity` assumes. Correlated noise runs on over rounds, so that its state is kept.

Why a stream is never charged for less than it spent. Its one charge covers every row once; two releases of one row
with fresh noise would be two looks at the same gradients, and the ledger's limit on the total number of steps does
not forbid them: half a stream, run twice, has the right number of steps and twice the square of the sensitivity.
So a row is never drawn twice:

1. The rows of a round are *claimed* in an append-only file, synced to disk, before the first gradient is computed.
   A crash, an error or a full disk in mid-round loses them; the next round begins after the last claim.
2. The state is whole on disk before `train_stream` returns, hence before anything of the round can leave.
   Were it later, a crash could send an update and forget it: no row would be released twice, by rule 1, but
   the noise of the following rows would no longer take back that of these.
3. A stream whose state is damaged, or gone while its claims are there, is refused, never begun again. That both are
   gone, or were never made because the first plan was charged and not trained, is seen only from the ledger, which is
   why `train_stream` is told how many steps were charged before. It never continues below that number: a plan is
   trained once, so that no row from there on was ever drawn, whatever became of the folder.

Not covered: a folder put back from an old copy, after a plan that lost rows by a crash took later ones in their
place. The ledger charged that plan once and knows nothing of the later rows. Keep no copies of this folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from fedllm.client.records import append, unwritable
from fedllm.client.trainer import Progress
from fedllm.errors import IntegrityError
from fedllm.ids import sha256
from fedllm.messages.mechanism import Mechanism, Stream
from fedllm.privacy.correlated import CorrelatedSum
from fedllm.rng import Rng

F64 = NDArray[np.float64]
_ANOTHER = "plan a stream of another name, which is charged anew; this one's rows must not be released twice"
_DIGEST_BYTES = 32


def block(stream: Stream, key: bytes) -> int:
    """Return the first step in which a unit is used; the others follow every `separation` steps.

    Parameters
    ----------
    key : bytes
        Of the unit's own content, and nothing else. Equal records have equal keys and the same steps; each is a
        unit of its own.
    """
    name = hashlib.sha256(stream.name.encode()).digest()
    return int.from_bytes(hashlib.sha256(name + key).digest(), "big") % stream.separation


@dataclass(frozen=True)
class StreamState:
    """What a store knows of one stream.

    Attributes
    ----------
    claimed : int
        Rows that may have been drawn, from the first on.
    arrays : dict of str to NDArray
        As `CorrelatedSum.to_arrays` gave them.
    """

    claimed: int
    arrays: dict[str, NDArray[Any]]


class StreamStore:
    """States of streams on the owner's own disk: gradient sums without noise, mode 0600, never sent.

    Parameters
    ----------
    folder : Path
        Made when first needed. A stream has two files there, named by the hash of its name.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def load(self, name: str) -> StreamState | None:
        """Return what is kept of a stream; None if it was never begun here.

        Raises
        ------
        IntegrityError
            If a file of it is damaged, or the state is gone.
        """
        state, claims = self._state(name), self._claims(name)
        if not state.exists() and not claims.exists():
            return None
        try:
            data = state.read_bytes()
            if data[:_DIGEST_BYTES] != hashlib.sha256(data[_DIGEST_BYTES:]).digest():
                raise ValueError("digest")
            with np.load(io.BytesIO(data[_DIGEST_BYTES:]), allow_pickle=False) as arrays:
                found = {key: arrays[key] for key in arrays.files}
            return StreamState(_claimed(claims), found)
        except (OSError, ValueError, KeyError, TypeError, EOFError, RecursionError, BadZipFile):
            raise IntegrityError(f"the state of stream {name!r} at {state} is damaged or gone", hint=_ANOTHER) from None

    def save(self, name: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Replace a stream's state, durably, whole or not at all; raise `DiskFull` or `IntegrityError`."""
        path = self._state(name)
        draft = path.with_suffix(".tmp")
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]  # no array is named allow_pickle
        payload = buffer.getvalue()
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(hashlib.sha256(payload).digest())
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
            folder = os.open(self._folder, os.O_RDONLY)  # else a power cut could undo the rename
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            draft.unlink(missing_ok=True)
            raise unwritable(path, error) from None

    def claim(self, name: str, until: int) -> None:
        """Note, durably, that all rows before `until` may be drawn from now on; raise as `save`."""
        append(self._claims(name), {"until": until}, durable=True)

    def _state(self, name: str) -> Path:
        return self._folder / f"{sha256(name.encode())}.state"

    def _claims(self, name: str) -> Path:
        return self._folder / f"{sha256(name.encode())}.claims"


def _claimed(path: Path) -> int:
    """Return the last row claimed; a line that a crash cut off was never acted on, and is taken away."""
    if not path.exists():
        return 0
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        os.truncate(path, len(whole))
    rows = [json.loads(line)["until"] for line in whole.splitlines()]
    if not all(type(row) is int and row >= 0 for row in rows) or rows != sorted(rows):
        raise ValueError("claims")
    return max(rows, default=0)


def train_stream(
    gradient: Callable[[Sequence[int]], F64],
    keys: Sequence[bytes],
    position: F64,
    *,
    mechanism: Mechanism,
    learning_rate: float,
    declared_records: int,
    store: StreamStore,
    rng: Rng,
    progress: Progress,
    assign: Callable[[F64], None],
    charged: int = 0,
) -> None:
    """Take the stream's next `mechanism.steps` steps, and keep its state.

    Each step is ``position -= learning_rate / C * estimate / (declared_records / separation)``: the divisor is the
    public size of a step's share of the units.

    Parameters
    ----------
    gradient : callable
        Takes indices into `keys` and returns the sum of these units' gradients, each clipped to
        ``C (1 - 2^-10)``, shape ``(dimension,)``; not called for no units, which are noised all the same.
    keys : Sequence[bytes]
        One of each unit, see `block`.
    position : F64
        Where training starts, shape ``(dimension,)``; not changed.
    mechanism : Mechanism
        Of kind ``dp-ftrl``.
    learning_rate : float
    declared_records : int
        The public number of units N.
    store : StreamStore
    rng : Rng
        `OsRng`: it makes the noise.
    progress : Progress
    assign : callable
        Takes each new position. What it was given is not to be used if this function raises.
    charged : int
        Steps of this stream that the ledger reserved for other plans before this one.

    Raises
    ------
    IntegrityError
        If the stream's state is damaged or gone.
    PolicyRefused
        If the stream has too few steps left, or was begun with other numbers.
    ConfigError
        If the noise grid is too coarse, see `CorrelatedSum`.
    DiskFull
        If there is no room for the state.
    """
    stream = mechanism.stream
    if stream is None:
        raise ValueError(f"mechanism {mechanism.kind!r} has no stream")
    machine = _claim_steps(store, stream, mechanism, position.size, charged)
    places: dict[int, list[int]] = {}
    for index, key in enumerate(keys):
        places.setdefault(block(stream, key), []).append(index)
    scale = learning_rate / mechanism.clip_norm / (declared_records / stream.separation)
    for step in range(mechanism.steps):
        units = places.get(machine.taken % stream.separation, [])
        total = gradient(units) if units else np.zeros(position.size)
        position = position - scale * machine.step(total, rng)
        assign(position)
        progress(step + 1, mechanism.steps)
    store.save(stream.name, machine.to_arrays())


def _claim_steps(
    store: StreamStore, stream: Stream, mechanism: Mechanism, dimension: int, charged: int
) -> CorrelatedSum:
    """Return the stream's machine at its next free row, with the rows of this round claimed."""
    state = store.load(stream.name)
    numbers = {"noise_multiplier": mechanism.noise_multiplier, "clip_norm": mechanism.clip_norm}
    if state is not None:
        machine = CorrelatedSum.from_arrays(state.arrays, stream, dimension=dimension, **numbers)
        if machine.taken > state.claimed:
            raise IntegrityError(f"the claims of stream {stream.name!r} are gone", hint=_ANOTHER)
        machine.skip_to(state.claimed)
    else:  # never begun here, or all of it is gone: rows that other plans were charged for are passed over below
        machine = CorrelatedSum(stream, dimension=dimension, **numbers)
    machine.skip_to(charged)
    machine.check_room(mechanism.steps)
    if state is None:  # so that claims without a state tell of a loss, not of a crash in the first round
        store.save(stream.name, machine.to_arrays())
    store.claim(stream.name, machine.taken + mechanism.steps)
    return machine
