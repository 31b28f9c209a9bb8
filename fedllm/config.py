"""Settings: flags over ``FEDLLM_*`` variables over TOML over defaults, into frozen dataclasses.

Every key is documented where it is declared; an unknown key is an error that names the nearest known one.
Only composition roots and the command line read configuration; everything else is handed values.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fedllm.errors import ConfigError, NotFound

T = TypeVar("T")
TRANSPORTS = ("flower", "direct", "local")


def _key(doc: str, default: Any = MISSING) -> Any:
    """Declare a documented key; `doc` goes into ``docs/configuration.md``."""
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata={"doc": doc})
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class CoordinatorSettings:
    """``[coordinator]``: one coordinator process."""

    home: Path = _key("folder of keys, rosters, registry and journal")
    host: str = _key("address the control API listens on", "127.0.0.1")
    port: int = _key("port of the control API", 7400)
    flower_host: str = _key("address the Flower SuperLink listens on", "127.0.0.1")
    flower_port: int = _key("port of the Flower SuperLink", 7401)
    direct_host: str = _key("address that owners of direct federations dial", "127.0.0.1")
    direct_port: int = _key("port that owners of direct federations dial", 7403)


@dataclass(frozen=True)
class FederationSettings:
    """``[federation.<name>]``: what the owners of one federation train together."""

    name: str = _key("name of the federation")
    base: Path = _key("folder of the base model (Hugging Face layout)")
    alias: str = _key("tenant/name that accepted versions are published to")
    rank: int = _key("LoRA rank", 4)
    ranks: dict[str, int] = _key("owners of another rank than `rank`; see docs/methods.md for who allows that", {})
    alpha: int = _key("LoRA alpha; the adapter is scaled by alpha / rank", 8)
    target_modules: tuple[str, ...] = _key("projections to adapt", ("q_proj", "v_proj"))
    last_layers: int = _key("adapt only the last N transformer layers", 10)
    method: str = _key("aggregation method: ffa (B only, exact) or fedit (A and B)", "ffa")
    min_survivors: int = _key("owners whose updates a sum needs at least; never under 3", 3)
    transport: str = _key("flower; direct (gRPC over mutual TLS); or local (owners' sockets on this machine)", "flower")
    sockets: dict[str, str] = _key("transport local: owner to the daemon's socket", {})
    optimizer: str = _key("sgd under DP, adamw or sgd without", "sgd")
    learning_rate: float = _key("step scale; under DP it multiplies the unit-clipped mean", 12.0)
    local_steps: int = _key("optimiser steps of each owner in a round", 2)
    batch_size: int = _key("records a step without DP", 8)
    microbatch: int = _key("records through the model at once; memory only", 8)
    max_tokens: int = _key("longer records are left out and counted", 160)
    privacy: bool = _key("differential privacy; without it nothing bounds what a version remembers", True)
    mechanism: str = _key("dp-sgd or dp-ftrl (unit record), or skellam (unit owner)", "dp-sgd")
    noise_multiplier: float = _key("noise standard deviation over clip norm; see fedllm privacy calibrate", 0.81)
    clip_norm: float = _key("L2 bound of one record's gradient, or with skellam of one owner's update", 0.05)
    clip_quantile: float = _key("dp-sgd: let the clip norm follow this quantile of gradient norms; 0 keeps it", 0.0)
    clip_rate: float = _key("dp-sgd, clip_quantile: how fast the clip norm moves", 0.2)
    clip_count_noise: float = _key("dp-sgd, clip_quantile: noise of the count, in records", 10.0)
    stream: str = _key("dp-ftrl: name of the stream; another name begins another one, and charges it", "1")
    stream_steps: int = _key("dp-ftrl: noisy steps of the whole stream, over all its rounds", 64)
    stream_band: int = _key("dp-ftrl: steps over which noise is correlated", 8)
    stream_separation: int = _key("dp-ftrl: steps between two uses of one record, no less than the band", 16)
    acknowledge_noise: bool = _key("skellam: plan rounds whose noise is larger than their signal", False)
    sample_rate: float = _key("Poisson probability of a record in a step", 0.25)
    delta: float = _key("delta of (epsilon, delta)", 1e-5)
    value_bits: int = _key("bits of one quantised entry of the masked sum", 16)
    clip_range: float = _key("entries are clipped to plus or minus this before quantising", 4.0)
    train_deadline_s: float = _key("seconds allowed to local training", 900.0)
    phase_deadline_s: float = _key("seconds allowed to every other exchange", 120.0)
    attempts: int = _key("tries at one sum; after a failed one the owners left go on without training again", 3)
    corruption: float = _key("fraction of owners assumed to share what they know with the coordinator", 0.05)
    dropout: float = _key("fraction of owners assumed to be lost in the course of a sum", 0.05)
    declared_records: dict[str, int] = _key("public size each owner declared; weights and DP steps use it", {})
    gate_margin: float = _key("a candidate may be this much worse (mean held-out loss) and still pass", 0.0)


@dataclass(frozen=True)
class ClientSettings:
    """``[client]``: one data owner's daemon."""

    owner: str = _key("this owner's name in the roster")
    federation: str = _key("federation this daemon takes part in")
    home: Path = _key("folder of key, policy, ledger and audit log")
    data: Path = _key("folder with train.jsonl and heldout.jsonl")
    base: Path = _key("folder of the base model")
    coordinator_key: str = _key("pinned public key of the coordinator, ed25519:...")
    roster: Path = _key("this owner's own approved copy of the roster")
    superlink: str = _key("address of the federation's Flower SuperLink", "127.0.0.1:7401")
    node_port: int = _key("loopback port of this owner's SuperNode", 7410)
    direct: str = _key("address that the owner dials on the direct transport", "127.0.0.1:7403")
    threads: int = _key("CPU threads of training; cores divided by daemons on one machine", 1)
    transport: str = _key("flower, direct, or local (only the socket is served)", "flower")
    max_tokens: int = _key("longer records are left out and counted", 160)
    unit_column: str = _key("unit person: the key of each record that names the person; empty: each record a unit", "")
    checkpointing: bool = _key("compute activations twice: about a third more time, much less memory", False)


