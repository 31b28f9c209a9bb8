"""Training on a stream: who is used when, what is on disk before anything may leave, and that no row comes twice."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import signal
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from fedllm.client.dpftrl import StreamStore, block, train_stream
from fedllm.errors import DiskFull, IntegrityError, PolicyRefused
from fedllm.messages.mechanism import DP_FTRL, RELATION_ADD_REMOVE, UNIT_RECORD, Mechanism, Stream
from fedllm.privacy.correlated import CorrelatedSum
from fedllm.rng import SeededRng

DIMENSION, RECORDS, RATE, CLIP = 4, 60, 0.5, 0.1
STREAM = Stream("north/2026", 20, 3, 6)
KEYS = [hashlib.sha256(bytes([n])).digest() for n in range(RECORDS)]


class Killed(BaseException):
    """Stands for the process ending: nothing catches it on its way."""


def mechanism(steps: int, stream: Stream = STREAM, noise: float = 1.5) -> Mechanism:
    """Return one round's mechanism."""
    return Mechanism(
        DP_FTRL, UNIT_RECORD, RELATION_ADD_REMOVE, noise_multiplier=noise, clip_norm=CLIP, sample_rate=1, steps=steps,
        delta=1e-5, stream=stream,
    )  # fmt: skip


def unit_gradient(index: int) -> np.ndarray:
    """Return a unit's own gradient, well within the clip norm."""
    return np.sin(np.arange(DIMENSION) + index) * CLIP / 10


def total(indices: Sequence[int]) -> np.ndarray:
    """Return the sum of these units' gradients."""
    assert indices, "not to be asked for no units"
    return np.sum([unit_gradient(i) for i in indices], axis=0)


class Run:
    """One process's rounds on one store, and what they did."""

    def __init__(self, folder: Path, rng: SeededRng | None = None) -> None:
        self.store = StreamStore(folder)
        self.rng = rng or SeededRng("run")
        self.position = np.zeros(DIMENSION)
        self.used: list[list[int]] = []
        self.told: list[tuple[int, int]] = []

    def round(self, round_mechanism: Mechanism, keys: Sequence[bytes] = KEYS, *, kill_after: int = 0,
              gradient: Callable[[Sequence[int]], np.ndarray] = total, charged: int = 0) -> None:  # fmt: skip
        """Train one round; with `kill_after`, the process ends after so many steps."""

        def watched(indices: Sequence[int]) -> np.ndarray:
            self.used.append(list(indices))
            return gradient(indices)

        def assign(position: np.ndarray) -> None:
            self.position = position

        def progress(done: int, steps: int) -> None:
            self.told.append((done, steps))
            if done == kill_after:
                raise Killed

        train_stream(
            watched, keys, self.position, mechanism=round_mechanism, learning_rate=RATE, declared_records=RECORDS,
            store=self.store, rng=self.rng, progress=progress, assign=assign, charged=charged,
        )  # fmt: skip


def units_of(step: int, keys: Sequence[bytes] = KEYS, stream: Stream = STREAM) -> list[int]:
    """Return who is used in a step, from the definition."""
    return [i for i, key in enumerate(keys) if block(stream, key) == step % stream.separation]


def files(folder: Path, ending: str) -> Path:
    """Return the stream's file."""
    return folder / (hashlib.sha256(STREAM.name.encode()).hexdigest() + ending)


def test_steps_follow_the_formula(tmp_path: Path) -> None:
    """The naive twin: the machine fed by hand with the units that the hash places, and the update of the docstring."""
    run = Run(tmp_path)
    run.round(mechanism(7))
    sums = CorrelatedSum(STREAM, noise_multiplier=1.5, clip_norm=CLIP, dimension=DIMENSION)
    rng, position = SeededRng("run"), np.zeros(DIMENSION)
    for step in range(7):
        estimate = sums.step(total(units_of(step)), rng)
        position -= RATE / CLIP * estimate / (RECORDS / STREAM.separation)
    np.testing.assert_allclose(run.position, position, rtol=1e-12)
    assert run.used == [units_of(step) for step in range(7)]
    assert sorted(i for units in run.used[:6] for i in units) == list(range(RECORDS))
    assert run.told == [(step + 1, 7) for step in range(7)]


