"""The federation that `benchmarks.round` times: its owners, what it trains, and the files its processes start from."""

from __future__ import annotations

from pathlib import Path

from benchmarks.round_updates import OWNERS
from fedllm.adapter import AdapterSpec
from fedllm.clock import SystemClock
from fedllm.config import FederationSettings
from fedllm.errors import ConfigError
from fedllm.identity import Roster, SigningIdentity
from fedllm.ids import OwnerId, sha256
from fedllm.relay.tls import TlsIdentity

NAME = "bench"
BASE = sha256(b"benchmarks.round")
NAMES = tuple(OwnerId(f"owner{i}") for i in range(OWNERS))
RECORDS = 100
"""Training records each owner says it has: the same for all, so the mean is a plain one."""
FACTORS = ("B",)
LAYERS, RANK, WIDTH = 10, 4, 8
"""The adapter's shape: layers and rank of a common small one; A is next to nothing and B has all entries."""
VALUE_BITS = 16
CLIP_RANGE = 4.0
ROSTER_FILE = "roster.json"
KEY_FILE = "key.pem"
PINNED_DIR = "pinned"
"""Below the coordinator's folder: the owners' certificates."""


def make_spec(dim: int) -> AdapterSpec:
    """Return a spec whose B has `dim` entries in all.

    Raises
    ------
    ConfigError
        If layers and rank do not divide them.
    """
    if dim <= 0 or dim % (LAYERS * RANK):
        raise ConfigError(f"dim {dim}: a multiple of {LAYERS * RANK} is needed, {LAYERS} layers of rank {RANK}")
    return AdapterSpec(BASE, RANK, RANK, {"q_proj": (dim // (LAYERS * RANK), WIDTH)}, tuple(range(LAYERS)))


def make_settings() -> FederationSettings:
    """Return settings without DP: no noise and no accountant on any side of the comparison."""
    return FederationSettings(
        name=NAME, base=Path("none"), alias=f"{NAME}/{NAME}", rank=RANK, alpha=RANK, target_modules=("q_proj",),
        last_layers=LAYERS, privacy=False, local_steps=1, learning_rate=1.0, value_bits=VALUE_BITS,
        clip_range=CLIP_RANGE, declared_records=dict.fromkeys(NAMES, RECORDS),
    )  # fmt: skip


def enrol(root: Path) -> None:
    """Write keys, certificates and roster below `root`: a folder ``coordinator``, and one for each owner."""
    clock = SystemClock()
    coordinator = root / "coordinator"
    (coordinator / PINNED_DIR).mkdir(parents=True)
    SigningIdentity.create(coordinator / KEY_FILE)
    TlsIdentity.create(coordinator, clock)
    keys = {}
    for owner in NAMES:
        (root / owner).mkdir()
        keys[owner] = SigningIdentity.create(root / owner / KEY_FILE).public
        (coordinator / PINNED_DIR / f"{owner}.pem").write_bytes(TlsIdentity.create(root / owner, clock).certificate.pem)
    Roster.of(keys).save(root / ROSTER_FILE)
