"""What the owners of a round "train": one known update each, in place of training, and the gate on what became of them.

Imported by every process of every system that `benchmarks.round` times, so numpy and the standard library only.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
OWNERS = 4
AMPLITUDE = 0.1
"""Entries of an update are uniform within plus or minus this, as small as those of a trained adapter."""
RECORDS_FILE = "rounds.jsonl"


def update(owner: int, dim: int) -> F32:
    """Return the update of one owner, shape ``(dim,)``; always the same one, a few nanoseconds an entry."""
    made = np.random.default_rng([11, owner]).random(dim, dtype=np.float32)
    made -= np.float32(0.5)
    made *= np.float32(2 * AMPLITUDE)
    return made


def worst_error(model: F32, rounds: int) -> float:
    """Return how far a model is from `rounds` times the mean of all updates, over the model that began as zeros.

    Parameters
    ----------
    model : F32
        Shape ``(dim,)``.

    Returns
    -------
    float
        Largest absolute difference of an entry; NaN if any entry is.
    """
    expected = np.zeros(model.size, dtype=np.float64)
    for owner in range(OWNERS):
        expected += update(owner, model.size)
    expected *= rounds / OWNERS
    return float(np.abs(model - expected).max())


class Recorder:
    """Times rounds and judges each one's model; what it writes is all that a system's figures are made of.

    Parameters
    ----------
    folder : Path
        Where `RECORDS_FILE` is written, a line a round.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.perf_counter) -> None:
        self._file = folder / RECORDS_FILE
        self._clock = clock
        self._began_s = 0.0
        self._rounds = 0
        self._load = 0.0

    def begin(self) -> None:
        """Start the watch: nothing of the round was done before."""
        self._load = os.getloadavg()[0]
        self._began_s = self._clock()

    def lap(self) -> float:
        """Return the seconds since `begin`."""
        return self._clock() - self._began_s

    def end(self, model: F32, seconds: float, **more: Any) -> None:
        """Write down a round.

        Parameters
        ----------
        model : F32
            The new global model, shape ``(dim,)``.
        seconds : float
            From `begin` until that model existed; judging it is in no figure.
        more
            Other figures of this round.
        """
        self._rounds += 1
        error = worst_error(model, self._rounds)
        line = {"round": self._rounds, "seconds": seconds, "error": error, "load_1m": round(self._load, 2), **more}
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Return what a `Recorder` wrote, oldest first; nothing if it wrote nothing."""
    path = folder / RECORDS_FILE
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
