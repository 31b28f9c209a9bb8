"""Secure aggregation next to Flower's SecAgg+, and to the least its masks can cost.

Both protocols run to the end on the same vectors, with the complete graph, the same threshold and the same
dropouts (owners who shared their keys and then never masked). Every figure is CPU seconds of this process; an owner's
is the median over owners, owners of the two protocols taking turns. Flower's functions are called directly,
without its messages; what fedllm does more (signatures, consistency, commitments) is in its figures.
"""

from __future__ import annotations

import sys
import time
import tracemalloc
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from statistics import median
from typing import Any, Protocol, TypeVar

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from rich.table import Table

from benchmarks.document import Document, parser, rounded, run
from benchmarks.secagg_flower import Flower
from benchmarks.secagg_ours import Fedllm
from fedllm.errors import ConfigError
from fedllm.messages.plan import honest_threshold

F32 = NDArray[np.float32]
T = TypeVar("T")
GATE_DIM = 1000
QUICK_DIM = 200_000
CLIP_RANGE = 8.0
_FLOOR_BUFFER = 1 << 17


class Provider(Protocol):
    """One protocol, every party of it in this process; owners are ``0 … n-1``."""

    @property
    def upload_bytes(self) -> int:
        """All bytes that the first owner sent."""

    def setup(self, owner: int) -> None:
        """Make an owner's keys."""

    def list_keys(self) -> None:
        """Forward everybody's keys. The coordinator's."""

    def share(self, owner: int) -> None:
        """Deal an owner's shares."""

    def forward(self) -> None:
        """Forward the shares. The coordinator's."""

    def mask(self, owner: int, update: F32) -> Any:
        """Quantise and mask an owner's vector, up to the bytes that are sent."""

    def collect(self, owner: int, vector: Any) -> None:
        """Add one masked vector. The coordinator's."""

    def confirm(self, owner: int) -> None:
        """Make an owner's word on who survived, in a protocol that has one."""

    def settle(self) -> None:
        """Ask the survivors to open the sum. The coordinator's."""

    def reveal(self, owner: int) -> None:
        """Make an owner's answer that opens the sum, whatever it checks before."""

    def open(self) -> None:
        """Open the sum of the survivors. The coordinator's."""

    def check(self, updates: list[F32]) -> None:
        """Raise `GateFailed` unless the opened sum is the plain sum of the survivors' quantised vectors."""


@dataclass
class Costs:
    """CPU seconds of one provider, by owner, and the memory of one owner's masking above its input."""

    setup: list[float] = field(default_factory=list)
    mask: list[float] = field(default_factory=list)
    reveal: list[float] = field(default_factory=list)
    unmask: float = 0.0
    peak_bytes: int = 0


