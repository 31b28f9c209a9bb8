"""What a key reads of the endpoint is its own; a dead engine is not healthy; who leaves early is counted too."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import httpx
import pytest
from patience import PATIENCE_S
from unit.serving.live_endpoint import live_endpoint, wait_idle

from fedllm.serving.tenants import create_tenant

ASKED = {"model": "tiny", "prompt": [1, 2, 3], "max_tokens": 4, "ignore_eos": True}


@pytest.fixture
def live(tiny_folder, tmp_path) -> Iterator[SimpleNamespace]:
    """Serve with tenants acme (everything), poor (nothing), rival (the base) and an operator."""
    path = tmp_path / "tenants.toml"
    keys = {"rival": create_tenant(path, "rival", ["base"]), "ops": create_tenant(path, "ops", [], operator=True)}
    with live_endpoint(tiny_folder, path) as world:
        world.keys = {"acme": world.key, **keys}
        world.tenants = path
        yield world


def get(live, path: str, who: str) -> httpx.Response:
    """Ask as one of the tenants."""
    return httpx.get(live.url + path, headers={"authorization": f"Bearer {live.keys[who]}"})


def post(live, path: str, body: dict, who: str = "acme", timeout: float = 30) -> httpx.Response:
    """Ask as one of the tenants."""
    headers = {"authorization": f"Bearer {live.keys[who]}"}
    return httpx.post(live.url + path, json=body, headers=headers, timeout=timeout)


def counted(live) -> dict[str, int]:
    """Return acme's counters, by name and status."""
    found = {}
    for line in get(live, "/metrics", "acme").text.splitlines():
        if line.startswith("fedllm_") and 'tenant="acme"' in line:
            labels, _, value = line.rpartition(" ")
            status = labels.partition('status="')[2].partition('"')[0]
            name = labels.partition("{")[0].removeprefix("fedllm_").removesuffix("_total")
            found[f"{name} {status}".strip()] = int(float(value))
    return found


def wait_counted(live, name: str) -> dict[str, int]:
    """Wait until a counter is there."""
    end = time.monotonic() + PATIENCE_S
    while name not in (found := counted(live)):
        assert time.monotonic() < end, found
        time.sleep(0.02)
    return found


def test_a_tenant_reads_nothing_of_another(live) -> None:
    """Neither names, nor totals, nor cache hits: a prompt that another has sent changes nothing that a key can read."""

    def seen() -> tuple[object, ...]:
        rows = [row for row in get(live, "/metrics", "rival").text.splitlines() if not row.startswith("#")]
        return rows, get(live, "/health", "rival").json()

    before = seen()
    for _ in range(2):
        assert post(live, "/v1/completions", {**ASKED, "prompt": [7] * 40}).status_code == 200
    assert httpx.get(f"{live.url}/v1/models").status_code == 401
    assert live.engine.stats().prefix_hit_tokens > 0
    assert seen() == before
    assert post(live, "/v1/completions", ASKED, "rival").status_code == 200
    rows = [row for row in get(live, "/metrics", "rival").text.splitlines() if not row.startswith("#")]
    assert rows
    assert all('tenant="rival"' in row for row in rows)
    assert 'fedllm_alias_flips_total{alias="acme/tools"} 1' in get(live, "/metrics", "acme").text


def test_an_operator_reads_everything(live) -> None:
    """The engine's gauges, the tiers and every tenant's lines are there for the key that is marked."""
    post(live, "/v1/completions", ASKED)
    text = get(live, "/metrics", "ops").text
    assert 'tenant="acme"' in text
    assert "fedllm_engine_prefix_hit_tokens_total " in text
    assert "fedllm_engine_alive 1" in text
    assert {"engine", "tiers"} <= set(get(live, "/health", "ops").json())


def test_a_dead_engine_is_unhealthy(live, monkeypatch) -> None:
    """When the step thread has ended, health is a 503 that says so, with a key and without."""
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    assert httpx.get(f"{live.url}/health").status_code == 200

    def fail() -> None:
        raise RuntimeError

    live.engine._commands.put(fail)
    live.engine._thread.join(PATIENCE_S)
    end = time.monotonic() + PATIENCE_S
    while live.engine.stats().alive:
        assert time.monotonic() < end
        time.sleep(0.01)
    for headers in ({}, {"authorization": f"Bearer {live.key}"}):
        answer = httpx.get(f"{live.url}/health", headers=headers)
        assert (answer.status_code, answer.json()["status"]) == (503, "failed")
    answer = post(live, "/v1/completions", ASKED)
    assert answer.status_code == 500
    assert "completion_tokens" not in counted(live)


