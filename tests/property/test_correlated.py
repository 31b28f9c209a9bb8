"""Whatever stream, data and crashes: units keep their place and their distance, and no row is ever drawn twice."""

from __future__ import annotations

import hashlib
import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.client.dpftrl import StreamStore, block, train_stream
from fedllm.errors import IntegrityError, PolicyRefused
from fedllm.messages.mechanism import DP_FTRL, RELATION_ADD_REMOVE, UNIT_RECORD, Mechanism, Stream
from fedllm.privacy import correlated
from fedllm.privacy.clip import SLACK
from fedllm.privacy.correlated import CorrelatedSum
from fedllm.privacy.noise import GaussianGrid
from fedllm.rng import SeededRng

CLIP, NOISE, DIMENSION = 0.1, 1.2, 3


@st.composite
def streams(draw: st.DrawFn) -> Stream:
    """Any stream of up to 40 steps."""
    band = draw(st.integers(1, 9))
    name = draw(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=9))
    return Stream(name, draw(st.integers(1, 40)), band, draw(st.integers(band, 14)))


KEYS = st.lists(st.binary(min_size=1, max_size=8), max_size=25)


def mechanism(stream: Stream, steps: int) -> Mechanism:
    """Return one round's mechanism."""
    return Mechanism(
        DP_FTRL, UNIT_RECORD, RELATION_ADD_REMOVE, noise_multiplier=NOISE, clip_norm=CLIP, sample_rate=1, steps=steps,
        delta=1e-5, stream=stream,
    )  # fmt: skip


class Killed(BaseException):
    """Stands for the process ending."""


@pytest.fixture(autouse=True, scope="module")
def _without_waiting_for_the_disk() -> Iterator[None]:
    """Crashes here end a process, not the machine; when a file is synced is asked in the unit tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


def usage(folder: Path, stream: Stream, keys: Sequence[bytes], steps: int, *, kill: int = 0) -> list[list[bytes]]:
    """Train one round; return the keys used in each of its steps, as far as it came."""
    used: list[list[bytes]] = [[]]

    def gradient(indices: Sequence[int]) -> np.ndarray:
        used[-1] = [keys[i] for i in indices]
        return np.zeros(DIMENSION)

    def progress(done: int, _: int) -> None:
        if done == kill:
            raise Killed
        used.append([])

    try:
        train_stream(
            gradient, keys, np.zeros(DIMENSION), mechanism=mechanism(stream, steps), learning_rate=1.0,
            declared_records=10, store=StreamStore(folder), rng=SeededRng(0), progress=progress,
            assign=lambda _: None,
        )  # fmt: skip
    except Killed:
        return used
    return used[:-1]


@given(stream=streams(), keys=KEYS, extra=st.binary(min_size=1, max_size=8), at=st.integers(0, 25))
@settings(deadline=None, max_examples=30)
def test_adding_a_unit_moves_nobody(stream: Stream, keys: list[bytes], extra: bytes, at: int) -> None:
    """Neighbouring data sets differ in the new unit's own steps and nowhere else, wherever it is put in."""
    more = [*keys[:at], extra, *keys[at:]]
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        without = usage(Path(one), stream, keys, stream.steps)
        with_it = usage(Path(other), stream, more, stream.steps)
    assert len(without) == len(with_it) == stream.steps
    for step, (before, after) in enumerate(zip(without, with_it, strict=True)):
        own = [extra] if step % stream.separation == block(stream, extra) else []
        assert sorted(after) == sorted([*before, *own])


@given(stream=streams(), key=st.binary(min_size=1, max_size=40), splits=st.lists(st.integers(1, 7), max_size=12))
@settings(deadline=None, max_examples=40)
def test_a_unit_keeps_its_distance_and_its_number_of_uses(stream: Stream, key: bytes, splits: list[int]) -> None:
    """At least `separation` steps apart and at most `participations` times, however rounds divide the stream."""
    used: list[list[bytes]] = []
    with tempfile.TemporaryDirectory() as folder:
        for wanted in [*splits, stream.steps]:
            count = min(wanted, stream.steps - len(used))
            if count:
                used += usage(Path(folder), stream, [key], count)
    steps = [step for step, units in enumerate(used) if units]
    assert len(used) == stream.steps
    assert all(later - sooner >= stream.separation for sooner, later in itertools.pairwise(steps))
    assert len(steps) <= stream.participations
    assert steps == list(range(block(stream, key), stream.steps, stream.separation))


ROUNDS = st.lists(st.tuples(st.integers(1, 8), st.integers(0, 8)), max_size=12)


