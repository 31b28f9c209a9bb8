"""Forwarding through a whole router: what a replica is told, what a client sees, and what happens when one fails."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import openai
import pytest
from patience import PATIENCE_S
from unit.serving.router.fake_replica import BASE, WORDS, FakeReplica
from unit.serving.router.live_router import ALIAS, read, routed, text, until

WHOLE = "".join(WORDS)
Drive = Callable[..., object]


def _two() -> list[FakeReplica]:
    return [FakeReplica("one"), FakeReplica("two")]


def test_what_a_replica_is_told(tmp_path: Path, drive: Drive) -> None:
    """It gets the whole digest, the router's key, and whom the request is for; the client sees its own model id."""

    async def story() -> None:
        async with routed(tmp_path, [FakeReplica("one")]) as live:
            answer = await live.post(prompt="hello")
            assert answer.status_code == 200
            body = answer.json()
            assert (body["model"], body["system_fingerprint"]) == (ALIAS, live.old)
            assert body["choices"][0]["text"] == WHOLE
            assert answer.headers["x-fedllm-version"] == live.old
            assert answer.headers["x-fedllm-replica"] == "one"
            path, headers, sent = live.replicas["one"].asked[0]
            assert path == "/v1/completions"
            assert sent == {"model": f"{ALIAS}@{live.old}", "prompt": "hello", "max_tokens": 8}
            assert headers["authorization"] == "Bearer router-secret"
            assert {headers["x-fedllm-tenant"], headers["x-fedllm-scope"]} == {"acme"}
            assert float(headers["x-fedllm-weight"]) == 1.0
            assert live.key not in str(headers)
            (record,) = live.records
            assert (record.tenant, record.alias, record.version, record.status) == ("acme", ALIAS, live.old, 200)
            assert (record.prompt_tokens, record.completion_tokens, record.cached_tokens) == (7, 4, 3)
            assert (record.replica, record.retries) == ("one", 0)

    drive(story())


def test_only_operators_see_the_replica(tmp_path: Path, drive: Drive) -> None:
    """Where a prompt is cached, and how many replicas there are, is not a tenant's to know."""

    async def story() -> None:
        async with routed(tmp_path, _two()) as live:
            answer = await live.post(key=live.other_key)
            assert answer.status_code == 200
            assert "x-fedllm-replica" not in answer.headers
            health = (await live.http.get("/health", headers={"authorization": f"Bearer {live.other_key}"})).json()
            assert "replicas" not in health
            assert health["aliases"][ALIAS]["digest"] == live.old
            assert set((await live.http.get("/health")).json()) == {"status", "base", "epoch"}
            health = (await live.http.get("/health", headers={"authorization": f"Bearer {live.key}"})).json()
            assert [row["name"] for row in health["replicas"]] == ["one", "two"]
            assert "secret" not in str(health)

    drive(story())


def test_default_deny(tmp_path: Path, drive: Drive) -> None:
    """No key is 401; what is not on the access list does not exist; no replica hears of either."""

    async def story() -> None:
        async with routed(tmp_path, [FakeReplica("one")]) as live:
            assert (await live.post(key="nobody")).status_code == 401
            for model in (ALIAS, "tiny", f"{ALIAS}@v1", "no/thing"):
                denied = await live.post(key=live.poor_key, model=model)
                assert (denied.status_code, denied.json()["error"]["code"]) == (404, "model_not_found")
            assert (await live.post(key=live.other_key, model="tiny")).status_code == 404
            assert live.replicas["one"].asked == []
            models = await live.http.get("/v1/models", headers={"authorization": f"Bearer {live.other_key}"})
            assert [row["id"] for row in models.json()["data"]] == [ALIAS]
            paths = (await live.http.get("/openapi.json")).json()["paths"]
            assert set(paths) == {"/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/feedback", "/health"}

    drive(story())


