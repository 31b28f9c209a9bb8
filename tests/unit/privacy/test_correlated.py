"""The correlated noise against dense matrices, against published constants, and against independent noise."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from scipy import linalg, stats

from fedllm.errors import ConfigError, IntegrityError, NonFiniteUpdate, PolicyRefused
from fedllm.messages.mechanism import Stream
from fedllm.privacy import correlated
from fedllm.privacy.clip import SLACK
from fedllm.privacy.correlated import CorrelatedSum
from fedllm.privacy.noise import GaussianGrid
from fedllm.rng import OsRng, SeededRng

ALPHA = 1e-6  # false-alarm rate of every statistical test here
NOISE, CLIP = 0.8, 0.05
STREAMS = [
    Stream("one use", 12, 12, 12), Stream("banded", 30, 4, 10), Stream("tight", 17, 5, 5), Stream("no band", 9, 1, 3),
    Stream("longer band than stream", 5, 8, 20), Stream("one step", 1, 3, 3), Stream("cut off", 11, 4, 5),
]  # fmt: skip
each_stream = pytest.mark.parametrize("stream", STREAMS, ids=lambda stream: stream.name)


def dense(stream: Stream) -> np.ndarray:
    """Return C from the definition: the principal square root of the prefix-sum matrix, cut to its band."""
    root = linalg.sqrtm(np.tri(stream.steps)).real
    return root - np.tril(root, -stream.band)


def machine(stream: Stream, dimension: int) -> CorrelatedSum:
    """Return a fresh machine with this file's numbers."""
    return CorrelatedSum(stream, noise_multiplier=NOISE, clip_norm=CLIP, dimension=dimension)


def ran(stream: Stream, totals: np.ndarray, rng: object) -> np.ndarray:
    """Return the estimates of a whole stream, ``(steps, dimension)``."""
    sums = machine(stream, totals.shape[1])
    return np.array([sums.step(total, rng) for total in totals])


def gradients(stream: Stream, dimension: int, seed: int = 3) -> np.ndarray:
    """Return made-up gradient sums, ``(steps, dimension)``."""
    return np.random.default_rng(seed).normal(size=(stream.steps, dimension))


@each_stream
def test_c_is_the_banded_square_root_of_the_prefix_sums(stream: Stream) -> None:
    """The closed form against a numerical matrix square root; without a band, C C is the matrix of prefix sums."""
    c = correlated.coefficients(stream.band)[: stream.steps]
    matrix = linalg.toeplitz(np.pad(c, (0, stream.steps - c.size)), np.zeros(stream.steps))
    np.testing.assert_allclose(matrix, dense(stream), atol=1e-9)
    if stream.band >= stream.steps:
        np.testing.assert_allclose(matrix @ matrix, np.tri(stream.steps), atol=1e-12)


def test_first_coefficients_are_the_known_fractions() -> None:
    """1, 1/2, 3/8, 5/16, 35/128: binom(2k, k) / 4^k."""
    np.testing.assert_array_equal(correlated.coefficients(5), [1, 1 / 2, 3 / 8, 5 / 16, 35 / 128])


@each_stream
def test_releases_and_estimates_equal_the_dense_formulas(stream: Stream) -> None:
    """The naive twin: r is C G on the grid plus the noise that the same generator gives, the estimate is C^-1 r."""
    totals, matrix = gradients(stream, 6), dense(stream)
    grid = GaussianGrid(NOISE * correlated.sensitivity(stream) * CLIP)
    recorder = SeededRng("twin")
    noise = np.array([grid.add_noise(np.zeros(6), recorder) for _ in range(stream.steps)])
    released = np.rint(matrix @ totals / grid.step) * grid.step + noise
    estimates = ran(stream, totals, SeededRng("twin"))
    np.testing.assert_allclose(estimates, np.linalg.solve(matrix, released), atol=1e-9)
    steps = matrix @ estimates / grid.step
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-3)  # what was released are whole grid steps
    assert np.abs(estimates - totals).max() > 100 * grid.step  # and the noise is there


