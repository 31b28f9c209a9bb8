"""Whatever sigma and data: noise is integer steps on a public grid, and clipping bounds what one record adds."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.privacy.clip import SLACK, clip_l2
from fedllm.privacy.noise import GaussianGrid, discrete_gaussian
from fedllm.rng import SeededRng

SIGMAS = st.floats(1e-6, 1e6, allow_nan=False)
VECTORS = st.lists(st.floats(-1e6, 1e6, allow_nan=False, width=32), min_size=1, max_size=40)


@given(sigma=st.floats(0.05, 2.0**24), count=st.integers(0, 300), seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=60)
def test_any_sigma_gives_the_number_asked_for(sigma: float, count: int, seed: int) -> None:
    """Rejection never returns too few, too many, or a draw beyond twelve standard deviations."""
    drawn = discrete_gaussian(sigma, count, SeededRng(seed))
    assert drawn.shape == (count,)
    assert (np.abs(drawn) <= 12 * sigma + 12).all()


@given(sigma=SIGMAS, values=VECTORS, seed=st.integers(0, 2**32))
@settings(deadline=None, max_examples=60)
def test_outputs_are_grid_multiples_near_the_input(sigma: float, values: list[float], seed: int) -> None:
    """Exact multiples of one power of two, at most twelve sigma and half a step from the input."""
    grid = GaussianGrid(sigma)
    x = np.clip(np.array(values), -1e6 * sigma, 1e6 * sigma)
    noisy = grid.add_noise(x, SeededRng(seed))
    assert math.frexp(grid.step)[0] == 0.5
    assert (noisy / grid.step == np.rint(noisy / grid.step)).all()
    assert (np.abs(noisy - x) <= 12 * sigma + grid.step).all()


@given(values=VECTORS, max_norm=st.floats(1e-3, 1e3))
@settings(deadline=None, max_examples=100)
def test_clipping_bounds_the_norm_and_keeps_the_direction(values: list[float], max_norm: float) -> None:
    """Never longer than allowed, never changed when short enough, never turned."""
    x = np.array(values)
    clipped, norm = clip_l2(x, max_norm)
    assert np.linalg.norm(clipped) <= max_norm * (1 + 1e-12)
    assert norm == np.linalg.norm(x)
    if norm <= max_norm:
        np.testing.assert_array_equal(clipped, x)
    else:
        np.testing.assert_allclose(clipped * norm, x * max_norm, rtol=1e-9)


@given(data=st.data(), size=st.integers(1, 30), records=st.integers(1, 8), noise=st.floats(0.3, 5.0))
@settings(deadline=None, max_examples=60)
def test_neighbouring_sums_on_the_grid_stay_within_the_clip_norm(
    data: st.DataObject, size: int, records: int, noise: float
) -> None:
    """With rounding counted in, removing a record moves the gridded sum by at most C: what the accountant assumes."""
    clip = 0.05
    rows = data.draw(st.lists(st.lists(st.floats(-9, 9), min_size=size, max_size=size), min_size=records,
                              max_size=records))  # fmt: skip
    clipped = [clip_l2(np.array(row), clip * (1 - SLACK))[0] for row in rows]
    grid = GaussianGrid(noise * clip)
    grid.check(size, clip)
    with_it = np.rint(np.sum(clipped, axis=0) / grid.step)
    without = np.rint(np.sum(clipped[1:], axis=0) / grid.step) if records > 1 else np.zeros(size)
    assert np.linalg.norm(with_it - without) * grid.step <= clip
