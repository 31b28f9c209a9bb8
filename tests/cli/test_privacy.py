"""``fedllm privacy``: an epsilon always says what it is of; what each round left; the noise for a budget."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
from cli.command_line import Said, fedllm

from fedllm.clock import FakeClock
from fedllm.identity import SigningIdentity
from fedllm.ids import Digest, sha256
from fedllm.messages.mechanism import (
    DP_FTRL,
    DP_SGD,
    RELATION_ADD_REMOVE,
    RELATION_ZERO_OUT,
    SKELLAM,
    UNIT_OWNER,
    UNIT_PERSON,
    UNIT_RECORD,
    Mechanism,
    NoiseShares,
    Stream,
)
from fedllm.privacy.ledger import Ledger

SAMPLED = Mechanism(DP_SGD, UNIT_RECORD, RELATION_ADD_REMOVE, 2.0, 0.05, 0.25, 2, 1e-5)
STREAMED = Mechanism(DP_FTRL, UNIT_RECORD, RELATION_ADD_REMOVE, 4.0, 0.05, 1.0, 2, 1e-5, stream=Stream("f/1", 6, 2, 3))
NOISED = Mechanism(SKELLAM, UNIT_OWNER, RELATION_ZERO_OUT, 9.0, 0.05, 1.0, 1, 1e-5, shares=NoiseShares(2, 24, 1 << 15))


def plan(number: int) -> Digest:
    """Return a plan's digest."""
    return sha256(f"plan {number}".encode())


def begun(home: Path, unit: str = UNIT_RECORD, column: str = "", limit: float = 8.0) -> Ledger:
    """Begin a ledger in an owner's folder."""
    home.mkdir(exist_ok=True)
    identity = SigningIdentity.create(home / "owner.pem")
    return Ledger.open(
        home / "ledger.jsonl", identity, FakeClock(), dataset=sha256(b"data"), limit_epsilon=limit, delta=1e-5,
        unit=unit, column=column,
    )  # fmt: skip


def charge(ledger: Ledger, *mechanisms: Mechanism) -> None:
    """Charge one round after the other."""
    for number, mechanism in enumerate(mechanisms, start=1):
        ledger.reserve(federation="tools", round_number=number, plan_digest=plan(number), mechanism=mechanism)


def shown(home: Path) -> Said:
    """Return what ``show`` prints, once every epsilon in it has been found to say what it is of."""
    said = fedllm("privacy", "show", "--home", home)
    assert (said.exit_code, said.err) == (0, ""), said
    check_terms(said.out)
    return said


def check_terms(text: str) -> None:
    """Check that no epsilon stands without unit, relation and delta: in its line, or in the line above its table."""
    lines = [line for line in text.splitlines() if "ε" in line and "ε after it" not in line]
    assert lines
    for line in lines:
        assert re.search(r"per (record|person|owner) \((add-or-remove-one|zero-out-one)\), δ = 1e-05", line), line


def test_show_names_every_round_and_what_it_came_to(tmp_path: Path) -> None:
    """Federation, round, mechanism in words, epsilon after it, outcome; the realised noise, not the planned one."""
    ledger = begun(tmp_path)
    charge(ledger, SAMPLED, STREAMED, STREAMED, NOISED)
    ledger.realised(plan(4), 8)
    ledger.settle(plan(1), "completed")
    ledger.settle(plan(2), "aborted")
    said = shown(tmp_path).out
    for part in ("4 rounds charged, ε per record", "dp-sgd: 2 steps, sample rate 0.25, noise multiplier 2",
                 "2 steps of 6 of stream 'f/1'", "noise multiplier 18",
                 "8 honest shares", "completed", "aborted", "held-out scores", "training time"):  # fmt: skip
        assert part in said, part
    found = fedllm("privacy", "show", "--home", tmp_path, "--json").json()
    assert [r["outcome"] for r in found["rounds"]] == ["completed", "aborted", None, None]
    assert [r["mechanism"]["kind"] for r in found["rounds"]] == [DP_SGD, DP_FTRL, DP_FTRL, SKELLAM]
    assert Mechanism.from_fields(found["rounds"][3]["mechanism"]) == NOISED.realised(8)
    after = [r["epsilon"] for r in found["rounds"]]
    assert after == sorted(after)
    assert found["epsilon"] == after[-1] == ledger.spent()
    assert found["rounds"][1]["epsilon"] == pytest.approx(found["rounds"][2]["epsilon"], rel=1e-2), "one stream"
    assert found["remaining"] == 8.0 - after[-1] == found["rounds"][3]["remaining"]


