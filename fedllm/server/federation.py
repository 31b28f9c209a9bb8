"""A federation as the coordinator holds it: settings, adapter spec, roster, and where its head stands."""

from __future__ import annotations

from dataclasses import dataclass

from fedllm.adapter import AdapterSpec, AdapterState
from fedllm.config import FederationSettings
from fedllm.errors import AdapterInvalid, ConfigError
from fedllm.identity import Roster
from fedllm.ids import AliasName, Digest, check_alias
from fedllm.registry.store import Registry
from fedllm.rng import SeededRng


@dataclass(frozen=True)
class Head:
    """The global adapter a round starts from; `version` is None for the untrained start."""

    state: AdapterState
    version: Digest | None


@dataclass(frozen=True)
class Federation:
    """One federation: who trains what together, and the alias it publishes to.

    Attributes
    ----------
    settings : FederationSettings
    spec : AdapterSpec
        What is adapted; names the base by digest.
    roster : Roster
        The owners and their pinned keys.
    """

    settings: FederationSettings
    spec: AdapterSpec
    roster: Roster

    def __post_init__(self) -> None:
        """Refuse a federation whose owners' declared sizes are incomplete."""
        owners = {member.owner for member in self.roster.members}
        declared = self.settings.declared_records
        if set(declared) != owners:
            odd = sorted(set(declared) ^ owners)
            raise ConfigError(
                f"federation {self.settings.name}: declared_records and roster differ in {', '.join(odd)}",
                hint="declare the public number of training records of every owner in the roster",
            )
        check_alias(self.settings.alias)

    @property
    def name(self) -> str:
        """The federation's name."""
        return self.settings.name

    @property
    def alias(self) -> AliasName:
        """The alias that accepted versions are published to."""
        return check_alias(self.settings.alias)

    def head(self, registry: Registry) -> Head:
        """Return what the next round starts from: the version the alias points at, or the untrained start.

        A held candidate is never built on, and a rollback moves the head back with the alias.

        Raises
        ------
        AdapterInvalid
            If the alias points at a version of another spec: two specs never mix.
        """
        digest = registry.aliases().aliases.get(self.alias)
        if digest is None:
            return Head(initial_state(self.name, self.spec), None)
        return self.load_head(registry, digest)

    def load_head(self, registry: Registry, version: Digest | None) -> Head:
        """Return the head of this version (None: the untrained start)."""
        if version is None:
            return Head(initial_state(self.name, self.spec), None)
        state = registry.state(version)
        if state.spec.digest != self.spec.digest:
            raise AdapterInvalid(
                f"alias {self.alias!r} points at {registry.get(version).name}, which has another base, rank or modules",
                hint="give the federation another alias, or set its rank, alpha and modules back",
            )
        return Head(state, version)


def initial_state(federation: str, spec: AdapterSpec) -> AdapterState:
    """Return the untrained start, the same on every machine: A from a public seed, B zero.

    The seed is public and is meant to be: it protects nobody, and anyone can check the head of round one.
    """
    return AdapterState.initial(spec, SeededRng(f"{federation}/{spec.digest}"))


def adapter_spec(
    settings: FederationSettings, *, base: Digest, num_layers: int, shapes: dict[str, tuple[int, int]]
) -> AdapterSpec:
    """Return the spec that a federation's settings make of a base model.

    Parameters
    ----------
    settings : FederationSettings
    base : Digest
        Content digest of the base.
    num_layers : int
        Its transformer layers; the last `last_layers` of them are adapted.
    shapes : dict[str, tuple[int, int]]
        Weight shape ``(out, in)`` of each target module.
    """
    if not 1 <= settings.last_layers <= num_layers:
        raise ConfigError(
            f"federation {settings.name}: last_layers is {settings.last_layers}, the base has {num_layers}"
        )
    layers = tuple(range(num_layers - settings.last_layers, num_layers))
    return AdapterSpec(base=base, rank=settings.rank, alpha=settings.alpha, modules=shapes, layers=layers)
