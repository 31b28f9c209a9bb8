"""How the cost of a sum grows with its owners: fedllm alone, everybody takes part, every sum is exact.

Up to 128 owners the graph is complete and an owner's cost follows n; above, it follows the neighbours k, and the
masks, of which there are k to 2k and its own. As many owners as the plan allows for drop out after they shared. CPU
seconds of this process, medians over owners; the coordinator's memory is what it holds and needs from the first vector
to the last, beyond the sum itself, whatever was there before.
"""

from __future__ import annotations

import math
import time
import tracemalloc
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any, TypeVar

import numpy as np
from rich.table import Table

from benchmarks.document import Document, rounded
from benchmarks.secagg_ours import Fedllm
from fedllm import wire
from fedllm.aggregation.secagg.masking import MaskedInput
from fedllm.messages.secagg import MaskedVector

T = TypeVar("T")
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
    mask, held, peak = [], 0, 0
    for i in survivors:
        seconds, vector = _cpu(partial(sum_.mask, i, updates[i % len(updates)]))
        mask.append(seconds)
        now, most = _traced(partial(_receive, sum_, i, vector))
        held, peak = held + now, max(peak, held + most)
        sum_.count(i, vector)
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


def _receive(sum_: Fedllm, owner: int, vector: MaskedInput) -> None:
    """Take a vector in as a carrier hands it over: decoded, its chunks in memory of their own."""
    head = wire.decode(MaskedVector, wire.encode(vector.head))
    sum_.add(owner, head, [bytes(bytearray(chunk)) for chunk in vector.chunks])


def _cpu(work: Callable[[], T]) -> tuple[float, T]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def _traced(work: Callable[[], Any]) -> tuple[int, int]:
    """Return the bytes that `work` left allocated, and the most it had."""
    tracemalloc.start()
    work()
    now, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return now, most


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