@pytest.mark.parametrize(
    ("unit", "column", "covers"),
    [
        (UNIT_RECORD, "", "one training record"),
        (UNIT_PERSON, "patient", "one value of column 'patient'"),
        (UNIT_OWNER, "", "all training records of this owner"),
    ],
)
def test_show_says_what_its_unit_is_and_what_is_not_covered(
    tmp_path: Path, unit: str, column: str, covers: str
) -> None:
    """The same sum costs another epsilon in every unit; scores and time are in none, taking part not in an owner's."""
    charge(begun(tmp_path, unit, column), NOISED)
    said = shown(tmp_path).out
    assert f"spent: ε = {_value(said)} per {unit} (" in said
    assert covers in said
    assert ("that this owner takes part" in said) == (unit == UNIT_OWNER)
    found = fedllm("privacy", "show", "--home", tmp_path, "--json").json()
    assert (found["unit"], found["column"], found["reservations"]) == (unit, column, 1)
    assert found["relation"] == (RELATION_ZERO_OUT if unit == UNIT_OWNER else RELATION_ADD_REMOVE)
    assert covers in found["covers"]
    assert "held-out scores" in found["does_not_cover"]
    assert "training time" in found["does_not_cover"]


def _value(said: str) -> str:
    found = re.search(r"spent: ε = ([0-9.]+) per", said)
    assert found, said
    return found[1]


def _bars(said: str) -> list[tuple[int, float, str]]:
    """Return the rows of the burn-down: rounds charged, what was left, the bar."""
    rows = re.findall(r"^ *(\d+) +([0-9.]+) +([█▏▎▍▌▋▊▉]+) *$", said, flags=re.MULTILINE)
    return [(int(at), float(left), bar) for at, left, bar in rows]


@pytest.mark.parametrize("rounds", [1, 3, 20, 130])
def test_what_is_left_is_drawn_however_many_rounds_there_were(tmp_path: Path, rounds: int) -> None:
    """Bars that get shorter, twenty at most, the first and the last round always; the last is what is left now."""
    ledger = begun(tmp_path, UNIT_OWNER)
    charge(ledger, *[dataclasses.replace(NOISED, noise_multiplier=30.0)] * rounds)
    bars = _bars(shown(tmp_path).out)
    assert len(bars) == min(rounds, 20)
    assert (bars[0][0], bars[-1][0]) == (1, rounds)
    assert [left for _, left, _ in bars] == sorted((left for _, left, _ in bars), reverse=True)
    assert 0 <= 8.0 - ledger.spent() - bars[-1][1] < 0.01
    assert len(bars[-1][2]) == pytest.approx(40 * bars[-1][1] / 8.0, abs=1.0)
    assert len(fedllm("privacy", "show", "--home", tmp_path, "--json").json()["rounds"]) == rounds


def test_a_spent_budget_leaves_nothing_to_draw(tmp_path: Path) -> None:
    """A limit lowered below what is spent: nothing is left, and nothing is negative."""
    ledger = begun(tmp_path)
    charge(ledger, SAMPLED, SAMPLED)
    ledger.set_limit(0.01, reason="no more")
    assert _bars(shown(tmp_path).out) == [(1, 0.0, "▏"), (2, 0.0, "▏")]
    found = fedllm("privacy", "show", "--home", tmp_path, "--json").json()
    assert found["remaining"] == 0.0
    assert {r["remaining"] for r in found["rounds"]} == {0.0}


def test_without_a_limit_or_a_guarantee_there_are_no_bars(tmp_path: Path) -> None:
    """No limit has no share left of it; a round without noise is infinite, and null in JSON."""
    charge(begun(tmp_path, limit=math.inf), SAMPLED, Mechanism.none())
    said = shown(tmp_path).out
    assert "∞ (no guarantee) per record" in said
    assert "of no limit" in said
    assert _bars(said) == []
    found = fedllm("privacy", "show", "--home", tmp_path, "--json").json()
    assert (found["epsilon"], found["remaining"], found["rounds"][1]["epsilon"]) == (None, None, None)


def test_an_empty_ledger_has_spent_nothing(tmp_path: Path) -> None:
    """No round, no bar, ε = 0."""
    begun(tmp_path)
    assert "spent: ε = 0.00 per record" in shown(tmp_path).out
    assert fedllm("privacy", "show", "--home", tmp_path, "--json").json()["rounds"] == []


def calibrated(*flags: object) -> Any:
    """Return what ``calibrate`` found, once its words were checked too."""
    said = fedllm("privacy", "calibrate", *flags)
    assert (said.exit_code, said.err) == (0, ""), said
    check_terms(said.out)
    found = fedllm("privacy", "calibrate", *flags, "--json").json()
    assert f"noise multiplier {found['noise_multiplier']:g}\n" in said.out
    assert found["spent"] <= found["epsilon"]
    return found