def test_the_noise_is_undone_by_c_over_rounds(tmp_path: Path) -> None:
    """Over twenty rounds the noise of the sum is well below that of independent noise at the same epsilon."""
    long = Stream("long", 200, 50, 200)
    run = Run(tmp_path)
    for _ in range(20):
        run.round(mechanism(10, long), [])  # no units at all: noise all the same
    plain = RATE / (RECORDS / long.separation) * 1.5 * np.sqrt(long.steps)  # independent noise of the same epsilon
    assert 0 < np.linalg.norm(run.position) / np.sqrt(DIMENSION) < 0.6 * plain


def test_positions_given_out_are_not_written_to_again(tmp_path: Path) -> None:
    """Neither the start nor an assigned position changes behind its holder's back."""
    seen: list[np.ndarray] = []
    start = np.ones(DIMENSION)
    train_stream(
        total, KEYS, start, mechanism=mechanism(4), learning_rate=RATE, declared_records=RECORDS,
        store=StreamStore(tmp_path), rng=SeededRng(0), progress=lambda *_: None, assign=seen.append,
    )  # fmt: skip
    assert (start == 1).all()
    assert len({tuple(position) for position in seen}) == 4


def test_rounds_go_on_where_the_last_one_ended(tmp_path: Path) -> None:
    """Five rounds, each in a process of its own, are the stream that one process trains in one go."""
    whole = Run(tmp_path / "whole")
    whole.round(mechanism(20))
    rng, position = SeededRng("run"), np.zeros(DIMENSION)
    used: list[list[int]] = []
    for steps in (3, 6, 1, 8, 2):
        run = Run(tmp_path / "parts", rng)
        run.position = position
        run.round(mechanism(steps))
        position = run.position
        used += run.used
    np.testing.assert_array_equal(position, whole.position)
    assert used == whole.used == [units_of(step) for step in range(20)]


def test_a_stream_is_not_trained_beyond_its_end(tmp_path: Path) -> None:
    """A round that does not fit is refused before any gradient, and loses no row."""
    run = Run(tmp_path)
    run.round(mechanism(18))
    before = len(run.used)
    with pytest.raises(PolicyRefused, match="3 more steps after 18, 20 in all"):
        run.round(mechanism(3))
    assert len(run.used) == before
    run.round(mechanism(2))
    assert run.used[-1] == units_of(19)


@pytest.mark.parametrize("after", [1, 4, 5])
def test_a_crash_loses_rows_and_repeats_none(tmp_path: Path, after: int) -> None:
    """Killed in mid-round, the stream goes on after that round's last row, as if lost gradients had been zero."""
    Run(tmp_path).round(mechanism(4))
    crashed = Run(tmp_path)
    with pytest.raises(Killed):
        crashed.round(mechanism(5), kill_after=after)
    assert crashed.used == [units_of(step) for step in range(4, 4 + after)]
    run = Run(tmp_path, SeededRng("after"))
    run.round(mechanism(5))
    assert run.used == [units_of(step) for step in range(9, 14)]
    twin, rng = CorrelatedSum(STREAM, noise_multiplier=1.5, clip_norm=CLIP, dimension=DIMENSION), SeededRng("run")
    for step in range(4):
        twin.step(total(units_of(step)), rng)
    twin.skip_to(9)
    again, position = SeededRng("after"), np.zeros(DIMENSION)
    for step in range(9, 14):
        position -= RATE / CLIP * twin.step(total(units_of(step)), again) / (RECORDS / STREAM.separation)
    np.testing.assert_allclose(run.position, position, rtol=1e-12)


def test_rows_are_claimed_before_the_first_gradient(tmp_path: Path) -> None:
    """Were the claim later, a crash could leave a row drawn and not counted."""
    run = Run(tmp_path)

    def looking(indices: Sequence[int]) -> np.ndarray:
        state = StreamStore(tmp_path).load(STREAM.name)
        assert state is not None
        assert state.claimed == 5
        return total(indices)

    run.round(mechanism(5), gradient=looking)
    assert len(run.used) == 5


