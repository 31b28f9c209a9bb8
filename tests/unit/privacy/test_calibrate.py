"""Noise solved for a budget: never over it by the ledger's own price, never a step more than needed."""

from __future__ import annotations

import dataclasses
import math

import pytest

from fedllm.errors import ConfigError
from fedllm.messages.mechanism import (
    RELATION_ADD_REMOVE,
    RELATION_ZERO_OUT,
    UNIT_OWNER,
    UNIT_RECORD,
    AdaptiveClip,
    Mechanism,
    NoiseShares,
    Stream,
)
from fedllm.privacy.accountant import epsilon
from fedllm.privacy.calibrate import noise_multiplier, signal_to_noise, solve

SGD = Mechanism("dp-sgd", UNIT_RECORD, RELATION_ADD_REMOVE, 1.0, 0.05, 0.25, 2, 1e-5)
FTRL = Mechanism(
    "dp-ftrl", UNIT_RECORD, RELATION_ADD_REMOVE, 1.0, 0.05, 1.0, 2, 1e-5, stream=Stream("s", 24, 4, 8)
)  # fmt: skip
SHARES = Mechanism(
    "skellam", UNIT_OWNER, RELATION_ZERO_OUT, 1.0, 0.05, 1.0, 1, 1e-5, shares=NoiseShares(3, 30_720, 1 << 20)
)  # fmt: skip


@pytest.mark.parametrize(("target", "rate", "steps", "noise"), [(8.0, 0.25, 8, 0.80), (3.0, 1.0, 4, 2.79)])
def test_known_noise_for_a_budget(target: float, rate: float, steps: int, noise: float) -> None:
    """Measured once with dp-accounting directly, to 0.01 and rounded up, at delta 1e-5."""
    found = noise_multiplier(epsilon=target, delta=1e-5, sample_rate=rate, steps=steps)
    assert found == pytest.approx(noise, abs=0.01)
    spent = epsilon([dataclasses.replace(SGD, noise_multiplier=found, sample_rate=rate, steps=steps)], 1e-5)
    assert target - 0.05 < spent <= target


@pytest.mark.parametrize(
    ("template", "unit", "budget", "rounds"),
    [
        (SGD, "record", 2.0, 3),
        (dataclasses.replace(SGD, sample_rate=0.01), "person", 0.3, 20),
        (FTRL, "record", 2.0, 9),
        (SHARES, "owner", 8.0, 10),
        (SHARES, "record", 8.0, 10),
        (SGD, "record", 150.0, 4),
    ],
)
def test_the_smallest_noise_within_the_budget(template: Mechanism, unit: str, budget: float, rounds: int) -> None:
    """By the ledger's price: what is found fits, and a thousandth less does not."""
    found = solve(template, epsilon=budget, delta=1e-5, rounds=rounds, unit=unit)
    assert found == round(found, 3)

    def spent(noise: float) -> float:
        return epsilon([dataclasses.replace(template, noise_multiplier=noise)] * rounds, 1e-5, unit=unit)

    assert spent(found) <= budget < spent(round(found - 0.001, 3))


def test_rounds_of_one_stream_need_no_more_noise() -> None:
    """The stream is charged once; rounds of DP-SGD are charged each."""
    assert solve(FTRL, epsilon=2.0, delta=1e-5, rounds=9) == solve(FTRL, epsilon=2.0, delta=1e-5, rounds=1)
    assert solve(SHARES, epsilon=8.0, delta=1e-5, rounds=4, unit="owner") == pytest.approx(
        2 * solve(SHARES, epsilon=8.0, delta=1e-5, rounds=1, unit="owner"), abs=0.002
    )


def test_a_large_budget_still_gets_some_noise() -> None:
    """Below a tenth nothing is searched: such noise protects nobody."""
    assert solve(SGD, epsilon=1e6, delta=1e-5, rounds=1) == 0.1