@dataclass(frozen=True)
class ServeSettings:
    """``[serve]``: one endpoint process."""

    base: Path = _key("folder of the base model")
    registry: str = _key("URL of the coordinator, or a shared registry folder")
    coordinator_key: str = _key("pinned public key that manifests must be signed with")
    tenants: Path = _key("TOML file of tenants and hashed keys")
    host: str = _key("address the OpenAI API listens on", "127.0.0.1")
    port: int = _key("port of the OpenAI API", 8000)
    slots: int = _key("adapters held on the device at once", 8)
    pin_aliases: int = _key("aliases that keep a slot each; the others load when asked for; one slot is left free", 6)
    slot_patience_s: float = _key("seconds a waiting adapter lets others keep all slots", 0.5)
    memory_mb: int = _key("validated adapters kept in memory, MiB", 1024)
    cache: str = _key("folder that keeps fetched adapters, verified when read; empty: none is kept", "")
    cache_mb: int = _key("fetched adapters kept on disk, MiB", 4096)
    max_rank: int = _key("largest LoRA rank a slot takes", 16)
    kv_blocks: int = _key("blocks of the KV cache, 16 tokens each", 512)
    max_running: int = _key("sequences decoded in one step", 16)
    max_waiting: int = _key("requests queued before 429; as many again for tenants below their share", 64)
    threads: int = _key("CPU threads of the engine", 1)
    device: str = _key("cpu or cuda", "cpu")
    dtype: str = _key("bfloat16 or float32", "bfloat16")
    admin_host: str = _key("address of the admin listener: whole metrics, usage, /autoscale", "127.0.0.1")
    admin_port: int = _key("port of the admin listener; 0: none", 0)
    usage: str = _key("SQLite file, or SQLAlchemy URL, of usage records; empty: none are kept", "")
    prompt_log: str = _key("folder of the prompt logs of tenants who opted in; empty: nothing is ever logged", "")
    traces: str = _key("OTLP/HTTP address that traces are sent to; empty: requests are not traced", "")
    observations_token: str = _key("file with the token to report to the coordinator with; empty: no reports", "")
    ttft_objective_s: float = _key("seconds to the first token that /autoscale plans for", 1.0)


@dataclass(frozen=True)
class RouteSettings:
    """``[route]``: one router process before several replicas."""

    replicas: Path = _key("TOML file of the replicas: address, kind and key file of each")
    registry: str = _key("URL of the coordinator, or a shared registry folder")
    coordinator_key: str = _key("pinned public key that manifests must be signed with")
    tenants: Path = _key("TOML file of tenants and hashed keys")
    base_name: str = _key("model id of the base, the name of its folder at the replicas")
    host: str = _key("address the OpenAI API listens on", "127.0.0.1")
    port: int = _key("port of the OpenAI API", 8080)
    admin_host: str = _key("address of the admin listener: whole metrics, usage, replicas, /autoscale", "127.0.0.1")
    admin_port: int = _key("port of the admin listener; 0: none", 0)
    usage: str = _key("SQLite file, or SQLAlchemy URL, of usage records; empty: none are kept", "")
    prompt_log: str = _key("folder of the prompt logs of tenants who opted in; empty: nothing is ever logged", "")
    traces: str = _key("OTLP/HTTP address that traces are sent to; empty: requests are not traced", "")
    observations_token: str = _key("file with the token to report to the coordinator with; empty: no reports", "")
    ttft_objective_s: float = _key("seconds to the first token that in-flight limits adapt to", 1.0)
    max_in_flight: int = _key("requests in flight at one replica at most", 32)
    max_waiting: int = _key("requests queued before 429", 256)
    wait_s: float = _key("seconds a request waits for a replica before 503", 30.0)
    health_s: float = _key("seconds between two looks at a replica's health", 1.0)
    predictions_mb: int = _key("answers at temperature 0 kept for their own tenant, MiB; 0: none", 0)


