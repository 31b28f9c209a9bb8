"""The round's gate can fail, its figures are of what the recorders wrote, and the stubs train what they claim."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from round_world import World

from benchmarks import round as bench
from benchmarks.document import GATE_FAILED, GateFailed
from benchmarks.round_coordinator import Exchanges, Watch
from benchmarks.round_federation import FACTORS, NAMES, PINNED_DIR, enrol, make_settings, make_spec
from benchmarks.round_flower import running, wait_for_rounds
from benchmarks.round_owner import KnownUpdate
from benchmarks.round_updates import AMPLITUDE, OWNERS, Recorder, read_records, update, worst_error
from fedllm import telemetry
from fedllm.clock import SystemClock
from fedllm.errors import ConfigError, NotReady, ProcessDied
from fedllm.identity import Roster, SigningIdentity
from fedllm.relay.processes import Supervised
from fedllm.relay.tls import PinnedOwners, TlsIdentity
from fedllm.server.federation import Federation, initial_state
from fedllm.server.ports import RoundEvent

DIM = 400


def right_model(rounds: int) -> np.ndarray:
    """Return what the rounds must end in, computed the plain way."""
    return np.float32(rounds) * np.mean([update(i, DIM) for i in range(OWNERS)], axis=0, dtype=np.float32)


def test_updates_are_repeatable_small_and_different() -> None:
    """Every process makes the same four."""
    made = [update(i, DIM) for i in range(OWNERS)]
    assert all(np.array_equal(a, update(i, DIM)) for i, a in enumerate(made))
    assert all(a.dtype == np.float32 and np.abs(a).max() <= AMPLITUDE for a in made)
    assert len({a.tobytes() for a in made}) == OWNERS


@pytest.mark.parametrize("rounds", [1, 3])
def test_the_right_model_has_no_error(rounds: int) -> None:
    """Rounds add up."""
    assert worst_error(right_model(rounds), rounds) < 1e-7


def test_wrong_models_have_one() -> None:
    """A round too few, an owner left out, one entry off, NaN."""
    assert worst_error(right_model(1), 2) > 0.01
    assert worst_error(right_model(1) - update(3, DIM) / OWNERS, 1) > 0.01
    off = right_model(1)
    off[7] += 0.001
    assert worst_error(off, 1) == pytest.approx(0.001, rel=1e-3)
    off[7] = np.nan
    assert np.isnan(worst_error(off, 1))


def test_a_recorder_times_rounds_but_not_their_judging(tmp_path: Path) -> None:
    """What is read back is the watch's seconds, the error of each model, and what else was said."""
    ticks = iter([10.0, 12.5, 20.0, 21.0])
    recorder = Recorder(tmp_path, lambda: next(ticks))
    for number in (1, 2):
        recorder.begin()
        recorder.end(right_model(number), recorder.lap(), exchanges=5)
    found = read_records(tmp_path)
    assert [each["seconds"] for each in found] == [2.5, 1.0]
    assert [each["round"] for each in found] == [1, 2]
    assert all(each["error"] < 1e-7 and each["exchanges"] == 5 for each in found)
    assert read_records(tmp_path / "nowhere") == []


def records(seconds: list[float], *, error: float = 0.0) -> list[dict]:
    """Return records as a recorder of fedllm's writes them."""
    return [
        {"round": i + 1, "seconds": s, "error": error, "load_1m": 1.0, "with_scores_s": 2 * s, "exchanges": 5,
         "exchanges_with_scores": 8, "upload_bytes": 1200, "phases": {"TRAINING": s / 2}}
        for i, s in enumerate(seconds)
    ]  # fmt: skip


@pytest.mark.parametrize("system", list(bench.SYSTEMS))
@pytest.mark.parametrize("wrong", ["off", "nan", "missing"])
def test_the_gate_fails_each_system(system: str, wrong: str) -> None:
    """A model further off than quantisation explains, NaN, or a round that nobody recorded."""
    allowed = bench.ALLOWED[system]
    right = records([1.0, 1.0], error=allowed / 2)
    assert bench.gated(system, right, 2) is right
    bad = {
        "off": records([1.0, 1.0], error=2.1 * allowed), "nan": records([1.0, 1.0], error=float("nan")),
        "missing": right[:1],
    }[wrong]  # fmt: skip
    with pytest.raises(GateFailed, match=system):
        bench.gated(system, bad, 2)


