"""``fedllm demo``: all of it as real processes on loopback, and a table at the end."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import statistics
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import httpx

from fedllm.clock import Clock
from fedllm.config import CoordinatorSettings
from fedllm.demo.cluster import Cluster, command, running
from fedllm.demo.load import Load, Stream
from fedllm.demo.purity import RegretOf, mixed
from fedllm.demo.recipe import ALIAS, DELTA, FEDERATION, DemoRecipe
from fedllm.demo.report import DemoReport, HeldOut, PrivacyClaim
from fedllm.errors import NotReady, RoundAborted

START_LIMIT_S = 240.0
QUIET_S = 10.0
"""Seconds between an app's requests while owners train: apps and owners share these cores."""
BUSY_S = 1.0


class Watcher(Protocol):
    """Shows a person what happens."""

    def stage(self, text: str) -> None:
        """Say that a new part of the demo begins."""

    def round(self, number: int, total: int, state: str, detail: str) -> None:
        """Show where the current round is."""


async def run_demo(
    base: Path,
    data: Mapping[str, Path],
    recipe: DemoRecipe,
    *,
    alone: Mapping[str, tuple[float, float]] | None,
    clock: Clock,
    watch: Watcher,
    keep: Path | None = None,
) -> DemoReport:
    """Run the loop once and report.

    Parameters
    ----------
    base : Path
        The base model's folder.
    data : Mapping[str, Path]
        Owner to data folder.
    recipe : DemoRecipe
    alone : Mapping[str, tuple[float, float]] or None
        With ``--compare``: owner to (loss at home, mean loss everywhere) of its own adapter.
    clock : Clock
    watch : Watcher
    keep : Path, optional
        Leave everything in this folder; otherwise it is a temporary one and goes.
    """
    root = keep or Path(tempfile.mkdtemp(prefix="fedllm-"))
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        cluster = Cluster(root, base, data, recipe)
        watch.stage("enrolling: keys, roster, policies")
        records = {owner: usable_records(folder, base, recipe) for owner, folder in data.items()}
        cluster.enrol(records)
        with running(cluster):
            return await _loop(cluster, alone, clock, watch)
    finally:
        if keep is None:
            shutil.rmtree(root, ignore_errors=True)


def usable_records(folder: Path, base: Path, recipe: DemoRecipe) -> int:
    """Return how many training records an owner would declare."""
    limit = str(recipe.federation["max_tokens"])
    report = json.loads(command("client", "check", "--data", folder, "--base", base, "--max-tokens", limit, "--json"))
    return int(next(f["accepted"] for f in report["files"] if f["file"] == "train.jsonl"))


async def _loop(
    cluster: Cluster, alone: Mapping[str, tuple[float, float]] | None, clock: Clock, watch: Watcher
) -> DemoReport:
    watch.stage("starting 1 coordinator, 4 owners' daemons, 1 endpoint")
    await until_ready(cluster, clock)
    example = pick_example(cluster.data)
    prompts = [_prompt(line) for folder in cluster.data.values() for line in _heldout(folder)[:8]]
    base_id, base_digest = await _base_model(cluster)
    example["before"] = await _ask(cluster, base_id, example["prompt"])
    load = Load(cluster.endpoint, cluster.tenant_key, ALIAS, base_id, prompts)
    asking = asyncio.create_task(load.run())
    began = clock.monotonic()
    try:
        control = Control(cluster)
        await control.post(f"/v1/federations/{FEDERATION}/rounds", {"rounds": cluster.recipe.rounds})
        rounds = await _follow(cluster, control, load, clock, watch)
        await _served(cluster, rounds, clock)
        await clock.sleep(6.0)  # the last version answers under load, too
    finally:
        load.stop()
        with suppress(asyncio.CancelledError):
            await asking
    loop_s = clock.monotonic() - began
    watch.stage("scoring every answer under every version")
    example["after"] = await _ask(cluster, ALIAS, example["prompt"])
    finished = [s for s in load.streams if s.error is None]
    models = {base_digest: base_id, **{d: f"{ALIAS}@{d}" for d in await _version_digests(control)}}
    with httpx.Client(trust_env=False, timeout=120.0) as client:
        suspects = mixed(finished, list(models), _regrets(cluster, client, models))
    # Every replacement of the endpoint's alias table is one flip, and this endpoint started with none.
    swaps = int((await health(cluster))["epoch"])
    return _report(cluster, rounds, load.streams, len(suspects), swaps, loop_s, alone, example)


