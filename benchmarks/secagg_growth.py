"""How the cost of a sum grows with its owners: fedllm alone, everybody takes part, every sum is exact.

Up to 128 owners the graph is complete and an owner's cost follows n; above, it follows the neighbours k, and the
masks, of which there are k to 2k and its own. As many owners as the plan allows for drop out after they shared. CPU
seconds of this process, medians over owners; the coordinator's memory is what it holds and needs from the first vector
to the last, beyond the sum itself, whatever was there before.
"""

from __future__ import annotations

import gc
import math
import time
import tracemalloc
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from statistics import median
from tempfile import TemporaryFile
from typing import IO, TypeVar

import numpy as np
from rich.table import Table

from benchmarks.document import Document, rounded
from benchmarks.secagg_ours import Fedllm
from fedllm import wire
from fedllm.aggregation.secagg.masking import MaskedInput
from fedllm.messages.secagg import MaskedVector

T = TypeVar("T")
_COLLECT_EVERY = 20
OWNERS = (8, 16, 32, 64, 128, 256, 512, 1000)
QUICK_OWNERS = (8, 32, 160)
DIM = 100_000
CLIP_RANGE = 8.0
VALUE_BITS = 14
"""So that 1000 owners fit the ring of 24 bits that the smaller cohorts have, too."""


def measure(options: Namespace) -> Document:
    """Run one sum for each size of the cohort."""
    dim = options.dim or DIM
    sizes = QUICK_OWNERS if options.quick else OWNERS
    rows = [grow(owners, dim, options.corruption, options.dropout) for owners in sizes]
    return {
        "gate": True,
        "exact": True,
        "dim": dim,
        "corruption": options.corruption,
        "dropout": options.dropout,
        "settings": "fedllm 14-bit values in 24-bit entries; all owners take part and are timed",
        "growth": rows,
    }


def grow(owners: int, dim: int, corruption: float, dropout: float) -> Document:
    """Run one sum and return its row; the gate is in `Fedllm.check`."""
    dropouts = math.floor(dropout * owners)
    sum_ = Fedllm(
        owners=owners, dim=dim, dropouts=dropouts, clip_range=CLIP_RANGE, value_bits=VALUE_BITS, corruption=corruption,
        dropout=dropout,
    )  # fmt: skip
    updates = [np.random.default_rng([7, i]).standard_normal(dim, dtype=np.float32) for i in range(8)]
    everybody, survivors = range(owners), range(owners - dropouts)
    setup = [_cpu(partial(sum_.setup, i))[0] for i in everybody]
    coordinate = _cpu(sum_.list_keys)[0]
    setup = [seconds + _cpu(partial(sum_.share, i))[0] for i, seconds in zip(everybody, setup, strict=True)]
    coordinate += _cpu(sum_.forward)[0]
    mask: list[float] = []
    with TemporaryFile() as file:
        spool = Spool(file)
        for i in survivors:
            seconds, vector = _cpu(partial(sum_.mask, i, updates[i % len(updates)]))
            mask.append(seconds)
            sum_.count(i, vector)
            spool.put(vector)
        peak = spool.hand_over(sum_)
    reveal = [_cpu(partial(sum_.confirm, i))[0] for i in survivors]
    coordinate += _cpu(sum_.settle)[0]
    reveal = [seconds + _cpu(partial(sum_.reveal, i))[0] for i, seconds in zip(survivors, reveal, strict=True)]
    unmask, _ = _cpu(sum_.open)
    sum_.check([updates[i % len(updates)] for i in survivors])
    masks = [sum_.masks(i) for i in survivors]
    return {
        "owners": owners,
        "dropouts": dropouts,
        "neighbours": sum_.graph.neighbours,
        "threshold": sum_.graph.threshold,
        "complete": sum_.graph.neighbours == owners - 1,
        "masks": int(median(masks)),
        "masks_most": max(masks),
        "setup_cpu_s": rounded(median(setup)),
        "mask_cpu_s": rounded(median(mask)),
        "reveal_cpu_s": rounded(median(reveal)),
        "setup_us_per_neighbour": rounded(1e6 * median(setup) / sum_.graph.neighbours),
        "mask_us_per_mask": rounded(1e6 * median(s / m for s, m in zip(mask, masks, strict=True))),
        "upload_bytes": sum_.upload_bytes,
        "coordinator_cpu_s": rounded(coordinate),
        "unmask_cpu_s": rounded(unmask),
        "coordinator_peak_bytes": peak,
        "peak_over_vector": rounded(peak / (4 * dim)),
    }


class Spool:
    """Vectors on disk between owners and coordinator, so that neither's memory is counted as the other's."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._cuts: list[list[int]] = []

    def put(self, vector: MaskedInput) -> None:
        """Write one vector behind the others."""
        parts = [wire.encode(vector.head), *vector.chunks]
        self._cuts.append([self._file.write(part) for part in parts])

    def hand_over(self, sum_: Fedllm) -> int:
        """Let the coordinator add one vector after another; return the most bytes that were allocated meanwhile."""
        self._file.seek(0)
        gc.freeze()
        tracemalloc.start()
        for owner, cuts in enumerate(self._cuts):
            head, *chunks = [self._file.read(cut) for cut in cuts]
            sum_.add(owner, wire.decode(MaskedVector, head), chunks)
            if owner % _COLLECT_EVERY == 0:
                gc.collect()  # empties CPython's lists of spare tuples and dicts, which would count as held
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        gc.unfreeze()
        return peak


def _cpu(work: Callable[[], T]) -> tuple[float, T]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def table(document: Document) -> Table:
    """Return the document as a table."""
    made = Table(
        title=f"secagg growth: {document['dim']:,} entries, exact, {document['dropout']:.0%} of the owners lost"
    )
    columns = {
        "owners": "owners", "k": "neighbours", "t": "threshold", "masks": "masks", "setup s": "setup_cpu_s",
        "mask s": "mask_cpu_s", "reveal s": "reveal_cpu_s", "µs a mask": "mask_us_per_mask",
        "coordinator s": "coordinator_cpu_s", "unmask s": "unmask_cpu_s",
    }  # fmt: skip
    for column in (*columns, "peak MB"):
        made.add_column(column, justify="right")
    for row in document["growth"]:
        cells = [f"{row[key]:.4g}" for key in columns.values()]
        made.add_row(*cells, f"{row['coordinator_peak_bytes'] / 1e6:.2f}")
    return made
