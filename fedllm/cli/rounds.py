"""``fedllm round``: plan rounds, ask a running coordinator for them, and look at them."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fedllm.cli.context import ControlApi, coordinator_settings, error_class, pick_federation
from fedllm.cli.output import print_json, print_line, print_table, say
from fedllm.cli.plain import Noun
from fedllm.cli.simulate import failure, print_report
from fedllm.cli.simulate import run as run_simulation
from fedllm.errors import FedllmError, PolicyRefused, RoundAborted

if TYPE_CHECKING:
    from fedllm.config import FederationSettings
    from fedllm.messages.plan import RoundPlan
    from fedllm.simulate.report import SimulationReport

app = Noun("Run rounds and look at them.")
HOME = typer.Option(..., help="The coordinator's folder.")
FEDERATION = typer.Option(None, help="Federation, if there are several.")
NUMBER = typer.Argument(..., help="Number of the round.")
JSON = typer.Option(False, "--json", help="Print JSON.")
_POLL_S = 0.5


@app.command("run")
def run(
    home: Path = HOME,
    federation: str | None = FEDERATION,
    rounds: int = typer.Option(1, min=1, help="How many rounds."),
    follow: bool = typer.Option(True, help="Wait and show progress; otherwise only ask."),
    as_json: bool = JSON,
) -> None:
    """Ask for rounds; exit 0 if all were judged, 3 if owners refused, 1 if one was aborted."""
    api, name = _connect(home, federation)
    before = [r["number"] for r in api.call("GET", f"/v1/federations/{name}/rounds")["rounds"]]
    api.call("POST", f"/v1/federations/{name}/rounds", {"rounds": rounds})
    if not follow:
        if as_json:
            print_json({"federation": name, "asked": rounds})
        else:
            print_line(f"asked for {rounds} rounds of {name}")
        return
    done = _follow(api, name, set(before), rounds)
    if as_json:
        print_json(done)
    else:
        _print_rounds(name, done)
    for each in done:
        if each["state"] == "ABORTED":
            raise _abort_error(each)


@app.command("plan")
def plan(
    federation: str | None = typer.Argument(None, help="Federation, if there are several."),
    home: Path = HOME,
    test: bool = typer.Option(False, "--test", help="Run the plan on a toy task in this process first."),
    as_json: bool = JSON,
) -> None:
    """Show the plan that the whole roster would get, and what it costs; nobody is contacted."""
    from fedllm.privacy.mechanism import describe
    from fedllm.server.app import load_federation
    from fedllm.simulate.forecast import Forecast
    from fedllm.simulate.world import whole_plan

    settings, federations, _ = coordinator_settings(home)
    loaded = load_federation(pick_federation(federations, federation), settings.home)
    made = whole_plan(loaded)
    forecast = Forecast.of(made, loaded.roster)
    tested = _tested(loaded.settings, made) if test else None
    epsilon = forecast.mechanism["epsilon"]
    mechanism = made.mechanism
    cost = describe(math.inf if epsilon is None else epsilon, mechanism.delta, mechanism.unit, mechanism.relation)
    if as_json:
        print_json({**asdict(forecast), "test": None if tested is None else tested.to_json()})
    else:
        facts = [(k, v) for k, v in asdict(forecast).items() if k not in {"federation", "mechanism"}]
        print_table(f"{forecast.federation}: the next round, with everybody", ("what", "value"), facts)
        print_line(f"one round costs {cost}" if mechanism.covered else "no differential privacy")
        if mechanism.shares is not None:
            print_line(
                f"noise over signal: {forecast.mechanism['noise_over_signal']:.3g} in the sum of {forecast.owners}"
                f" owners, {mechanism.shares.honest} of whose noise is counted on"
            )
        if tested is not None:
            print_report(tested)
    error = None if tested is None else failure(tested)
    if error is not None:
        raise error


@app.command("list")
def list_rounds(home: Path = HOME, federation: str | None = FEDERATION, as_json: bool = JSON) -> None:
    """List every round: how it ended, what it made, what it cost."""
    api, name = _connect(home, federation)
    found = api.call("GET", f"/v1/federations/{name}/rounds")["rounds"]
    if as_json:
        print_json(found)
    else:
        _print_rounds(name, found)


@app.command("show")
def show(
    number: int = NUMBER,
    home: Path = HOME,
    federation: str | None = FEDERATION,
    as_json: bool = JSON,
) -> None:
    """Show one round: seconds by phase, bytes by owner, verdict, faults."""
    api, name = _connect(home, federation)
    found = api.call("GET", f"/v1/federations/{name}/rounds/{number}")
    if as_json:
        print_json(found)
        return
    facts = [(k, found[k]) for k in ("state", "reason", "version", "promoted", "method", "survivors", "threshold")]
    cut = found["saturated"]
    facts += [
        ("verdict", (found["verdict"] or {}).get("reason")),
        ("entries cut by the clip range", None if cut is None else f"{cut:.2%}"),
    ]
    print_table(f"{name}: round {number}", ("what", "value"), facts)
    if found["attempts"]:
        failed = [(each["attempt"], each["reason"]) for each in found["attempts"]]
        print_table(f"attempts before the {found['attempt']}. one", ("attempt", "why it failed"), failed)
    if found["refusals"]:
        said = [(owner, no["code"], no["message"]) for owner, no in sorted(found["refusals"].items())]
        print_table("owners that refused", ("owner", "code", "why"), said)
    if found["faults"]:
        print_table(
            "faults", ("owner", "code", "what"), [(f["owner"], f["code"], f["message"]) for f in found["faults"]]
        )
    print_table("seconds", ("phase", "s"), found["timings"].items())
    rows = [(owner, found["bytes_up"].get(owner, 0), found["bytes_down"].get(owner, 0)) for owner in found["cohort"]]
    print_table("bytes", ("owner", "up", "down"), rows)


@app.command("abort")
def abort(
    number: int = NUMBER,
    home: Path = HOME,
    federation: str | None = FEDERATION,
    reason: str = typer.Option("aborted by the operator", help="Goes into the journal and to the owners."),
) -> None:
    """End the round in progress; reserved epsilon stays spent."""
    api, name = _connect(home, federation)
    api.call("POST", f"/v1/federations/{name}/rounds/{number}/abort", {"reason": reason})
    print_line(f"round {number} of {name} is being aborted")


def _connect(home: Path, federation: str | None) -> tuple[ControlApi, str]:
    settings, federations, _ = coordinator_settings(home)
    return ControlApi(settings), pick_federation(federations, federation).name


def _tested(settings: FederationSettings, made: RoundPlan) -> SimulationReport:
    """Run one round of this plan on the toy task, with as many owners and entries and the same mechanism."""
    from fedllm.client.pipeline import update_codec
    from fedllm.simulate.fates import Chances, drawn

    return run_simulation(settings, dim=update_codec(made).layout_size, rounds=1, fates=drawn(0, Chances()), seed=0)


def _follow(api: ControlApi, name: str, before: set[int], rounds: int) -> list[dict[str, Any]]:
    last = ""
    while True:
        answer = api.call("GET", f"/v1/federations/{name}/rounds")
        mine = [r for r in answer["rounds"] if r["number"] not in before]
        if mine:
            line = f"round {mine[-1]['number']}: {mine[-1]['state'].lower()} {mine[-1]['detail'] or ''}".rstrip()
        else:
            status = api.call("GET", "/v1/status")
            line = next((f["waiting"] for f in status["federations"] if f["name"] == name), None) or "waiting"
        if line != last:
            say(line)
        last = line
        ended = [r for r in mine if r["ended"] is not None]
        if len(ended) >= rounds or (ended and ended[-1]["state"] == "ABORTED" and not answer["wanted"]):
            return ended
        time.sleep(_POLL_S)
        sys.stderr.flush()


def _print_rounds(name: str, rounds: list[dict[str, Any]]) -> None:
    rows = [
        (r["number"], r["state"].lower(), "yes" if r["promoted"] else "no", (r["version"] or "-")[:12],
         f"{r['survivors']}/{len(r['cohort'])}", r["wall_s"], r["overhead_s"],
         (r["verdict"] or {}).get("reason") or r["reason"])
        for r in rounds
    ]  # fmt: skip
    columns = ("round", "state", "live", "version", "owners", "wall s", "overhead s", "why")
    print_table(f"rounds of {name}", columns, rows)


def _abort_error(record: dict[str, Any]) -> FedllmError:
    found = error_class(record["code"] or "")
    kind = found if found is not None and issubclass(found, PolicyRefused) else RoundAborted
    return kind(
        f"round {record['number']} was aborted: {record['reason']}",
        hint=f"'fedllm round show {record['number']}' has the details; what was reserved stays spent",
    )