def test_model_ids(tmp_path: Path, drive: Drive) -> None:
    """Alias, number, beginning of the digest and base name all reach a replica as what they mean."""

    async def story() -> None:
        async with routed(tmp_path, [FakeReplica("one")]) as live:
            new = live.publish(2)
            await until(lambda: live.models.served[ALIAS].digest == new)
            for model, digest in (
                (ALIAS, new),
                (f"{ALIAS}@v1", live.old),
                (f"{ALIAS}@{live.old[:8]}", live.old),
                ("tiny", BASE),
            ):
                body = (await live.post(model=model)).json()
                assert (body["model"], body["system_fingerprint"]) == (model, digest)
            sent = [body["model"] for _, _, body in live.replicas["one"].asked]
            assert sent == [f"{ALIAS}@{new}", f"{ALIAS}@{live.old}", f"{ALIAS}@{live.old}", "tiny"]
            assert (await live.post(model=f"{ALIAS}@v9")).status_code == 404
            assert [r.alias for r in live.records] == [ALIAS, ALIAS, ALIAS, "base", ""]

    drive(story())


def test_streams(tmp_path: Path, drive: Drive) -> None:
    """The usage is always asked of the replica, and seen by the client only if it asked for it."""

    async def story() -> None:
        async with routed(tmp_path, [FakeReplica("one")]) as live:
            events = await live.events()
            assert events[-1] == "[DONE]"
            assert text(events) == WHOLE
            assert all("usage" not in e and e["choices"] for e in events[:-1])
            assert {(e["model"], e["system_fingerprint"]) for e in events[:-1]} == {(ALIAS, live.old)}
            events = await live.events(stream_options={"include_usage": True})
            assert events[-2]["usage"]["completion_tokens"] == len(WORDS)
            assert all(e["usage"] is None for e in events[:-2])
            await until(lambda: len(live.records) == 2)
            for record in live.records:
                assert (record.prompt_tokens, record.completion_tokens, record.cached_tokens) == (7, 4, 3)
                assert (record.status, record.ttft_s is not None) == (200, True)
            assert (live.fleet.replicas["one"].in_flight, live.fleet.replicas["one"].tokens) == (0, 0)

    drive(story())


FAULTS = ["reset", "refuse:500", "refuse:503", "refuse:429", "refuse:401", "refuse:404", "mixed"]


@pytest.mark.parametrize(
    ("how", "stream"), [*((how, s) for how in FAULTS for s in (False, True)), ("cut", True), ("error", True)]
)
def test_another_replica_takes_over(tmp_path: Path, drive: Drive, how: str, stream: bool) -> None:
    """As long as no byte has been passed on, the client never hears that a replica failed."""

    async def story() -> None:
        async with routed(tmp_path, _two()) as live:
            live.replicas["one"].always = how
            prompt = live.prefer("one")
            if stream:
                assert text(await live.events(prompt=prompt)) == WHOLE
            else:
                assert (await live.post(prompt=prompt)).json()["choices"][0]["text"] == WHOLE
            assert len(live.replicas["one"].asked) == len(live.replicas["two"].asked) == 1
            await until(lambda: live.records)
            (record,) = live.records
            assert (record.status, record.replica, record.retries) == (200, "two", 1)
            assert all(r.in_flight == r.tokens == 0 for r in live.fleet.replicas.values())

    drive(story())


@pytest.mark.parametrize("how", ["break", "truncate", "error-later", "mixed-later"])
def test_a_broken_stream_says_so(tmp_path: Path, drive: Drive, how: str) -> None:
    """After the first token there is no second try: the stream ends with an error event and without ``[DONE]``."""

    async def story() -> None:
        async with routed(tmp_path, _two()) as live:
            live.replicas["one"].always = how
            events = await live.events(prompt=live.prefer("one"))
            code = "replica-mixed" if how == "mixed-later" else "replica-lost"
            assert events[-1]["error"]["code"] == code
            assert events[-1]["error"]["type"] == "server_error"
            assert text(events).startswith("one two ")
            assert live.replicas["two"].asked == []
            await until(lambda: live.records)
            assert (live.records[0].status, live.records[0].completion_tokens) == (502, len(text(events).split()))
            if how == "mixed-later":
                assert live.fleet.replicas["one"].breaker.state == "open"

    drive(story())