@each_stream
def test_sensitivity_is_that_of_the_worst_participation_pattern(stream: Stream) -> None:
    """Brute force over every set of steps that one unit may be used in, with the dense matrix."""
    matrix, worst = dense(stream), 0.0
    patterns = 0
    for uses in range(1, stream.participations + 1):
        for pattern in itertools.combinations(range(stream.steps), uses):
            if all(later - sooner >= stream.separation for sooner, later in itertools.pairwise(pattern)):
                patterns += 1
                # equal gradients of norm 1 are the worst where entries of C are not negative; see the next test
                worst = max(worst, float(np.linalg.norm(matrix[:, pattern].sum(axis=1))))
    assert patterns >= stream.steps
    assert correlated.sensitivity(stream) == pytest.approx(worst, rel=1e-9)
    bound = math.sqrt(stream.participations) * np.linalg.norm(correlated.coefficients(stream.band))
    assert correlated.sensitivity(stream) <= bound * (1 + 1e-12)


def test_directions_of_the_gradients_do_not_matter() -> None:
    """Columns that share no row: any unit vectors at all give the same norm."""
    stream = Stream("s", 30, 4, 10)
    for seed in range(5):
        directions = gradients(stream, 3, seed)[::10]
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        totals = np.zeros((30, 3))
        totals[::10] = directions
        assert np.linalg.norm(dense(stream) @ totals) == pytest.approx(correlated.sensitivity(stream), rel=1e-9)


def test_whole_columns_give_the_plain_formula() -> None:
    """sqrt(participations) times the norm of c, if the stream's end cuts no column off; less if it does."""
    norm = np.linalg.norm(correlated.coefficients(4))
    assert correlated.sensitivity(Stream("s", 30, 4, 10)) == pytest.approx(math.sqrt(3) * norm)
    assert correlated.sensitivity(Stream("s", 23, 4, 10)) < math.sqrt(3) * norm * 0.999


@each_stream
def test_errors_are_those_of_the_dense_matrices(stream: Stream) -> None:
    """Row norms of A C^-1 and of C^-1, times the sensitivity."""
    inverse = np.linalg.inv(dense(stream))
    rows = np.linalg.norm(np.tri(stream.steps) @ inverse, axis=1)
    scale = correlated.sensitivity(stream)
    assert correlated.max_error(stream) == pytest.approx(scale * rows.max(), rel=1e-9)
    assert correlated.prefix_error(stream) == pytest.approx(scale * math.sqrt((rows**2).mean()), rel=1e-9)
    assert correlated.step_noise(stream) == pytest.approx(scale * np.linalg.norm(inverse, axis=1).max(), rel=1e-9)


@pytest.mark.parametrize("steps", [2, 8, 64, 256])
def test_full_band_meets_the_published_constants(steps: int) -> None:
    """The sum of c_k^2, Landau's constant: between D. Zhao's bounds (quoted in Popa 2010), above what any matrix needs.

    No factorisation of the prefix sums has a lower largest error than (2 + ln((2n + 1) / 3)) / pi (Matousek, Nikolov,
    Talwar 2020).
    """
    error = correlated.max_error(Stream("s", steps, steps, steps))
    assert error == pytest.approx(sum((math.comb(2 * k, k) / 4**k) ** 2 for k in range(steps)), rel=1e-12)
    near = (math.log(steps) + 0.5772156649015329 + math.log(16) - 1 / (4 * steps) + 5 / (192 * steps**2)) / math.pi
    assert near < error <= near + 3 / (128 * math.pi * steps**3)
    lowest = (2 + math.log((2 * steps + 1) / 3)) / math.pi
    assert 0 < error - lowest < 0.56


