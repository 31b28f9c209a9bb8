"""Secure aggregation next to Flower's SecAgg+, and to the least its masks can cost.

Both protocols run to the end on the same vectors, with the complete graph, the same threshold and the same
dropouts (owners who shared their keys and then never masked). Every figure is CPU seconds of this process; an owner's
is the median over owners, owners of the two protocols taking turns. Flower's functions are called directly,
without its messages; what fedllm does more (signatures, consistency, commitments) is in its figures.

Vectors are made as they are needed, so memory does not grow with the owners. For very long ones ``--flower-owners``
lets only so many of Flower's owners mask: its sum is nothing then, and is checked at the gate's length only.
``--growth`` leaves Flower out and lets the cohort grow (`benchmarks.secagg_growth`).
"""

from __future__ import annotations

import sys
import time
import tracemalloc
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from statistics import median
from typing import Any, Protocol, TypeVar

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from rich.table import Table

from benchmarks import secagg_growth
from benchmarks.document import Document, parser, rounded, run
from benchmarks.secagg_flower import Flower
from benchmarks.secagg_ours import Fedllm
from fedllm.aggregation.secagg.graph import COMPLETE_UP_TO
from fedllm.errors import ConfigError
from fedllm.messages.plan import honest_threshold

F32 = NDArray[np.float32]
T = TypeVar("T")
GATE_DIM = 1000
QUICK_DIM = 200_000
CLIP_RANGE = 8.0
_FLOOR_BUFFER = 1 << 17
_FLOOR_SAMPLES = 10


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

    def check(self, updates: Sequence[F32]) -> None:
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


def play(
    providers: dict[str, Provider], updates: Sequence[F32], dropouts: int, *, masking: Mapping[str, int] | None = None
) -> tuple[dict[str, Costs], list[float]]:
    """Run all providers through one sum, taking turns, and check each; return costs and the floor's samples.

    Parameters
    ----------
    updates : Sequence[F32]
        One vector an owner, shape ``(dim,)``; the last `dropouts` owners never mask.
    masking : Mapping[str, int], optional
        Providers of which only so many owners mask: their figures are good, their sums are not, and unchecked.

    Raises
    ------
    GateFailed
    """
    survivors = range(len(updates) - dropouts)
    last = {name: min((masking or {}).get(name, len(survivors)), len(survivors)) - 1 for name in providers}
    costs = {name: Costs() for name in providers}
    _share(providers, costs, range(len(updates)))
    floor: list[float] = []
    for i in survivors:
        update = updates[i]
        for name, provider in providers.items():
            if i <= last[name]:
                _mask(provider, costs[name], i, update, traced=i == last[name])
        if i % max(1, len(survivors) // _FLOOR_SAMPLES) == 0:
            floor.append(mask_floor(update.size, len(updates)))
    for name, provider in providers.items():
        _open(provider, costs[name], survivors)
        if last[name] == survivors[-1]:
            provider.check(updates)
    return costs, floor


def _share(providers: dict[str, Provider], costs: dict[str, Costs], owners: range) -> None:
    """Run the first two steps: everybody's keys, and everybody's shares."""
    for i, name in product(owners, providers):
        costs[name].setup.append(cpu(partial(providers[name].setup, i))[0])
    for provider in providers.values():
        provider.list_keys()
    for i, name in product(owners, providers):
        costs[name].setup[i] += cpu(partial(providers[name].share, i))[0]
    for provider in providers.values():
        provider.forward()


def _open(provider: Provider, costs: Costs, survivors: range) -> None:
    """Run the last two steps of one protocol: survivors agree and answer, and the sum is opened."""
    costs.reveal = [cpu(partial(provider.confirm, i))[0] for i in survivors]
    provider.settle()
    for i in survivors:
        costs.reveal[i] += cpu(partial(provider.reveal, i))[0]
    costs.unmask, _ = cpu(provider.open)


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


class Updates(Sequence[F32]):
    """One vector an owner, normal with deviation 0.1, made anew each time it is looked at.

    Parameters
    ----------
    owners, dim : int
    """

    def __init__(self, owners: int, dim: int) -> None:
        self._owners, self._dim = owners, dim

    def __len__(self) -> int:
        return self._owners

    def __getitem__(self, owner: Any) -> Any:
        if not 0 <= owner < self._owners:
            raise IndexError(owner)
        return np.random.default_rng([7, owner]).standard_normal(self._dim, dtype=np.float32) * np.float32(0.1)


def make_updates(owners: int, dim: int) -> Updates:
    """Return one vector an owner, repeatable."""
    return Updates(owners, dim)


def make_providers(owners: int, dim: int, dropouts: int) -> dict[str, Provider]:
    """Return both protocols, not yet started."""
    arguments: dict[str, Any] = {"owners": owners, "dim": dim, "dropouts": dropouts, "clip_range": CLIP_RANGE}
    return {"fedllm": Fedllm(**arguments), "flower": Flower(**arguments)}


def measure(options: Namespace) -> Document:
    """Gate on short vectors, then time on long ones (and check those, too)."""
    if options.growth:
        return secagg_growth.measure(options)
    owners, dropouts = options.owners, options.dropouts
    dim = options.dim or (QUICK_DIM if options.quick else 1_000_000)
    needed = max(3, honest_threshold(owners))
    if owners - dropouts < needed:
        raise ConfigError(f"{owners} owners with {dropouts} dropouts leave {owners - dropouts}, {needed} are needed")
    if owners > COMPLETE_UP_TO:
        raise ConfigError(f"{owners} owners: up to {COMPLETE_UP_TO} both graphs are complete; see --growth for more")
    play(make_providers(owners, GATE_DIM, dropouts), make_updates(owners, GATE_DIM), dropouts)
    providers = make_providers(owners, dim, dropouts)
    masking = {"flower": options.flower_owners} if options.flower_owners else {}
    costs, floor = play(providers, make_updates(owners, dim), dropouts, masking=masking)
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
        "masked_owners": {name: len(cost.mask) + 1 for name, cost in costs.items()},
        "exact_at": {name: GATE_DIM if name in masking else dim for name in costs},
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
    if "growth" in d:
        return secagg_growth.table(d)
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
    arguments.add_argument("--flower-owners", type=int, help="only so many of Flower's owners mask; for long vectors")
    arguments.add_argument("--growth", action="store_true", help="fedllm alone, with 8 to 1000 owners")
    arguments.add_argument("--corruption", type=float, default=0.1, help="of the cohort; with --growth")
    arguments.add_argument("--dropout", type=float, default=0.1, help="of the cohort; with --growth")
    return run("secagg", arguments, measure, table, argv)


if __name__ == "__main__":
    sys.exit(main())
