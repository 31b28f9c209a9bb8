"""``fedllm simulate`` and ``fedllm round plan`` as people call them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli.command_line import fedllm
from cli.conftest import Scene

from fedllm.simulate.run import ExactSums

SMALL = ("simulate", "--owners", 6, "--dim", 300)


def test_a_small_simulation_reports_and_repeats() -> None:
    """One JSON document with every field, the same twice but for seconds and memory; nothing on stderr."""
    command = (*SMALL, "--rounds", 2, "--dropout", 0.1, "--seed", 5, "--json")
    said, again = fedllm(*command), fedllm(*command)
    assert said.exit_code == 0, said
    assert said.err == ""
    found, repeated = said.json(), again.json()
    assert found["exact"] is True
    assert found["seconds"] < 10
    fields = {"owners", "dim", "seed", "complete", "neighbours", "threshold", "ring_bits", "rounds", "peak_gib",
              "upload_bytes"}  # fmt: skip
    assert fields <= set(found)
    assert (found["owners"], found["dim"], found["neighbours"], found["threshold"]) == (6, 300, 5, 5)
    assert [each["state"] for each in found["rounds"]] == ["JUDGED"] * 2
    for document in (found, repeated):
        for each in (document, *document["rounds"]):
            each.pop("seconds")
        document.pop("peak_gib")
    assert found == repeated


def test_people_read_a_table() -> None:
    """The same facts without braces."""
    said = fedllm(*SMALL)
    assert said.exit_code == 0, said
    assert "exact: every opened sum is the plain sum of its survivors" in said.out
    assert "everybody, 5 of the shares open one" in said.out


def test_a_budget_buys_noise_and_is_charged() -> None:
    """With --epsilon every owner's ledger says what was spent: at most that."""
    said = fedllm(*SMALL, "--epsilon", 4, "--json")
    assert said.exit_code == 0, said
    privacy = said.json()["privacy"]
    assert 3.5 < privacy["epsilon"] <= 4
    assert "per record (add-or-remove-one), δ = 1e-05" in fedllm(*SMALL, "--epsilon", 4).out
    assert (privacy["unit"], privacy["relation"], privacy["delta"]) == ("record", "add-or-remove-one", 1e-5)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--owners", 2), "2 owners: 3 to 1000"),
        (("--owners", 1001), "1001 owners"),
        (("--dim", 0), "dim is 0"),
        (("--rounds", 0), "rounds is 0"),
        (("--dropout", 1.5), "dropout is 1.5"),
        (("--straggler", -1), "straggler is -1"),
        (("--corrupt", "nan"), "corrupt is nan"),
        (("--dropout", 0.6, "--corrupt", 0.6), "add up to 1.2"),
        (("--epsilon", 0), "epsilon 0"),
        (("--owners", "many"), "many"),
    ],
)
def test_bad_flags_are_refused_with_the_value_found(flags: tuple[object, ...], words: str) -> None:
    """Exit 2, one error, nothing on stdout."""
    fedllm("simulate", "--json", *flags).fails(2, "config", words)


def test_rounds_that_are_aborted_are_a_failure_with_a_reason() -> None:
    """Everybody is lost: the document says so, and so does the exit code."""
    said = fedllm(*SMALL, "--dropout", 1, "--json")
    assert said.exit_code == 1
    assert "error[round-aborted]: 1 of 1 simulated rounds were aborted; round 1: " in said.err
    (only,) = said.json()["rounds"]
    assert (only["state"], only["exact"], only["survivors"], only["lost"]) == ("ABORTED", None, 0, 6)
    assert said.json()["exact"] is False


def test_a_sum_that_is_not_exact_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were an owner to mask other numbers than it shows, the check would say so."""
    honest = ExactSums.masked
    monkeypatch.setattr(ExactSums, "masked", lambda self, owner, values: honest(self, owner, values ^ 1))
    said = fedllm(*SMALL, "--json")
    assert said.exit_code == 1
    assert said.err.startswith("error[integrity]: the sum opened in round 1 is not the sum of its survivors' vectors")
    assert said.json()["exact"] is False


def _change(home: Path, line: str) -> None:
    config = home / "fedllm.toml"
    config.write_text(config.read_text(encoding="utf-8").replace("last_layers = 2\n", f"last_layers = 2\n{line}\n"))


def test_a_plan_is_shown_without_a_coordinator(scene: Scene) -> None:
    """Who, how private, how many bytes: from the files alone, which stay as they are."""
    before = sorted(p.name for p in scene.home.rglob("*"))
    said = fedllm("round", "plan", "tools", "--home", scene.home, "--json")
    assert said.exit_code == 0, said
    plan = said.json()
    assert (plan["owners"], plan["graph"], plan["neighbours"], plan["threshold"]) == (4, "complete", 3, 3)
    assert (plan["least_owners"], plan["least_survivors"], plan["exchanges"]) == (3, 3, 8)
    assert plan["upload_bytes"] > plan["entries"] * plan["entry_bytes"]
    mechanism = plan["mechanism"]
    assert (mechanism["kind"], mechanism["unit"], mechanism["delta"]) == ("dp-sgd", "record", 1e-5)
    assert mechanism["epsilon"] > 0
    assert plan["test"] is None
    assert sorted(p.name for p in scene.home.rglob("*")) == before
    table = fedllm("round", "plan", "--home", scene.home)
    assert table.exit_code == 0
    assert "one round costs ε = " in table.out
    assert "per record (add-or-remove-one), δ = 1e-05" in table.out


def test_a_plan_is_tested_before_owners_see_it(scene: Scene) -> None:
    """The simulator runs the same cohort, ring, layout and mechanism, and what it charges is what the plan says."""
    said = fedllm("round", "plan", "--home", scene.home, "--test", "--json")
    assert said.exit_code == 0, said
    plan = said.json()
    test = plan["test"]
    assert test["exact"] is True
    for name in ("owners", "neighbours", "threshold", "ring_bits", "value_bits"):
        assert test[name] == plan[name]
    assert test["dim"] < plan["entries"] < test["dim"] + 50
    assert test["privacy"]["epsilon"] == plan["mechanism"]["epsilon"]
    assert 0 < test["upload_bytes"] - plan["upload_bytes"] < 300, "but for the goodbye after the last round"


def test_a_plan_that_no_owner_could_run_fails_its_test(scene: Scene) -> None:
    """Fewer than one record expected in a step: the owners' daemons refuse, exit 3, with the words of the refusal."""
    _change(scene.home, "sample_rate = 0.0001")
    shown = fedllm("round", "plan", "--home", scene.home, "--json")
    assert shown.exit_code == 0, shown
    said = fedllm("round", "plan", "--home", scene.home, "--test", "--json")
    assert said.exit_code == 3, said
    assert "error[policy-refused]" in said.err
    assert json.loads(said.out)["test"]["rounds"][0]["state"] == "ABORTED"


def test_settings_that_allow_no_round_are_refused_at_once(scene: Scene) -> None:
    """A ring too small for the cohort, a federation nobody configured."""
    _change(scene.home, "value_bits = 31")
    fedllm("round", "plan", "--home", scene.home).fails(3, "policy-refused", "value_bits 31")
    fedllm("round", "plan", "others", "--home", scene.home).fails(5, "not-found", "others")