def test_independent_noise_has_the_textbook_error() -> None:
    """Band 1: the variances of the steps add up, and each unit's uses do."""
    stream = correlated.independent(Stream("s", 64, 8, 16))
    assert (stream.band, stream.steps, stream.separation) == (1, 64, 16)
    assert correlated.sensitivity(stream) == correlated.step_noise(stream) == 2
    assert correlated.max_error(stream) == pytest.approx(2 * math.sqrt(64))
    assert correlated.prefix_error(stream) == pytest.approx(2 * math.sqrt(65 / 2))


@pytest.mark.parametrize(
    ("stream", "ratio"),
    [(Stream("s", 64, 64, 64), 2.5568), (Stream("s", 64, 8, 64), 2.0963), (Stream("s", 64, 16, 16), 2.4149)],
)
def test_correlation_beats_independent_noise_at_the_same_epsilon(stream: Stream, ratio: float) -> None:
    """Same noise multiplier, so same epsilon: prefix sums of 64 steps are at least twice as accurate.

    A single step is not: that is the price, and training does not read single steps.
    """
    plain = correlated.independent(stream)
    assert correlated.prefix_error(plain) / correlated.prefix_error(stream) == pytest.approx(ratio, abs=1e-4)
    assert correlated.step_noise(stream) > correlated.step_noise(plain)


def test_noise_has_the_variance_and_the_correlation_that_was_computed() -> None:
    """Undone by C, the noise is white with the standard deviation z s C; as it stands, its covariance is C^-1 C^-T."""
    stream, dimension = Stream("s", 24, 6, 12), 5000
    noise = ran(stream, np.zeros((24, dimension)), SeededRng("variance"))
    sigma = NOISE * correlated.sensitivity(stream) * CLIP
    white = dense(stream) @ noise / sigma
    low, high = stats.chi2.ppf([ALPHA / 2, 1 - ALPHA / 2], df=white.size)
    assert low < (white**2).sum() < high
    deviations = math.sqrt(2 / dimension) * stats.norm.isf(ALPHA / 24**2)
    np.testing.assert_allclose(white @ white.T / dimension, np.eye(24), atol=deviations)
    last = noise[-1] / (NOISE * CLIP * correlated.step_noise(stream))
    total = noise.sum(axis=0) / (NOISE * CLIP * correlated.max_error(stream))
    low, high = stats.chi2.ppf([ALPHA / 2, 1 - ALPHA / 2], df=dimension)
    assert low < (last**2).sum() < high
    assert low < (total**2).sum() < high
    # neighbouring steps are anticorrelated, which is what cancels
    assert np.corrcoef(noise[-1], noise[-2])[0, 1] < -0.2


def test_noise_comes_from_the_port_and_nowhere_else() -> None:
    """The same port, the same noise; another, another; and every step asks the port for at least 8 bytes an entry."""

    class Counted(SeededRng):
        asked = 0

        def token(self, size: int) -> bytes:
            self.asked += size
            return super().token(size)

    stream, totals = STREAMS[1], gradients(STREAMS[1], 40)
    counted = Counted(5)
    first = ran(stream, totals, counted)
    assert counted.asked >= 8 * totals.size
    np.testing.assert_array_equal(first, ran(stream, totals, SeededRng(5)))
    assert (first != ran(stream, totals, SeededRng(6))).all()
    assert (ran(stream, totals, OsRng()) != ran(stream, totals, OsRng())).all()


def test_later_steps_may_depend_on_earlier_estimates_only() -> None:
    """A row reads no later gradient: C is lower-triangular, which adaptivity needs."""
    stream = STREAMS[1]
    totals = gradients(stream, 5)
    other = totals.copy()
    other[20:] = -7
    first, second = ran(stream, totals, SeededRng(1)), ran(stream, other, SeededRng(1))
    np.testing.assert_array_equal(first[:20], second[:20])
    assert (first[20:] != second[20:]).all()