def test_no_claim_no_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim that cannot be made durable ends the round before it begins."""
    run = Run(tmp_path)
    run.round(mechanism(2))
    fsync_fails(monkeypatch)
    with pytest.raises(DiskFull):
        run.round(mechanism(3))
    assert len(run.used) == 2


def test_no_state_no_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that cannot be kept ends the round with an error, so that nothing of it is sent; its rows are gone."""
    run = Run(tmp_path)
    run.round(mechanism(2))

    def filling(indices: Sequence[int]) -> np.ndarray:
        fsync_fails(monkeypatch)
        return total(indices)

    with pytest.raises(DiskFull):
        run.round(mechanism(3), gradient=filling)
    monkeypatch.undo()
    assert not list(tmp_path.glob("*.tmp"))
    run.round(mechanism(1))
    assert run.used[-1] == units_of(5)


def test_a_state_is_synced_before_it_replaces_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """File, rename, folder: in any other order a power cut could leave half a state, or none."""
    acts: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        acts.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def replaced(path: Path, target: Path) -> Path:
        acts.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    StreamStore(tmp_path).save("s", {"x": np.zeros(2)})
    assert acts == ["file", "rename", "folder"]


def test_a_process_killed_between_two_steps_loses_its_round(tmp_path: Path) -> None:
    """The real thing: SIGKILL in another process, and what its successor finds on disk."""
    Run(tmp_path).round(mechanism(2))
    child = os.fork()
    if child == 0:
        try:
            Run(tmp_path).round(mechanism(6), gradient=lambda _: os.kill(os.getpid(), signal.SIGKILL))
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    run = Run(tmp_path)
    run.round(mechanism(2))
    assert run.used == [units_of(8), units_of(9)]


