"""The parts of a simulated federation: its adapter, its owners with keys, ledgers and daemons, its coordinator."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path

from fedllm.adapter import AdapterSpec
from fedllm.aggregation.methods import get_method
from fedllm.client.daemon import Daemon
from fedllm.client.pipeline import Observer
from fedllm.client.policy import OwnerPolicy
from fedllm.client.round import InlineWorker
from fedllm.client.toy import ToyPool, ToyTrainer
from fedllm.clock import Clock
from fedllm.config import FederationSettings
from fedllm.errors import ConfigError
from fedllm.identity import Roster, SigningIdentity
from fedllm.ids import Digest, FederationName, OwnerId
from fedllm.messages.mechanism import SKELLAM, UNIT_OWNER, UNIT_RECORD
from fedllm.messages.plan import RoundPlan
from fedllm.privacy.ledger import Ledger
from fedllm.privacy.noise import GaussianGrid
from fedllm.relay.memory import Handler
from fedllm.rng import SeededRng
from fedllm.server.federation import Federation, Head, initial_state
from fedllm.server.plan import make_plan
from fedllm.simulate.fates import Weather
from fedllm.simulate.misdeeds import misbehaving

MOST_OWNERS = 1000
MOST_ENTRIES = 10_000_000
_BASE = Digest("51" * 32)
_MODULE = "q_proj"
_WIDTH = 16
_MOST_RANK = 16
_NO_LIMIT = 1e9
"""A budget that no simulation spends: what is simulated is the charging, not the owner's own decision."""


def toy_spec(dim: int, method: str) -> AdapterSpec:
    """Return an adapter whose update in `method` has exactly `dim` entries.

    Raises
    ------
    ConfigError
        If there is none.
    """
    factors = get_method(method).trainable(1)
    least = len(factors)  # one row of B, one column of A
    ranks = [rank for rank in range(_MOST_RANK, 0, -1) if dim % rank == 0 and dim // rank >= least]
    if not least <= dim <= MOST_ENTRIES or not ranks:
        raise ConfigError(f"dim is {dim}: {least} to {MOST_ENTRIES} entries allowed with method {method!r}")
    rank = ranks[0]
    lines = dim // rank
    width = min(_WIDTH, lines - 1) if "A" in factors else _WIDTH
    out = lines - width if "A" in factors else lines
    return AdapterSpec(_BASE, rank, 2 * rank, {_MODULE: (out, width)}, (0,))


@dataclass(frozen=True)
class Cast:
    """A federation of made-up owners and everybody's key.

    Attributes
    ----------
    federation : Federation
    coordinator : SigningIdentity
    keys : dict[OwnerId, SigningIdentity]
    """

    federation: Federation
    coordinator: SigningIdentity
    keys: dict[OwnerId, SigningIdentity]

    @classmethod
    def of(cls, settings: FederationSettings, dim: int, seed: int) -> Cast:
        """Make the owners that `settings` declares sizes for.

        Raises
        ------
        ConfigError
            If there are too few or too many, or the noise has no grid fine enough for so long an update.
        """
        owners = sorted(settings.declared_records)
        if not 3 <= len(owners) <= MOST_OWNERS:
            raise ConfigError(
                f"{len(owners)} owners: 3 to {MOST_OWNERS} allowed",
                hint="a sum of fewer than 3 updates is never published",
            )
        if settings.privacy and settings.mechanism != SKELLAM:
            GaussianGrid(settings.noise_multiplier * settings.clip_norm).check(dim, settings.clip_norm)
        spec = toy_spec(dim, settings.method)
        made = replace(settings, rank=spec.rank, alpha=spec.alpha, target_modules=(_MODULE,), last_layers=1)
        keys = {OwnerId(owner): _identity(seed, owner) for owner in owners}
        roster = Roster.of({owner: key.public for owner, key in keys.items()})
        return cls(Federation(made, spec, roster), _identity(seed, "coordinator"), keys)

    def daemons(self, folder: Path, *, clock: Clock, seed: int, observer: Observer) -> dict[OwnerId, SimulatedOwner]:
        """Return every owner's daemon, with a ledger and a folder of its own and records from one pool."""
        pool = ToyPool()
        return {owner: self._owner(owner, folder / owner, pool, clock, seed, observer) for owner in self.keys}

    def _owner(
        self, owner: OwnerId, home: Path, pool: ToyPool, clock: Clock, seed: int, observer: Observer
    ) -> SimulatedOwner:
        home.mkdir(parents=True)
        settings, key = self.federation.settings, self.keys[owner]
        policy = _policy(settings)
        trainer = ToyTrainer(_BASE, owner, settings.declared_records[owner], pool=pool, streams=home / "streams")
        ledger = Ledger.open(
            home / "ledger.jsonl", key, clock, dataset=trainer.dataset, limit_epsilon=policy.limit_epsilon,
            delta=policy.delta, unit=policy.unit,
        )  # fmt: skip
        daemon = Daemon(
            owner=owner, federation=FederationName(settings.name), home=home, identity=key,
            roster=self.federation.roster, coordinator=self.coordinator.public, policy=policy, ledger=ledger,
            trainer=trainer, clock=clock, rng=SeededRng(f"simulate/{seed}/owner/{owner}"), worker=InlineWorker(),
            observer=observer,
        )  # fmt: skip
        return SimulatedOwner(owner, key, daemon, ledger)


@dataclass(frozen=True)
class SimulatedOwner:
    """One owner: its key, its daemon, its ledger."""

    owner: OwnerId
    key: SigningIdentity
    daemon: Daemon
    ledger: Ledger

    def handler(self, weather: Weather) -> Handler:
        """Return what answers requests at this owner's node."""
        return misbehaving(self.daemon.handle, self.owner, self.key, weather)


def whole_plan(federation: Federation) -> RoundPlan:
    """Return the plan that the whole roster gets, from the untrained start; it is signed by nobody.

    Raises
    ------
    PolicyRefused, ConfigError
        If the federation's settings allow no round.
    """
    members = [member.owner for member in federation.roster.members]
    head = Head(initial_state(federation.name, federation.spec), None)
    plan = make_plan(federation, head, 1, members, SeededRng("a plan that nobody signs"))
    get_method(plan.method).check(plan)
    return plan


def _identity(seed: int, name: str) -> SigningIdentity:
    return SigningIdentity.from_seed(hashlib.sha256(f"simulate/{seed}/key/{name}".encode()).digest())


def _policy(settings: FederationSettings) -> OwnerPolicy:
    """Return a policy that agrees to whatever the settings ask for."""
    sizes = settings.declared_records.values()
    return OwnerPolicy(
        max_epsilon=_NO_LIMIT,
        delta=settings.delta,
        allowed_bases=(_BASE,),
        allow_without_dp=not settings.privacy,
        max_tokens=max(1, settings.max_tokens),
        max_local_steps=max(1, settings.local_steps),
        max_size_ratio=max(1.0, math.ceil(max(sizes) / min(sizes))),
        min_corruption=0.0,
        unit=UNIT_OWNER if settings.mechanism == SKELLAM else UNIT_RECORD,
    )