@each_stream
def test_a_stored_state_goes_on_bit_for_bit(stream: Stream) -> None:
    """Stored and read back after every step, the stream is the one that was never interrupted."""
    totals, rng = gradients(stream, 5), SeededRng("resume")
    expected = ran(stream, totals, SeededRng("resume"))
    sums = machine(stream, 5)
    for total, wanted in zip(totals, expected, strict=True):
        sums = CorrelatedSum.from_arrays(
            sums.to_arrays(), stream, noise_multiplier=NOISE, clip_norm=CLIP, dimension=5
        )  # fmt: skip
        np.testing.assert_array_equal(sums.step(total, rng), wanted)
    assert sums.taken == stream.steps
    state = sums.to_arrays()
    assert len(state["gradients"]) == len(state["estimates"]) == min(stream.steps, stream.band - 1)


def test_a_stream_ends() -> None:
    """No row beyond those that are priced, however it is asked for."""
    sums = machine(Stream("s", 2, 2, 2), 3)
    sums.check_room(2)
    for _ in range(2):
        sums.step(np.zeros(3), SeededRng(0))
    for act in (lambda: sums.step(np.zeros(3), SeededRng(0)), lambda: sums.skip_to(3), lambda: sums.check_room(1)):
        with pytest.raises(PolicyRefused, match="2 in all"):
            act()
    assert sums.taken == 2


def test_lost_rows_only_shorten_columns() -> None:
    """After a loss the estimates are C^-1 of rows that leave the lost gradients out: the naive twin, and the norm."""
    stream, totals = Stream("s", 12, 4, 6), gradients(Stream("s", 12, 4, 6), 3)
    matrix = dense(stream)
    grid = GaussianGrid(NOISE * correlated.sensitivity(stream) * CLIP)
    sums, rng, twin = machine(stream, 3), SeededRng("lost"), SeededRng("lost")
    released = np.zeros((12, 3))
    seen = totals.copy()
    seen[5:7] = 0
    estimates = np.zeros((12, 3))
    for t in [0, 1, 2, 3, 4, 7, 8, 9, 10, 11]:
        sums.skip_to(t)
        got = sums.step(totals[t], rng)
        released[t] = np.rint(matrix[t] @ seen / grid.step) * grid.step + grid.add_noise(np.zeros(3), twin)
        estimates[t] = released[t] - matrix[t, :t] @ estimates[:t]
        np.testing.assert_allclose(got, estimates[t], atol=1e-9)
    assert sums.taken == 12
    # worst unit: its rows before the loss are released with it, those after without what was lost
    cut = matrix.copy()
    cut[5:7] = 0
    cut[7:, 5:7] = 0
    assert (np.linalg.norm(cut, axis=0) <= np.linalg.norm(matrix, axis=0)).all()


def test_going_back_is_not_possible() -> None:
    """Skipping to a row that was taken does nothing: rows are counted upwards only."""
    sums = machine(Stream("s", 9, 3, 3), 2)
    sums.skip_to(6)
    sums.skip_to(1)
    assert sums.taken == 6


def test_a_row_released_twice_costs_more_than_the_stream_is_charged_for() -> None:
    """Why a stream must never begin again, though the number of steps would be right: half of it run twice."""
    stream = Stream("s", 16, 4, 16)
    half = dense(stream)[:8]
    twice = np.vstack([half, half])  # 16 rows in all, as charged
    worst = np.linalg.norm(twice, axis=0).max()
    assert worst == pytest.approx(math.sqrt(2) * correlated.sensitivity(stream))


def test_rounding_of_all_rows_of_a_unit_fits_the_slack() -> None:
    """2 uses of 4 rows each in 30,720 entries fit at this noise; the same with 64 rows, or more noise, is refused."""
    CorrelatedSum(Stream("s", 40, 4, 20), noise_multiplier=0.9, clip_norm=CLIP, dimension=30_720)
    for stream, noise in [(Stream("s", 400, 32, 200), 16.0), (Stream("s", 40, 4, 20), 72.0)]:
        with pytest.raises(ConfigError, match="noise grid"):
            CorrelatedSum(stream, noise_multiplier=noise, clip_norm=CLIP, dimension=30_720)