def test_a_mixed_answer_is_refused(tmp_path: Path, drive: Drive) -> None:
    """An answer by another version never reaches the client, and opens the replica's circuit at once."""

    async def story() -> None:
        async with routed(tmp_path, [FakeReplica("one")], wait_s=0.2) as live:
            for stream in (False, True):
                live.replicas["one"].script.append("mixed")
                answer = await live.post(stream=stream)
                assert (answer.status_code, answer.json()["error"]["code"]) == (502, "replica-mixed")
                assert WORDS[1] not in answer.text
                assert live.fleet.replicas["one"].breaker.state == "open"
                live.fleet.replicas["one"].breaker.success()

    drive(story())


def test_the_requests_own_fault_is_passed_on(tmp_path: Path, drive: Drive) -> None:
    """A refusal of what was asked is not tried elsewhere, names the client's model id, and blames no replica."""

    async def story() -> None:
        async with routed(tmp_path, _two()) as live:
            live.replicas["one"].always = live.replicas["two"].always = "refuse:400"
            for _ in range(5):
                answer = await live.post()
                assert (answer.status_code, answer.json()["error"]["message"]) == (400, f"refused {ALIAS}")
            assert sum(len(r.asked) for r in live.replicas.values()) == 5
            assert {r.breaker.state for r in live.fleet.replicas.values()} == {"closed"}
            assert {r.status for r in live.records} == {400}
            malformed = await live.post(model=5)
            assert (malformed.status_code, malformed.json()["error"]["code"]) == (400, "request-invalid")

    drive(story())


@pytest.mark.parametrize(
    ("how", "status", "code"),
    [("refuse:500", 503, "not-ready"), ("reset", 503, "not-ready"), ("refuse:429", 429, "overloaded")],
)
def test_nobody_can(tmp_path: Path, drive: Drive, how: str, status: int, code: str) -> None:
    """When all replicas have failed a request, it ends with an error that says whether to come back."""

    async def story() -> None:
        async with routed(tmp_path, _two()) as live:
            live.replicas["one"].always = live.replicas["two"].always = how
            answer = await live.post()
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
            assert answer.headers["x-should-retry"] == "true"
            assert sum(len(r.asked) for r in live.replicas.values()) == 2
            assert (live.records[0].status, live.records[0].prompt_tokens) == (status, 0)

    drive(story())


def test_a_full_replica_has_its_limit_halved(tmp_path: Path, drive: Drive) -> None:
    """A 429 of a replica is no failure: its circuit stays closed, it is given half as much."""

    async def story() -> None:
        async with routed(tmp_path, _two(), max_in_flight=8) as live:
            live.replicas["one"].script.append("refuse:429")
            await live.post(prompt=live.prefer("one"))
            assert (live.fleet.replicas["one"].limit.value, live.fleet.replicas["one"].breaker.state) == (4, "closed")

    drive(story())


def test_a_circuit_opens_and_closes(tmp_path: Path, drive: Drive) -> None:
    """After three failures a replica gets nothing more until its pause is over; then one trial brings it back."""

    async def story() -> None:
        async with routed(tmp_path, _two()) as live:
            bad, prompt = live.replicas["one"], live.prefer("one")
            bad.always = "refuse:500"
            for _ in range(3):
                assert (await live.post(prompt=prompt)).status_code == 200
            breaker = live.fleet.replicas["one"].breaker
            assert breaker.state == "open"
            await live.post(prompt=prompt)
            assert len(bad.asked) == 3
            bad.always = "answer"
            await until(lambda: breaker.state == "half-open")
            await live.post(prompt=prompt)
            assert (len(bad.asked), breaker.state) == (4, "closed")

    drive(story())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_closes_the_upstream(tmp_path: Path, drive: Drive, stream: bool) -> None:
    """Nobody generates for nobody: the replica sees its connection close, and the place is free again."""

    async def story() -> None:
        async with routed(tmp_path, [FakeReplica("one", always="hold")]) as live:
            replica = live.replicas["one"]
            if stream:
                async with live.stream() as answer:
                    await anext(read(answer))
            else:
                asking = asyncio.create_task(live.post())
                await until(lambda: replica.asked)
                asking.cancel()
            await until(lambda: replica.left == 1)
            await until(lambda: live.records)
            assert live.records[0].status == 499
            await until(lambda: live.fleet.replicas["one"].in_flight == 0)
            await asyncio.wait_for(live.models.flights.drained(live.old), PATIENCE_S)

    drive(story())