def test_all_steps_at_once_or_by_round_are_the_same_budget() -> None:
    """``--steps 12`` is four rounds of three."""
    whole = calibrated("--epsilon", 4, "--sample-rate", 0.1, "--steps", 12)
    rounds = calibrated("--epsilon", 4, "--sample-rate", 0.1, "--rounds", 4, "--steps-per-round", 3)
    assert whole["noise_multiplier"] == rounds["noise_multiplier"]
    assert (whole["unit"], whole["relation"], whole["signal_to_noise"]) == (UNIT_RECORD, RELATION_ADD_REMOVE, None)


def test_calibrated_rounds_fit_into_the_ledger(tmp_path: Path) -> None:
    """The noise found is what the owner's ledger takes for just so many rounds."""
    found = calibrated(
        "--epsilon", 3, "--rounds", 5, "--mechanism", SKELLAM, "--owners", 4, "--colluders", 2, "--dimension", 24
    )
    assert found["noise_over_signal"] == pytest.approx(1 / found["signal_to_noise"])
    assert (found["unit"], found["relation"]) == (UNIT_OWNER, RELATION_ZERO_OUT)
    solved = dataclasses.replace(NOISED, noise_multiplier=found["noise_multiplier"], clip_norm=1.0)
    ledger = begun(tmp_path, UNIT_OWNER, limit=3.0)
    charge(ledger, *[solved] * 5)
    assert ledger.spent() == found["spent"]
    assert ledger.projected(solved) > 3.0
    assert found["noise_over_signal"] == pytest.approx(solved.noise_over_signal(4))


def test_a_stream_is_calibrated_as_a_whole() -> None:
    """One charge however its steps are divided into rounds; signal to noise where size and records are said."""
    flags = ("--epsilon", 2, "--mechanism", DP_FTRL, "--dimension", 1000, "--records", 160)
    found = [calibrated(*flags, *how) for how in (("--steps", 32), ("--rounds", 8, "--steps-per-round", 4))]
    assert found[0]["noise_multiplier"] == found[1]["noise_multiplier"]
    assert found[0]["signal_to_noise"] == found[1]["signal_to_noise"] > 0
    sampled = calibrated("--epsilon", 2, "--steps", 4, "--sample-rate", 1, "--dimension", 1000, "--records", 160)
    assert sampled["signal_to_noise"] == pytest.approx(160 / (sampled["noise_multiplier"] * math.sqrt(1000)))


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("--epsilon", 8), "steps are missing"),
        (("--epsilon", 8, "--steps", 6, "--rounds", 2), "--rounds 10 --steps-per-round 8 is --steps 80"),
        (("--epsilon", 8, "--steps", 0), "steps must be positive"),
        (("--epsilon", 8, "--steps", 2, "--sample-rate", 1.5), "sample rate must be in (0, 1]"),
        (("--epsilon", 8, "--steps", 2, "--delta", 0), "delta in (0, 1)"),
        (("--epsilon", 8, "--steps-per-round", 2, "--rounds", 0), "rounds"),
        (("--epsilon", 8, "--steps", 2, "--mechanism", "laplace"), "dp-sgd, dp-ftrl or skellam allowed"),
        (("--epsilon", 8, "--steps", 2, "--unit", "household"), "record, person, owner allowed"),
        (("--epsilon", 8, "--steps", 2, "--unit", UNIT_OWNER), "owners by skellam"),
        (("--epsilon", 8, "--steps", 2, "--dimension", 0, "--records", 1), "dimension 0"),
        (("--epsilon", 8, "--mechanism", SKELLAM), "needs --owners and --dimension"),
        (("--epsilon", 8, "--mechanism", SKELLAM, "--owners", 2, "--dimension", 9, "--steps", 2), "one release"),
        (
            ("--epsilon", 8, "--mechanism", SKELLAM, "--owners", 2, "--dimension", 9, "--colluders", 2),
            "fewer colluders",
        ),
        (("--epsilon", 8, "--mechanism", SKELLAM, "--owners", 2, "--dimension", -1), "must be positive"),
        (("--epsilon", 8, "--mechanism", DP_FTRL, "--steps", 8, "--band", 9, "--separation", 4), "separation"),
        (("--epsilon", "nan", "--steps", 2), "epsilon must be positive"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_numbers_that_mean_nothing_are_refused(flags: tuple[object, ...], word: str) -> None:
    """Each with the number found, what is allowed, and a hint; nothing on stdout."""
    fedllm("privacy", "calibrate", *flags).fails(2, "config", word)