def fsync_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every fsync from here on say that the disk is full."""

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)


def test_files_are_the_owners_alone(tmp_path: Path) -> None:
    """The state holds gradient sums without noise: mode 0600 in a folder of mode 0700, names that tell nothing."""
    folder = tmp_path / "streams"
    Run(folder).round(mechanism(5))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    found = sorted(folder.iterdir())
    assert found == [files(folder, ".claims"), files(folder, ".state")]
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in found)


def test_streams_of_different_names_do_not_meet(tmp_path: Path) -> None:
    """Another name is another stream, with places of its own; any printable name can be a file."""
    other = dataclasses.replace(STREAM, name="../../north/2026 ✓")
    run = Run(tmp_path / "streams")
    run.round(mechanism(3))
    run.round(mechanism(2, other))
    assert run.used[3:] == [units_of(0, stream=other), units_of(1, stream=other)]
    assert len(list((tmp_path / "streams").iterdir())) == 4
    assert sum(block(STREAM, key) != block(other, key) for key in KEYS) > RECORDS / 2


@pytest.mark.parametrize("ending", [".state", ".claims"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "foreign"])
def test_a_damaged_stream_is_refused(tmp_path: Path, ending: str, damage: str) -> None:
    """Never begun again: a second row 0 under the same charge would be a second look at the same records."""
    run = Run(tmp_path)
    run.round(mechanism(4))
    run.round(mechanism(4))
    path = files(tmp_path, ending)
    data = path.read_bytes()
    bad = {"cut": data[: len(data) // 2], "flip": b"\xff" + data[1:], "gone": None, "foreign": b"{}\n"}[damage]
    path.unlink()
    if bad is not None:
        path.write_bytes(bad)
    before = len(run.used)
    with pytest.raises(IntegrityError, match="north/2026") as raised:
        run.round(mechanism(1))
    assert "another name" in str(raised.value.hint)
    assert len(run.used) == before


def test_a_claim_cut_off_by_a_crash_was_never_acted_on(tmp_path: Path) -> None:
    """The line was not durable, so that no gradient had been computed for it; the stream goes on before it."""
    run = Run(tmp_path)
    run.round(mechanism(4))
    with files(tmp_path, ".claims").open("ab") as file:
        file.write(b'{"until": 1')
    run.round(mechanism(1))
    run.round(mechanism(1))  # the claim after it is on a line of its own
    assert run.used[-2:] == [units_of(4), units_of(5)]


def test_a_crash_before_the_first_claim_is_not_a_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first state is there, no row was drawn: the stream begins."""
    with monkeypatch.context() as patch:
        patch.setattr(StreamStore, "claim", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            Run(tmp_path).round(mechanism(4))
    run = Run(tmp_path)
    run.round(mechanism(4), charged=0)
    assert run.used[0] == units_of(0)


def test_a_stream_that_is_gone_or_was_never_begun_passes_over_what_was_charged(tmp_path: Path) -> None:
    """No files: the ledger alone knows of four steps. Their rows may have been drawn, and are not drawn again."""
    run = Run(tmp_path / "b")
    run.round(mechanism(4), charged=4)
    state = run.store.load(mechanism(4).stream.name)  # type: ignore[union-attr]
    assert state is not None
    assert state.claimed == 8
    with pytest.raises(PolicyRefused):
        Run(tmp_path / "c").round(mechanism(4), charged=mechanism(4).stream.steps)  # type: ignore[union-attr]


def test_two_runs_of_row_0_are_two_releases(tmp_path: Path) -> None:
    """What the rules are for: with fresh noise, the mean of both is closer to the same records' sum than either."""
    wide = Stream("wide", 4, 1, 4)
    keys = [key for key in KEYS if block(wide, key) == 0]
    errors, dimension = [], 2000
    for seed in ("first", "second"):
        store, seen = StreamStore(tmp_path / seed), []
        train_stream(
            lambda units: np.full(dimension, 1e-3 * len(units)), keys, np.zeros(dimension),
            mechanism=mechanism(1, wide), learning_rate=CLIP, declared_records=4, store=store, rng=SeededRng(seed),
            progress=lambda *_: None, assign=seen.append,
        )  # fmt: skip
        errors.append(-seen[0] - 1e-3 * len(keys))
    one, mean = np.std(errors[0]), np.std(np.mean(errors, axis=0))
    assert one == pytest.approx(1.5 * CLIP, rel=0.1)
    assert mean == pytest.approx(one / np.sqrt(2), rel=0.1)


def test_an_old_copy_repeats_no_row_that_was_charged(tmp_path: Path) -> None:
    """The ledger's count is a floor: what another plan was charged for is over, whatever a folder says."""
    run = Run(tmp_path)
    run.round(mechanism(4))
    old = {path: path.read_bytes() for path in tmp_path.iterdir()}
    run.round(mechanism(4), charged=4)
    for path, data in old.items():
        path.write_bytes(data)
    run.round(mechanism(4), charged=8)
    assert run.used == [units_of(step) for step in range(12)]


def test_a_stream_cannot_change_its_noise(tmp_path: Path) -> None:
    """It is charged once, for the noise multiplier it began with."""
    run = Run(tmp_path)
    run.round(mechanism(4))
    with pytest.raises(PolicyRefused, match="noise_multiplier"):
        run.round(mechanism(4, noise=0.1))
    assert len(run.used) == 4


def test_other_mechanisms_have_no_stream(tmp_path: Path) -> None:
    """A caller's mistake, found before anything is written."""
    with pytest.raises(ValueError, match="no stream"):
        Run(tmp_path / "none").round(Mechanism.none())
    assert not (tmp_path / "none").exists()


def test_equal_records_share_their_steps(tmp_path: Path) -> None:
    """Two copies of a record are two units in the same place; both are used."""
    keys = [*KEYS[:5], KEYS[2]]
    run = Run(tmp_path)
    run.round(mechanism(6), keys)
    assert [units for units in run.used if 2 in units or 5 in units] == [units_of(block(STREAM, KEYS[2]), keys)]
    assert sorted(i for units in run.used for i in units) == list(range(6))


def test_a_place_is_a_known_answer() -> None:
    """The rule must never change under a running stream: it would move every unit, and with it the separation."""
    assert [block(STREAM, key) for key in KEYS[:8]] == [5, 1, 5, 5, 2, 4, 0, 5]