def test_neighbouring_streams_on_the_grid_stay_within_the_sensitivity() -> None:
    """Rounding counted in, whatever else is in the sums; with the slack of clipping left out, they need not."""
    stream, dimension = Stream("s", 12, 4, 6), 50
    grid = GaussianGrid(NOISE * correlated.sensitivity(stream) * CLIP)
    others, direction = gradients(stream, dimension), gradients(stream, dimension, 9)
    unit = np.zeros_like(others)
    unit[::6] = CLIP * (1 - SLACK) * direction[::6] / np.linalg.norm(direction[::6], axis=1, keepdims=True)

    def gridded(totals: np.ndarray) -> np.ndarray:
        return np.rint(dense(stream) @ totals / grid.step) * grid.step

    moved = np.linalg.norm(gridded(others + unit) - gridded(others))
    assert 0.99 * CLIP * correlated.sensitivity(stream) < moved <= CLIP * correlated.sensitivity(stream)


def test_only_sums_of_the_right_form_are_taken() -> None:
    """A wrong shape would be broadcast, NaN would look like an update; neither takes a row."""
    sums = machine(Stream("s", 4, 2, 2), 3)
    with pytest.raises(ValueError, match="shape"):
        sums.step(np.zeros(1), SeededRng(0))
    with pytest.raises(NonFiniteUpdate):
        sums.step(np.array([0.0, np.nan, 0.0]), SeededRng(0))
    assert sums.taken == 0


def test_the_callers_arrays_are_its_own() -> None:
    """Writing to what went in, or to what came out, changes no later row."""
    stream, totals = STREAMS[1], gradients(STREAMS[1], 4)
    sums, rng, got = machine(stream, 4), SeededRng(2), []
    for total in totals:
        buffer = total.copy()
        estimate = sums.step(buffer, rng)
        got.append(estimate.copy())
        buffer[:] = estimate[:] = 1e6
    np.testing.assert_array_equal(got, ran(stream, totals, SeededRng(2)))


@pytest.mark.parametrize(
    "change",
    [{"steps": 31}, {"band": 3}, {"separation": 11}, {"name": "x"}, {"noise_multiplier": 0.9}, {"clip_norm": 0.06},
     {"dimension": 6}],
)  # fmt: skip
def test_a_stream_keeps_its_numbers(change: dict[str, float]) -> None:
    """Rows of another sensitivity would have no common price with those released already."""
    stream = STREAMS[1]
    sums = machine(stream, 5)
    sums.step(np.zeros(5), SeededRng(0))
    numbers = {"noise_multiplier": NOISE, "clip_norm": CLIP, "dimension": 5}
    other = dataclasses.replace(stream, **{k: v for k, v in change.items() if k not in numbers})
    numbers.update({k: v for k, v in change.items() if k in numbers})
    with pytest.raises(PolicyRefused, match=next(iter(change))):
        CorrelatedSum.from_arrays(sums.to_arrays(), other, **numbers)


def test_arrays_of_another_form_are_no_state() -> None:
    """Rows missing, of another shape, or no facts at all."""
    stream = STREAMS[1]
    sums = machine(stream, 5)
    for _ in range(6):
        sums.step(np.zeros(5), SeededRng(0))
    good = sums.to_arrays()
    for bad in (
        {},
        {**good, "facts": np.frombuffer(b"[]", dtype=np.uint8)},
        {**good, "gradients": good["gradients"][1:]},
        {**good, "estimates": good["estimates"][:, 1:]},
    ):
        with pytest.raises(IntegrityError, match="form"):
            CorrelatedSum.from_arrays(bad, stream, noise_multiplier=NOISE, clip_norm=CLIP, dimension=5)


def test_what_is_printed_holds_no_gradient() -> None:
    """The machine keeps sums without noise; its name and place are all it shows."""
    sums = machine(STREAMS[1], 2)
    sums.step(np.array([0.123, 0.456]), SeededRng(0))
    assert repr(sums) == "CorrelatedSum('banded', step 1 of 30, gradients redacted)"