@given(rounds=ROUNDS)
@settings(deadline=None, max_examples=30)
def test_no_crash_makes_a_row_come_twice(rounds: list[tuple[int, int]]) -> None:
    """Rounds that end or are killed after some steps: every unit of a once-only stream is used once at most."""
    stream = Stream("once", 30, 4, 30)
    keys = [hashlib.sha256(bytes([n, m])).digest() for n in range(20) for m in range(10)]
    seen: list[bytes] = []
    spent = 0
    with tempfile.TemporaryDirectory() as folder:
        for steps, kill in rounds:
            if spent + steps > stream.steps:
                with pytest.raises(PolicyRefused):
                    usage(Path(folder), stream, keys, steps)
                continue
            seen += [key for units in usage(Path(folder), stream, keys, steps, kill=kill) for key in units]
            spent += steps  # lost or not
            state = StreamStore(Path(folder)).load("once")
            assert state is not None
            assert state.claimed == spent
    assert len(seen) == len(set(seen))


@given(at=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
@settings(deadline=None, max_examples=30)
def test_no_byte_of_a_state_changes_unnoticed(at: float, flip: int) -> None:
    """One changed byte, and the stream is refused instead of going on with other sums."""
    stream = Stream("bytes", 12, 4, 6)
    with tempfile.TemporaryDirectory() as folder:
        usage(Path(folder), stream, [b"a", b"b"], 6)
        path = next(Path(folder).glob("*.state"))
        data = bytearray(path.read_bytes())
        data[int(at * len(data))] ^= flip
        path.write_bytes(bytes(data))
        with pytest.raises(IntegrityError):
            StreamStore(Path(folder)).load("bytes")


@given(stream=streams(), seed=st.integers(0, 2**32), stop=st.integers(0, 40))
@settings(deadline=None, max_examples=30)
def test_estimates_are_the_gradients_plus_noise_that_c_whitens(stream: Stream, seed: int, stop: int) -> None:
    """For any stream, interrupted anywhere: C times the estimates' noise is what the generator drew, to the grid."""
    sums = CorrelatedSum(stream, noise_multiplier=NOISE, clip_norm=CLIP, dimension=DIMENSION)
    totals = np.random.default_rng(seed).normal(size=(stream.steps, DIMENSION))
    rng, recorder = SeededRng(seed), SeededRng(seed)
    grid = GaussianGrid(NOISE * correlated.sensitivity(stream) * CLIP)
    estimates = []
    for step, total in enumerate(totals):
        if step == stop:
            sums = CorrelatedSum.from_arrays(
                sums.to_arrays(), stream, noise_multiplier=NOISE, clip_norm=CLIP, dimension=DIMENSION
            )
        estimates.append(sums.step(total, rng))
    drawn = np.array([grid.add_noise(np.zeros(DIMENSION), recorder) for _ in totals])
    errors = np.array(estimates) - totals
    c = correlated.coefficients(stream.band)
    whitened = np.array(
        [sum(c[j] * errors[t - j] for j in range(min(stream.band, t + 1))) for t in range(stream.steps)]
    )
    np.testing.assert_allclose(whitened, drawn, atol=grid.step)


@given(stream=streams(), seed=st.integers(0, 2**32), place=st.integers(0, 13))
@settings(deadline=None, max_examples=40)
def test_one_unit_moves_the_rows_by_no_more_than_the_sensitivity(stream: Stream, seed: int, place: int) -> None:
    """Any unit, any gradients within the clip norm, on the grid and with any others: what the accountant assumes."""
    rng = np.random.default_rng(seed)
    others = rng.normal(size=(stream.steps, DIMENSION))
    unit = np.zeros_like(others)
    for step in range(place % stream.separation, stream.steps, stream.separation):
        direction = rng.normal(size=DIMENSION)
        unit[step] = CLIP * (1 - SLACK) * direction / np.linalg.norm(direction)
    bound = correlated.sensitivity(stream) * CLIP
    grid = GaussianGrid(NOISE * bound)
    c = np.pad(correlated.coefficients(stream.band), (0, stream.steps))[: stream.steps]
    matrix = np.array([[c[i - j] if i >= j else 0.0 for j in range(stream.steps)] for i in range(stream.steps)])
    rows = [np.rint(matrix @ totals / grid.step) * grid.step for totals in (others, others + unit)]
    assert np.linalg.norm(rows[1] - rows[0]) <= bound


@given(stream=streams())
@settings(deadline=None, max_examples=40)
def test_more_band_never_hurts_sums(stream: Stream) -> None:
    """Correlated noise is never worse than independent noise of the same epsilon, over all sums and in the last."""
    plain = correlated.independent(stream)
    assert correlated.prefix_error(stream) <= correlated.prefix_error(plain) * (1 + 1e-12)
    assert correlated.max_error(stream) <= correlated.max_error(plain) * (1 + 1e-12)