@pytest.mark.parametrize("harm", ["missing", "malformed"])
def test_a_broken_tenants_file_locks_nobody_out_and_tells_nobody(live, caplog, harm: str) -> None:
    """Known keys go on, strangers get their 401, and neither reads the path; the log has a code."""
    if harm == "missing":
        live.tenants.unlink()
    else:
        live.tenants.write_text("[acme")
    with caplog.at_level(logging.ERROR):
        assert post(live, "/v1/completions", ASKED).status_code == 200
        answer = httpx.post(f"{live.url}/v1/completions", json=ASKED)
    assert answer.status_code == 401
    assert "tenants.toml" not in answer.text
    assert httpx.get(f"{live.url}/health").status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_early_is_counted_once(live, stream: bool) -> None:
    """A client that cuts its answer off has its prompt and the tokens made by then on its account, status 499."""
    body = {**ASKED, "max_tokens": 400, "stream": stream}
    gate = threading.Event()
    if stream:
        headers = {"authorization": f"Bearer {live.key}"}
        with httpx.stream("POST", f"{live.url}/v1/completions", json=body, headers=headers) as answer:
            next(answer.iter_lines())
            live.engine._commands.put(gate.wait)
    else:
        live.engine._commands.put(gate.wait)
        with pytest.raises(httpx.ReadTimeout):
            post(live, "/v1/completions", body, timeout=0.3)
    try:
        found = wait_counted(live, "requests 499")
    finally:
        gate.set()
    wait_idle(live)
    assert counted(live) == found
    assert found["prompt_tokens"] == 3
    assert found.get("completion_tokens", 0) >= stream
    assert found["requests 499"] == 1
    assert "requests 200" not in found


def test_a_stream_that_fails_is_counted_once(live) -> None:
    """The engine dies under a stream: its tokens count, and its status is the error's."""
    headers = {"authorization": f"Bearer {live.key}"}
    body = {**ASKED, "max_tokens": 400, "stream": True}
    with httpx.stream("POST", f"{live.url}/v1/completions", json=body, headers=headers) as answer:
        lines = answer.iter_lines()
        next(lines)
        live.engine._commands.put(None)
        events = [line for line in lines if line.startswith("data: ")]
    assert "error" in json.loads(events[-1].removeprefix("data: "))
    found = wait_counted(live, "requests 500")
    assert (found["requests 500"], found["prompt_tokens"]) == (1, 3)
    assert found["completion_tokens"] >= 1


def test_whole_answers_streams_and_scores_are_counted(live) -> None:
    """Each counts its tokens once; scoring computes prompt and answer, a refused one nothing."""
    post(live, "/v1/completions", ASKED)
    post(live, "/v1/completions", {**ASKED, "stream": True})
    assert wait_counted(live, "requests 200") == {"requests 200": 2, "prompt_tokens": 6, "completion_tokens": 8}
    asked = {"model": "tiny", "prompt_token_ids": [1, 2], "token_ids": [3, 4, 5]}
    assert post(live, "/v1/score", asked).status_code == 200
    assert post(live, "/v1/score", {**asked, "token_ids": [3] * 600}).status_code == 400
    assert counted(live)["prompt_tokens"] == 6 + 5
    assert counted(live)["completion_tokens"] == 8


def test_a_broken_source_is_a_503_without_its_text(live, monkeypatch) -> None:
    """What a source raises that nobody foresaw asks the client to come again, and says nothing more."""
    texts = []

    async def broken(*_: object) -> None:
        await asyncio.sleep(0)
        texts.append("secret place")
        raise OSError(texts[-1])

    monkeypatch.setattr("unit.serving.registry_fake.FakeSource.versions", broken)
    answer = post(live, "/v1/completions", {**ASKED, "model": "acme/tools@v1"})
    assert (answer.status_code, texts) == (503, ["secret place"])
    assert "secret place" not in answer.text
    health = get(live, "/health", "acme").json()
    assert health["source_error"] == "OSError"


def test_a_router_reads_and_rates_nothing_of_a_namesake(live) -> None:
    """Its tenant has the name of one of this file's: the two are not the same, and neither counters nor answers are."""
    answer = post(live, "/v1/completions", ASKED).json()
    key = create_tenant(live.tenants, "front", ["*"], router=True)
    headers = {"authorization": f"Bearer {key}", "x-fedllm-tenant": "acme"}
    counters = httpx.get(f"{live.url}/metrics", headers=headers)
    assert (counters.status_code, counters.text) == (200, "")
    rated = httpx.post(f"{live.url}/v1/feedback", headers=headers, json={"id": answer["id"], "score": -1})
    assert rated.status_code == 404
    assert live.ratings == []
    assert post(live, "/v1/feedback", {"id": answer["id"], "score": 1}).status_code == 200
