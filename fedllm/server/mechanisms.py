"""From a federation's settings to the mechanism of its rounds, and to the weights that it allows."""

from __future__ import annotations

from math import ceil

from fedllm.config import FederationSettings
from fedllm.errors import ConfigError, PolicyRefused
from fedllm.messages.mechanism import (
    DP_FTRL,
    DP_SGD,
    RELATION_ADD_REMOVE,
    RELATION_ZERO_OUT,
    SKELLAM,
    UNIT_OWNER,
    UNIT_RECORD,
    AdaptiveClip,
    Mechanism,
    NoiseShares,
    Stream,
)
from fedllm.messages.plan import honest_threshold


def make_mechanism(settings: FederationSettings, *, owners: int, least: int, dimension: int) -> Mechanism:
    """Return the mechanism that a federation's settings ask for.

    Parameters
    ----------
    owners : int
        Size of the cohort.
    least : int
        Owners in the smallest sum that is opened.
    dimension : int
        Entries of the update.

    Raises
    ------
    ConfigError
        If the settings make no mechanism.
    PolicyRefused
        If no honest owner's noise is sure to be in a sum, or the noise drowns the signal and nobody said yes to that.
    """
    if not settings.privacy:
        return Mechanism.none()
    try:
        if settings.mechanism == DP_SGD:
            return _in_silo(settings, settings.sample_rate, adaptive=_adaptive(settings))
        if settings.mechanism == DP_FTRL:
            return _in_silo(settings, 1.0, stream=_stream(settings))
        if settings.mechanism == SKELLAM:
            made = _in_ring(settings, owners, least, dimension)
            _acknowledged(made, owners, settings)
            return made
    except ValueError as error:
        raise ConfigError(f"federation {settings.name}: {error}") from None
    raise ConfigError(
        f"federation {settings.name}: mechanism {settings.mechanism!r}: {DP_SGD}, {DP_FTRL} or {SKELLAM} allowed"
    )


def least_survivors(settings: FederationSettings, owners: int, least: int) -> int:
    """Return the fewest owners of a sum that is opened.

    Noise shares are made for that number, so that it is as large as the dropout rate planned for allows.
    """
    if not settings.privacy or settings.mechanism != SKELLAM:
        return least
    return max(least, honest_threshold(owners), owners - ceil(settings.dropout * owners))


def _in_silo(
    settings: FederationSettings,
    sample_rate: float,
    *,
    adaptive: AdaptiveClip | None = None,
    stream: Stream | None = None,
) -> Mechanism:
    return Mechanism(
        kind=settings.mechanism,
        unit=UNIT_RECORD,
        relation=RELATION_ADD_REMOVE,
        noise_multiplier=settings.noise_multiplier,
        clip_norm=settings.clip_norm,
        sample_rate=sample_rate,
        steps=settings.local_steps,
        delta=settings.delta,
        adaptive=adaptive,
        stream=stream,
    )


def _stream(settings: FederationSettings) -> Stream:
    name = f"{settings.name}/{settings.stream}"
    return Stream(name, settings.stream_steps, settings.stream_band, settings.stream_separation)


def _in_ring(settings: FederationSettings, owners: int, least: int, dimension: int) -> Mechanism:
    colluders = ceil(settings.corruption * owners)
    if least <= colluders:
        raise PolicyRefused(
            f"a sum of {least} owners, {colluders} of whom may collude, holds no noise to count on",
            hint="raise min_survivors, or lower dropout or corruption",
        )
    return Mechanism(
        kind=SKELLAM,
        unit=UNIT_OWNER,
        relation=RELATION_ZERO_OUT,
        noise_multiplier=settings.noise_multiplier,
        clip_norm=settings.clip_norm,
        sample_rate=1.0,
        steps=1,
        delta=settings.delta,
        shares=NoiseShares(least - colluders, dimension, 1 << (settings.value_bits - 1)),
    )


def _adaptive(settings: FederationSettings) -> AdaptiveClip | None:
    if settings.clip_quantile == 0:
        return None
    return AdaptiveClip(settings.clip_quantile, settings.clip_rate, settings.clip_count_noise)


def _acknowledged(mechanism: Mechanism, owners: int, settings: FederationSettings) -> None:
    ratio = mechanism.noise_over_signal(owners)
    if ratio > 1 and not settings.acknowledge_noise:
        raise PolicyRefused(
            f"federation {settings.name}: noise over signal is {ratio:.3g} with {owners} owners, 1 at most allowed"
            " unasked: the sum would be mostly noise",
            hint="more owners, a smaller adapter or a larger epsilon; or set acknowledge_noise = true",
        )


def public_weights(mechanism: Mechanism, declared: dict[str, int]) -> dict[str, float] | None:
    """Return the weights of a round: 1 each where owners are the unit, shares of the largest declared size else.

    None without privacy: each owner then weighs by its own masked count.
    """
    if not mechanism.covered:
        return None
    if mechanism.unit == UNIT_OWNER:
        return dict.fromkeys(declared, 1.0)
    # so that no weight passes 1 and none depends on a private count
    largest = max(declared.values())
    return {owner: count / largest for owner, count in declared.items()}