def cpu(work: Callable[[], T]) -> tuple[float, T]:
    """Return the CPU seconds of `work` in this process, and its result."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def play(providers: dict[str, Provider], updates: list[F32], dropouts: int) -> tuple[dict[str, Costs], list[float]]:
    """Run all providers through one sum, taking turns, and check each; return costs and the floor's samples.

    Parameters
    ----------
    updates : list[F32]
        One vector an owner, shape ``(dim,)``; the last `dropouts` owners never mask.

    Raises
    ------
    GateFailed
    """
    owners, survivors = range(len(updates)), range(len(updates) - dropouts)
    costs = {name: Costs() for name in providers}
    floor: list[float] = []
    for i, name in product(owners, providers):
        costs[name].setup.append(cpu(partial(providers[name].setup, i))[0])
    for provider in providers.values():
        provider.list_keys()
    for i, name in product(owners, providers):
        costs[name].setup[i] += cpu(partial(providers[name].share, i))[0]
    for provider in providers.values():
        provider.forward()
    for i in survivors:
        for name, provider in providers.items():
            _mask(provider, costs[name], i, updates[i], traced=i == survivors[-1])
        floor.append(mask_floor(updates[i].size, len(updates)))
    for name, provider in providers.items():
        costs[name].reveal = [cpu(partial(provider.confirm, i))[0] for i in survivors]
        provider.settle()
        for i in survivors:
            costs[name].reveal[i] += cpu(partial(provider.reveal, i))[0]
        costs[name].unmask, _ = cpu(provider.open)
        provider.check(updates)
    return costs, floor


def _mask(provider: Provider, costs: Costs, owner: int, update: F32, *, traced: bool) -> None:
    """Mask and collect; the traced owner gives the memory figure and no time, for tracing slows it down."""
    if traced:
        tracemalloc.start()
        vector = provider.mask(owner, update)
        costs.peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    else:
        seconds, vector = cpu(partial(provider.mask, owner, update))
        costs.mask.append(seconds)
    provider.collect(owner, vector)


def mask_floor(dim: int, masks: int) -> float:
    """Return the CPU seconds of `masks` AES-256-CTR keystreams of `dim` words, each added to a vector."""
    accumulator = np.zeros(dim, dtype=np.uint32)
    zeros = memoryview(bytes(_FLOOR_BUFFER))
    buffer = bytearray(_FLOOR_BUFFER)
    words = np.frombuffer(buffer, dtype="<u4")

    def add_all() -> None:
        for index in range(masks):
            stream = Cipher(algorithms.AES(index.to_bytes(32, "big")), modes.CTR(bytes(16))).encryptor()
            for at in range(0, dim, words.size):
                lanes = accumulator[at : at + words.size]
                stream.update_into(zeros[: 4 * lanes.size], memoryview(buffer)[: 4 * lanes.size])
                np.add(lanes, words[: lanes.size], out=lanes)

    return cpu(add_all)[0]


def make_updates(owners: int, dim: int) -> list[F32]:
    """Return one vector an owner, normal with deviation 0.1, repeatable."""
    return [np.random.default_rng([7, i]).normal(0, 0.1, dim).astype(np.float32) for i in range(owners)]


def make_providers(owners: int, dim: int, dropouts: int) -> dict[str, Provider]:
    """Return both protocols, not yet started."""
    arguments: dict[str, Any] = {"owners": owners, "dim": dim, "dropouts": dropouts, "clip_range": CLIP_RANGE}
    return {"fedllm": Fedllm(**arguments), "flower": Flower(**arguments)}


def measure(options: Namespace) -> Document:
    """Gate on short vectors, then time on long ones (and check those, too)."""
    owners, dropouts = options.owners, options.dropouts
    dim = options.dim or (QUICK_DIM if options.quick else 1_000_000)
    needed = max(3, honest_threshold(owners))
    if owners - dropouts < needed:
        raise ConfigError(f"{owners} owners with {dropouts} dropouts leave {owners - dropouts}, {needed} are needed")
    play(make_providers(owners, GATE_DIM, dropouts), make_updates(owners, GATE_DIM), dropouts)
    providers = make_providers(owners, dim, dropouts)
    costs, floor = play(providers, make_updates(owners, dim), dropouts)
    shown = {name: _fields(costs[name], provider.upload_bytes) for name, provider in providers.items()}
    ours, theirs = shown["fedllm"], shown["flower"]
    return {
        "gate": True,
        "exact": True,
        "owners": owners,
        "dim": dim,
        "dropouts": dropouts,
        "neighbours": owners - 1,
        "threshold": honest_threshold(owners),
        "dtype": "float32 vectors",
        "settings": "fedllm 16-bit values in 24-bit entries; Flower 22-bit values in 64-bit entries, its default",
        "providers": shown,
        "floor": {"mask_cpu_s": rounded(median(floor))},
        "mask_over_floor": rounded(ours["mask_cpu_s"] / median(floor)),
        "mask_speedup": rounded(theirs["mask_cpu_s"] / ours["mask_cpu_s"]),
        "unmask_speedup": rounded(theirs["unmask_cpu_s"] / ours["unmask_cpu_s"]),
        "upload_ratio": rounded(ours["upload_bytes"] / theirs["upload_bytes"]),
        "peak_over_input": rounded(ours["peak_bytes"] / (4 * dim)),
    }


def _fields(costs: Costs, upload_bytes: int) -> Document:
    return {
        "setup_cpu_s": rounded(median(costs.setup)),
        "mask_cpu_s": rounded(median(costs.mask)),
        "unmask_cpu_s": rounded(costs.unmask),
        "upload_bytes": upload_bytes,
        "peak_bytes": costs.peak_bytes,
        "reveal_cpu_s": rounded(median(costs.reveal)),
    }


def table(document: Document) -> Table:
    """Return the document as a table."""
    d = document
    made = Table(
        title=f"secagg: {d['owners']} owners, {d['dim']:,} entries, {d['dropouts']} dropouts, exact",
        caption=f"against Flower: mask {d['mask_speedup']:.1f}x, unmask {d['unmask_speedup']:.1f}x as fast, "
        f"upload {d['upload_ratio']:.3f}; mask is {d['mask_over_floor']:.2f}x the AES floor",
    )
    for column in ("provider", "setup s", "mask s", "unmask s", "upload MB", "peak MB"):
        made.add_column(column, justify="left" if column == "provider" else "right")
    for name, row in document["providers"].items():
        times = [f"{row[key]:.3f}" for key in ("setup_cpu_s", "mask_cpu_s", "unmask_cpu_s")]
        made.add_row(name, *times, f"{row['upload_bytes'] / 1e6:.2f}", f"{row['peak_bytes'] / 1e6:.1f}")
    made.add_row("floor", "", f"{document['floor']['mask_cpu_s']:.3f}", "", "", "")
    return made


def main(argv: list[str] | None = None) -> int:
    """Run from the command line."""
    arguments = parser("secagg", "What does secure aggregation cost, next to Flower's SecAgg+?")
    arguments.add_argument("--owners", type=int, default=10)
    arguments.add_argument("--dim", type=int, help=f"entries; 1000000, with --quick {QUICK_DIM}")
    arguments.add_argument("--dropouts", type=int, default=1, help="owners lost after they shared their keys")
    return run("secagg", arguments, measure, table, argv)


if __name__ == "__main__":
    sys.exit(main())