@dataclass(frozen=True)
class Sourced:
    """One value and where it came from; ``fedllm config show --origin`` prints these."""

    key: str
    value: object
    origin: str


def read_toml(path: Path) -> dict[str, Any]:
    """Return a TOML file's tables; raise `NotFound` or `ConfigError` with the line."""
    if not path.is_file():
        raise NotFound(f"no configuration file {path}", hint="'fedllm init' or 'fedllm client join' writes one")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None


def settle(
    cls: type[T],
    section: str,
    *,
    table: Mapping[str, Any],
    environ: Mapping[str, str],
    flags: Mapping[str, Any],
    folder: Path | None = None,
) -> tuple[T, list[Sourced]]:
    """Merge the sources of one section into `cls`.

    Parameters
    ----------
    cls : type
        A settings dataclass of this module.
    section : str
        Name of the TOML section; ``FEDLLM_<SECTION>_<KEY>`` overrides it.
    table, environ, flags : Mapping
        The sources, weakest first. Flags that are None were not given.
    folder : Path, optional
        Relative paths in the TOML are relative to this (its own folder).

    Raises
    ------
    ConfigError
        Unknown key (with the nearest known one), missing key, or a value of the wrong type.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for key in table:
        if key not in fields:
            raise unknown_key(key, list(fields), where=f"[{section}]")
    values: dict[str, Any] = {}
    sources: list[Sourced] = []
    prefix = f"FEDLLM_{section.split('.', maxsplit=1)[0].upper()}_"
    for key, spec in fields.items():
        variable = prefix + key.upper()
        if flags.get(key) is not None:
            raw, origin = flags[key], "flag"
        elif variable in environ:
            raw, origin = environ[variable], variable
        elif key in table:
            raw, origin = table[key], "toml"
        elif spec.default is not MISSING or spec.default_factory is not MISSING:
            continue
        else:
            raise ConfigError(f"[{section}] {key} is missing: {spec.metadata['doc']}", hint=f"set it, or {variable}")
        values[key] = _convert(raw, hints[key], f"[{section}] {key}", folder if origin == "toml" else None)
        sources.append(Sourced(key, values[key], origin))
    made = cls(**values)
    sources += [Sourced(k, getattr(made, k), "default") for k in fields if k not in values]
    return made, sources


def unknown_key(key: str, known: list[str], *, where: str) -> ConfigError:
    """Return the error for a key nobody knows, with the nearest one that is known."""
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
    return ConfigError(f"{where} has no key {key!r}", hint=hint)


def _convert(raw: Any, hint: Any, where: str, folder: Path | None) -> Any:
    origin = typing.get_origin(hint)
    if hint is Path:
        path = Path(_expect(raw, (str, Path), where)).expanduser()
        return folder / path if folder is not None and not path.is_absolute() else path
    if origin is tuple:
        items = raw.split(",") if isinstance(raw, str) else _expect(raw, (list, tuple), where)
        return tuple(str(item) for item in items)
    if origin is dict:
        value_type = typing.get_args(hint)[1]
        return {str(k): _convert(v, value_type, f"{where}.{k}", None) for k, v in _expect(raw, (dict,), where).items()}
    if isinstance(hint, types.UnionType):
        raise TypeError(f"{where}: settings are not optional; give a default")
    if hint is bool:
        if isinstance(raw, str) and raw.lower() in {"true", "false", "1", "0"}:
            return raw.lower() in {"true", "1"}
        return _expect(raw, (bool,), where)
    if hint in (int, float) and isinstance(raw, str):
        try:
            return hint(raw)
        except ValueError:
            raise ConfigError(f"{where} is {raw!r}: {hint.__name__} expected") from None
    if hint is float:
        return float(_expect(raw, (int, float), where))
    return _expect(raw, (hint,), where)


def _expect(raw: Any, allowed: tuple[type, ...], where: str) -> Any:
    if not isinstance(raw, allowed) or (isinstance(raw, bool) and bool not in allowed):
        names = " or ".join(t.__name__ for t in allowed)
        raise ConfigError(f"{where} is {raw!r}: {names} expected")
    return raw