def test_adaptive_clipping_needs_room_for_its_count() -> None:
    """The same noise as without, unless the count's noise is too little for it: then the error says how much is."""
    plain = solve(SGD, epsilon=3.0, delta=1e-5, rounds=1)
    roomy = dataclasses.replace(SGD, adaptive=AdaptiveClip(0.5, 0.2, count_noise=10.0))
    assert solve(roomy, epsilon=3.0, delta=1e-5, rounds=1) == plain
    tight = dataclasses.replace(
        SGD, noise_multiplier=0.1, adaptive=AdaptiveClip(0.5, 0.2, count_noise=4.0)
    )  # fmt: skip
    needed = solve(SGD, epsilon=0.1, delta=1e-5, rounds=1)
    assert needed > 8
    with pytest.raises(ConfigError, match=f"noise multiplier of {needed:g} is needed") as raised:
        solve(tight, epsilon=0.1, delta=1e-5, rounds=1)
    assert raised.value.hint is not None
    assert f"above {needed / 2:g}" in raised.value.hint


def test_what_nothing_bounds_is_refused() -> None:
    """DP-SGD for owners, no mechanism for anybody."""
    for template, unit in ((SGD, "owner"), (FTRL, "owner"), (Mechanism.none(), "record")):
        with pytest.raises(ConfigError, match=f"nothing bounds what it costs per {unit}"):
            solve(template, epsilon=3.0, delta=1e-5, rounds=1, unit=unit)


def test_impossible_budgets_are_refused() -> None:
    """Numbers out of range name the range; budgets that no noise meets say so."""
    for numbers in (
        {"epsilon": 1.0, "sample_rate": 0.0, "steps": 1},
        {"epsilon": 0.0, "sample_rate": 0.5, "steps": 1},
        {"epsilon": math.nan, "sample_rate": 0.5, "steps": 1},
        {"epsilon": 1.0, "sample_rate": 0.5, "steps": 0},
    ):
        with pytest.raises(ConfigError, match="sample rate"):
            noise_multiplier(delta=1e-5, **numbers)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="rounds 0"):
        solve(SGD, epsilon=1.0, delta=1e-5, rounds=0)
    with pytest.raises(ConfigError, match="no noise multiplier to 4096 suffices"):
        solve(dataclasses.replace(SGD, sample_rate=1.0, steps=10_000), epsilon=0.01, delta=1e-9, rounds=1)


def test_signal_to_noise_by_hand() -> None:
    """Expected units over noise times the root of the dimension; clip norms cancel; without noise it is infinite."""
    sgd = dataclasses.replace(SGD, noise_multiplier=2.0)
    assert signal_to_noise(sgd, dimension=2500, records=400) == pytest.approx(0.25 * 400 / (2 * 50))
    adaptive = dataclasses.replace(sgd, noise_multiplier=8.0, adaptive=AdaptiveClip(0.5, 0.2, 5.0))
    assert signal_to_noise(adaptive, dimension=2500, records=400) == pytest.approx(0.15), "noise of gradients 40/3"
    # No band: each unit is in one step of eight of a stream of 24, three times in all, with noise of its own each time.
    alone = dataclasses.replace(FTRL, noise_multiplier=2.0, stream=Stream("s", 24, 1, 8))
    assert signal_to_noise(alone, dimension=2500, records=400) == pytest.approx(400 / 8 / (2 * math.sqrt(3) * 50))
    # Ten owners at the clip norm C against noise of 3 C / sqrt(3) an owner and entry.
    owners = dataclasses.replace(SHARES, noise_multiplier=3.0)
    expected = 10 / (3 * math.sqrt(10 / 3) * math.sqrt(30_720))
    assert signal_to_noise(owners, dimension=30_720, records=10) == pytest.approx(expected)
    assert signal_to_noise(Mechanism.none(), dimension=10, records=1) == math.inf
    with pytest.raises(ValueError, match="at least 1"):
        signal_to_noise(sgd, dimension=0, records=1)