class Control:
    """The coordinator's control API, asynchronously."""

    def __init__(self, cluster: Cluster) -> None:
        settings = CoordinatorSettings(home=cluster.home, port=cluster.api_port)
        self._url = f"http://{settings.host}:{settings.port}"
        self._token_file = settings.home / "operator.token"

    async def get(self, path: str) -> Any:
        """Return the JSON of a GET."""
        return await self._call("GET", path, None)

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """Return the JSON of a POST."""
        return await self._call("POST", path, body)

    async def _call(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        headers = {"Authorization": f"Bearer {self._token_file.read_text(encoding='utf-8').strip()}"}
        async with httpx.AsyncClient(base_url=self._url, trust_env=False, timeout=60.0) as client:
            answer = await client.request(method, path, json=body, headers=headers)
            answer.raise_for_status()
            return answer.json()


async def until_ready(cluster: Cluster, clock: Clock) -> None:
    """Wait until every owner is connected and the endpoint answers."""
    deadline = clock.monotonic() + START_LIMIT_S
    waiting = "nothing answers yet"
    while clock.monotonic() < deadline:
        cluster.check_alive()
        try:
            status = await Control(cluster).get("/v1/status")
            endpoint = await health(cluster)
            missing = [o["owner"] for f in status["federations"] for o in f["owners"] if not o["connected"]]
            if not missing and endpoint["status"] == "ok":
                return
            waiting = f"waiting for {', '.join(missing) or 'the endpoint'}"
        except (httpx.HTTPError, FileNotFoundError) as error:
            waiting = f"waiting for listeners ({type(error).__name__})"
        await clock.sleep(0.5)
    raise NotReady(f"not ready after {START_LIMIT_S:.0f} s: {waiting}", hint=f"logs are in {cluster.root / 'logs'}")


async def _follow(cluster: Cluster, control: Control, load: Load, clock: Clock, watch: Watcher) -> list[dict[str, Any]]:
    """Watch the rounds until all have ended; raise `RoundAborted` if one did.

    Apps ask more often while a version is being scored, so that streams are open when the alias moves.
    """
    while True:
        cluster.check_alive()
        rounds: list[dict[str, Any]] = (await control.get(f"/v1/federations/{FEDERATION}/rounds"))["rounds"]
        rounds.sort(key=lambda r: r["number"])
        for each in rounds:
            if each["state"] == "ABORTED":
                raise RoundAborted(f"round {each['number']}: {each['reason']}", hint=f"logs in {cluster.root / 'logs'}")
        if rounds:
            last = rounds[-1]
            load.pause_s = BUSY_S if last["state"] in {"EVALUATING", "JUDGED"} else QUIET_S
            watch.round(last["number"], cluster.recipe.rounds, last["state"], last.get("detail") or "")
            if len(rounds) == cluster.recipe.rounds and last["ended"] is not None:
                return rounds
        await clock.sleep(0.5)


async def _served(cluster: Cluster, rounds: list[dict[str, Any]], clock: Clock) -> None:
    """Wait until the endpoint answers from the last promoted version."""
    promoted = [r["version"] for r in rounds if r["promoted"]]
    deadline = clock.monotonic() + 60
    while promoted and clock.monotonic() < deadline:
        if promoted[-1] in {a["digest"] for a in (await health(cluster))["aliases"].values()}:
            return
        await clock.sleep(0.2)


async def health(cluster: Cluster) -> dict[str, Any]:
    """Return the endpoint's health as the tenant sees it."""
    async with httpx.AsyncClient(trust_env=False, timeout=30.0) as client:
        answer = await client.get(f"{cluster.endpoint}/health", headers=_tenant(cluster))
        found: dict[str, Any] = answer.json()
        return found


async def _base_model(cluster: Cluster) -> tuple[str, str]:
    """Return model id and digest of the base."""
    async with httpx.AsyncClient(trust_env=False, timeout=30.0, headers=_tenant(cluster)) as client:
        listed = (await client.get(f"{cluster.endpoint}/v1/models")).json()["data"]
    return next((m["id"], m["digest"]) for m in listed if m["parent"] is None)


async def _ask(cluster: Cluster, model: str, prompt: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": 48, "temperature": 0}
    async with httpx.AsyncClient(trust_env=False, timeout=120.0, headers=_tenant(cluster)) as client:
        answer = await client.post(f"{cluster.endpoint}/v1/chat/completions", json=body)
        answer.raise_for_status()
        return str(answer.json()["choices"][0]["message"]["content"]).strip()


async def _version_digests(control: Control) -> list[str]:
    return [v["digest"] for v in (await control.get("/v1/versions"))["versions"]]


def _regrets(cluster: Cluster, client: httpx.Client, models: Mapping[str, str]) -> RegretOf:
    """Return a function that asks the endpoint to score one answer under one version.

    Parameters
    ----------
    models : Mapping[str, str]
        Version digest to the model id that pins it.
    """

    def regret(digest: str, stream: Stream) -> float:
        body = {"model": models[digest], "prompt_token_ids": stream.prompt_tokens, "token_ids": stream.tokens}
        answer = client.post(f"{cluster.endpoint}/v1/score", json=body, headers=_tenant(cluster))
        answer.raise_for_status()
        return float(sum(answer.json()["regrets"]))

    return regret


def _tenant(cluster: Cluster) -> dict[str, str]:
    return {"Authorization": f"Bearer {cluster.tenant_key}"}


def _heldout(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "heldout.jsonl").read_text(encoding="utf-8").splitlines()]


def _prompt(record: dict[str, Any]) -> str:
    return str(record["messages"][0]["content"])


def pick_example(data: Mapping[str, Path]) -> dict[str, str]:
    """Return the shortest held-out prompt of the first owner, and the answer it should get."""
    record = min(_heldout(next(iter(data.values()))), key=lambda r: len(_prompt(r)))
    return {"prompt": _prompt(record), "wanted": str(record["messages"][-1]["content"])}


def _report(
    cluster: Cluster,
    rounds: list[dict[str, Any]],
    streams: list[Stream],
    mixed_streams: int,
    swaps: int,
    loop_s: float,
    alone: Mapping[str, tuple[float, float]] | None,
    example: dict[str, str],
) -> DemoReport:
    epsilons = {owner: cluster.spent(owner)["epsilon"] for owner in cluster.data}
    known = [e for e in epsilons.values() if e is not None and not math.isinf(e)]
    live = max((r["number"] for r in rounds if r["promoted"]), default=0)
    losses: dict[str, HeldOut] = {}
    for owner in cluster.data:
        mine = {r["round"]: r for r in cluster.rounds_of(owner)}
        home, everywhere = alone[owner] if alone else (None, None)
        base = mine[min(mine)]["head_loss"]
        losses[owner] = HeldOut(base, home, everywhere, mine[live]["candidate_loss"] if live else base)
    phases = sorted({p for r in rounds for p in r["timings"]}, key=list(rounds[0]["timings"]).index)
    return DemoReport(
        owners=len(cluster.data),
        rounds=len(rounds),
        secagg=all(r["secagg"] for r in rounds),
        privacy=PrivacyClaim("record", max(known) if len(known) == len(epsilons) else None, DELTA),
        heldout_loss=losses,
        epsilon_by_owner=epsilons,
        swaps=swaps,
        requests=len(streams),
        failed=sum(s.error is not None for s in streams),
        mixed_version=mixed_streams,
        round_overhead_s=statistics.mean(r["overhead_s"] for r in rounds),
        bytes_up_per_owner=round(
            statistics.mean(sum(r["bytes_up"].values()) for r in rounds) * len(rounds) / len(losses)
        ),
        bytes_down_per_owner=round(
            statistics.mean(sum(r["bytes_down"].values()) for r in rounds) * len(rounds) / len(losses)
        ),
        phase_s={p: statistics.mean(r["timings"].get(p, 0.0) for r in rounds) for p in phases},
        loop_s=loop_s,
        versions=[{k: r[k] for k in ("number", "version", "promoted")} for r in rounds],
        example=example,
    )