def stubbed(monkeypatch: pytest.MonkeyPatch, error: float = 0.0) -> list[tuple[str, int, int]]:
    """Put canned systems in place; return the calls they get."""
    calls: list[tuple[str, int, int]] = []
    seconds = {"flower_secagg": [9.0, 10.0, 40.0], "flower": [8.0] * 3, "flower_fedavg": [2.0] * 3, "direct": [0.5] * 3}

    def system(name: str):
        return lambda dim, rounds: calls.append((name, dim, rounds)) or records(seconds[name][:rounds], error=error)

    monkeypatch.setattr(bench, "SYSTEMS", {name: system(name) for name in seconds})
    return calls


def test_the_document_has_medians_and_ratios(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """A ratio is of medians, so one slow round moves none; every size is a result of its own."""
    calls = stubbed(monkeypatch)
    assert bench.main(["--json", "--dim", "1000", "--dim", "2000"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(calls) == 8
    assert {rounds for _, _, rounds in calls} == {3}
    first, second = document["results"]
    assert (first["dim"], second["dim"]) == (1000, 2000)
    assert (first["flower_secagg_s"], first["flower_s"], first["flower_over_secagg"]) == (10.0, 8.0, 0.8)
    assert (first["direct_s"], first["flower_fedavg_s"], first["direct_over_fedavg"]) == (0.5, 2.0, 0.25)
    assert first["direct_round_with_scores_s"] == 1.0
    assert first["phases_s"]["flower"] == {"TRAINING": 4.0}
    assert first["exchanges"]["direct"] == 5
    assert first["exchanges"]["direct_with_scores"] == 8
    assert first["exchanges"]["flower_secagg"] == 4
    assert first["every_round_s"]["flower_secagg"] == [9.0, 10.0, 40.0]


def test_quick_is_one_size_and_two_rounds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The flags that the list of all benchmarks passes; people get a table."""
    calls = stubbed(monkeypatch)
    assert bench.main(["--quick"]) == 0
    assert {(dim, rounds) for _, dim, rounds in calls} == {(1_000_000, 2)}
    assert "1,000,000" in capsys.readouterr().out


def test_a_wrong_model_leaves_no_figure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The gate is in the way of every number."""
    stubbed(monkeypatch, error=0.01)
    assert bench.main(["--json", "--quick"]) == GATE_FAILED
    document = json.loads(capsys.readouterr().out)
    assert document["gate"] is False
    assert "results" not in document


def test_the_stub_moves_exactly_as_many_entries_as_asked() -> None:
    """A head of zeros, and a trained B that is the owner's known update; A stays."""
    spec = make_spec(DIM)
    layout = spec.layout(FACTORS)
    assert layout.size == DIM
    head = initial_state("bench", spec)
    steps: list[tuple[int, int]] = []
    plan = type("Plan", (), {"recipe": type("Recipe", (), {"steps": 1})})
    trained = KnownUpdate(2).fit(head, plan, FACTORS, None, lambda done, total: steps.append((done, total)))
    assert np.array_equal(layout.flatten(trained.state.factors), update(2, DIM))
    a = spec.layout(("A",))
    assert np.array_equal(a.flatten(trained.state.factors), a.flatten(head.factors))
    assert steps == [(1, 1)]


@pytest.mark.parametrize("dim", [1001, 0, -40])
def test_a_size_without_a_shape_is_refused(dim: int) -> None:
    """Layers and rank divide the entries."""
    with pytest.raises(ConfigError, match="a multiple of 40"):
        make_spec(dim)


def test_enrolment_pins_every_owner_and_nobody_else(tmp_path: Path) -> None:
    """The coordinator holds the certificates that the owners have keys of; the roster has their signing keys."""
    enrol(tmp_path)
    clock = SystemClock()
    pinned = PinnedOwners([tmp_path / "coordinator" / PINNED_DIR], clock)()
    owners = [TlsIdentity.load(tmp_path / name, clock).certificate.fingerprint for name in NAMES]
    assert set(pinned) == set(owners)
    roster = Roster.load(tmp_path / "roster.json")
    assert Federation(make_settings(), make_spec(DIM), roster).name == "bench"
    for name in NAMES:
        assert roster.key(name) == SigningIdentity.load(tmp_path / name / "key.pem").public


def test_a_process_that_dies_fails_with_its_own_words_and_leaves_none(tmp_path: Path) -> None:
    """The benchmark neither waits for rounds that cannot come nor leaves the other processes behind."""
    environ = dict(os.environ)
    lasting = Supervised("lasting", ["sleep", "600"], env=environ, log=tmp_path / "lasting.log")
    dying = Supervised(
        "dying", ["sh", "-c", "echo last words; sleep 0.5; exit 3"], env=environ, log=tmp_path / "dying.log"
    )
    with pytest.raises(ProcessDied, match=r"dying ended(?s:.*)last words"), running([lasting, dying]):
        wait_for_rounds(tmp_path, 1, [lasting, dying], 60.0)
    assert not lasting.alive()


def test_rounds_that_take_too_long_fail(tmp_path: Path) -> None:
    """A limit of seconds, and the last process's log."""
    lasting = Supervised("lasting", ["sleep", "600"], env=dict(os.environ), log=tmp_path / "lasting.log")
    with pytest.raises(ProcessDied, match=r"not done after 0\.1 s"), running([lasting]):
        wait_for_rounds(tmp_path, 1, [lasting], 0.1)
    assert not lasting.alive()


class Told(list):
    """Events of a world's rounds, handed on to a watch."""

    watch: Watch

    def append(self, event: RoundEvent) -> None:
        """Hand on."""
        self.watch.progress(event)


def watched(folder: Path, **settings: object) -> tuple[World, Told]:
    """Return a federation in memory whose rounds are watched; the watch's clock ticks a second a look."""
    world = World(folder, **settings)
    ticks = iter(float(i) for i in range(100))
    world.events = Told()
    world.events.watch = Watch(Recorder(folder, lambda: next(ticks)), Exchanges())
    return world, world.events


def test_a_watch_stops_at_the_new_model_and_again_at_the_end(tmp_path: Path) -> None:
    """Looks at the clock: at the beginning, at the new model, at the end, and so on in the next round."""
    world, told = watched(tmp_path)
    runner = world.runner()
    for _ in range(2):
        asyncio.run(told.watch.round(runner, world.registry))
    found = read_records(tmp_path)
    assert [(each["seconds"], each["with_scores_s"]) for each in found] == [(1.0, 2.0), (1.0, 2.0)]
    assert {"PLANNED", "TRAINING", "MASKED", "UNMASK", "EVALUATING"} <= set(found[0]["phases"])
    assert found[0]["upload_bytes"] > 0


def test_a_round_that_fails_is_no_figure(tmp_path: Path) -> None:
    """Nobody answers: the benchmark ends with the round's own reason."""
    world, told = watched(tmp_path, attempts=1)
    world.carrier.fault = lambda _owner, kind, _count: "lose" if kind == "SendMasked" else "deliver"
    with pytest.raises(NotReady, match="round 1 ended ABORTED"):
        asyncio.run(told.watch.round(world.runner(), world.registry))
    assert read_records(tmp_path) == []


def test_a_version_that_is_held_is_no_figure(tmp_path: Path) -> None:
    """The next round would start from another model than the gate of the benchmark thinks."""
    world, told = watched(tmp_path)
    for agent in world.agents.values():
        agent.losses = (2.0, 1.0)
    with pytest.raises(NotReady, match="round 1 was not published"):
        runner = world.runner()
        asyncio.run(told.watch.round(runner, world.registry))
    assert read_records(tmp_path) == []


def test_only_exchanges_are_counted() -> None:
    """By the event that every carrier logs."""
    counter, logger = Exchanges(), logging.getLogger("fedllm.test_round")
    logger.addHandler(counter)
    logger.setLevel(logging.INFO)
    try:
        for name in ("exchange", "round accepted", "exchange"):
            telemetry.event(logger, name, seconds=1.0)
    finally:
        logger.removeHandler(counter)
    assert counter.count == 2