def test_no_room(tmp_path: Path, drive: Drive) -> None:
    """What does not fit waits; above the bound it is 429 at once, after the time 503; a freed place is taken."""

    async def story() -> None:
        async with routed(tmp_path, [FakeReplica("one", always="hold")], max_in_flight=1, max_waiting=1) as live:
            first = asyncio.create_task(live.post())
            await until(lambda: live.replicas["one"].asked)
            second = asyncio.create_task(live.post())
            await until(lambda: len(live.line) == 1)
            third = await live.post()
            assert (third.status_code, third.json()["error"]["code"]) == (429, "overloaded")
            assert third.headers["retry-after"] == "1"
            live.line.wait_s = 0.05
            fourth = await live.post(key=live.other_key)
            assert (fourth.status_code, fourth.json()["error"]["code"]) == (503, "not-ready")
            live.replicas["one"].gate.set()
            assert {(await first).status_code, (await second).status_code} == {200}
            assert (len(live.line), live.line.backlog_tokens) == (0, 0)

    drive(story())


@pytest.mark.parametrize("broken", [False, True])
def test_openais_client(tmp_path: Path, drive: Drive, broken: bool) -> None:
    """The official client chats through a router, and hears of a lost replica as an error with its code."""

    async def story() -> None:
        async with routed(tmp_path, [FakeReplica("one")]) as live:
            messages = [{"role": "user", "content": "count"}]
            url = f"{live.http.base_url}/v1"
            async with openai.AsyncOpenAI(base_url=url, api_key=live.key, max_retries=0) as client:
                whole = await client.chat.completions.create(model=ALIAS, messages=messages)  # type: ignore[arg-type]
                assert (whole.choices[0].message.content, whole.system_fingerprint) == (WHOLE, live.old)
                assert whole.usage is not None
                assert whole.usage.prompt_tokens_details is not None
                assert whole.usage.prompt_tokens_details.cached_tokens == 3
                live.replicas["one"].always = "break" if broken else "answer"
                said = ""
                stream = await client.chat.completions.create(model=ALIAS, messages=messages, stream=True)  # type: ignore[call-overload]
                try:
                    async for chunk in stream:
                        said += chunk.choices[0].delta.content
                except openai.APIError as error:
                    assert (error.code, said) == ("replica-lost", "one two ")
                    assert broken
                else:
                    assert said == WHOLE
                    assert not broken
            assert live.replicas["one"].asked[0][0] == "/v1/chat/completions"
            await until(lambda: len(live.records) == 2)
            assert [r.completion_tokens for r in live.records] == [4, 2 if broken else 4]

    drive(story())


def test_feedback_is_for_who_was_answered(tmp_path: Path, drive: Drive) -> None:
    """An answer through the router can be rated by its tenant, and by nobody else."""

    async def story() -> None:
        async with routed(tmp_path, [FakeReplica("one")]) as live:
            rating = {"id": (await live.post()).json()["id"], "score": 1}
            for key, status in ((live.other_key, 404), (live.key, 200)):
                headers = {"authorization": f"Bearer {key}"}
                answer = await live.http.post("/v1/feedback", json=rating, headers=headers)
                assert answer.status_code == status

    drive(story())
