"""Clients that misbehave: slow, deaf, half gone, too many, too much. The endpoint stays healthy and says why."""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import httpx
import pytest
from patience import PATIENCE_S
from unit.serving.live_endpoint import live_endpoint, wait_idle

CONNECTIONS = 1000
SECRET = "my private words"


@pytest.fixture(scope="module")
def live(tiny_folder, tmp_path_factory) -> Iterator[SimpleNamespace]:
    """Serve with a short patience for those who do not read or do not send."""
    tenants = tmp_path_factory.mktemp("tenants") / "tenants.toml"
    sizes = {"max_running": 4, "max_waiting": 4, "kv_blocks": 1024}
    with live_endpoint(tiny_folder, tenants, stall_s=0.5, body_s=0.5, **sizes) as world:
        yield world


@pytest.fixture(autouse=True)
def healthy(live) -> Iterator[None]:
    """After every abuse the endpoint answers, nothing runs, and no version is held."""
    yield
    wait_idle(live)
    assert httpx.get(f"{live.url}/health").json()["status"] == "ok"
    answer = post(live, {"max_tokens": 2})
    assert answer.json()["choices"][0]["message"]["content"] == "BB"
    wait_idle(live)  # a request that was still on its way may have been admitted, and cancelled, since
    assert live.engine.stats().free_blocks == live.engine.stats().total_blocks


def request_bytes(live, body: dict[str, object], *, length: int | None = None) -> bytes:
    """Return a chat request as it goes over the wire."""
    asked = {"model": "acme/tools", "messages": [{"role": "user", "content": SECRET}], "temperature": 0, **body}
    data = json.dumps(asked).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {live.key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(data) if length is None else length}\r\n\r\n"
    )
    return head.encode() + data


def post(live, body: dict[str, object], **options) -> httpx.Response:
    """Ask as a decent client does."""
    asked = {"model": "acme/tools", "messages": [{"role": "user", "content": "x"}], "temperature": 0, **body}
    return httpx.post(
        f"{live.url}/v1/chat/completions", json=asked, headers={"authorization": f"Bearer {live.key}"}, **options
    )


def connect(live, **options: int) -> socket.socket:
    """Open a connection, with a small receive buffer if asked."""
    made = socket.socket()
    for name, value in options.items():
        made.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
    made.settimeout(PATIENCE_S)
    made.connect(("127.0.0.1", live.port))
    return made


def read_all(connection: socket.socket) -> bytes:
    """Read until the other side closes."""
    data = b""
    while part := connection.recv(65536):
        data += part
    return data


def wait_until(true: Callable[[], bool], seconds: float = PATIENCE_S) -> None:
    """Wait for something that must become true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


LONG_STREAM = {"stream": True, "max_tokens": 450, "n": 4, "logprobs": True, "top_logprobs": 20, "ignore_eos": True}


def test_a_client_that_never_reads_is_cut_off_and_stalls_nobody(live, caplog) -> None:
    """Its events fill a bounded buffer, others are served meanwhile, and its version is let go."""
    caplog.set_level(logging.INFO, "fedllm.serving")
    deaf = connect(live, SO_RCVBUF=4096)
    try:
        deaf.sendall(request_bytes(live, LONG_STREAM))
        wait_until(lambda: live.engine.stats().running > 0)
        start = time.monotonic()
        assert post(live, {"max_tokens": 2}, timeout=PATIENCE_S).status_code == 200
        assert time.monotonic() - start < 15
        wait_until(lambda: "reader-stalled" in [record.getMessage() for record in caplog.records])
        wait_until(lambda: not live.engine._slots.requests(live.new))
    finally:
        deaf.close()


def test_a_slow_reader_gets_everything(live) -> None:
    """Reading slowly, but reading, is no offence: the stream arrives whole."""
    slow = connect(live, SO_RCVBUF=8192)
    slow.sendall(request_bytes(live, {"stream": True, "max_tokens": 100}))
    data = b""
    while b"[DONE]" not in data:
        data += slow.recv(2048)
        time.sleep(0.005)
    assert data.count(b'"content":"B"') == 100
    slow.close()


def test_a_half_closed_connection_counts_as_gone(live) -> None:
    """A client that shuts its sending side down has left: its request is cancelled, not run to the end."""
    half = connect(live)
    half.sendall(request_bytes(live, {"max_tokens": 450}))
    steps = live.engine.stats().steps
    half.shutdown(socket.SHUT_WR)
    read_all(half)
    wait_idle(live)
    assert live.engine.stats().steps - steps < 440
    half.close()


def test_leaving_in_the_middle_of_n_cancels_all_of_them(live) -> None:
    """A connection reset while four continuations stream stops all four."""
    gone = connect(live)
    gone.sendall(request_bytes(live, LONG_STREAM))
    gone.recv(100)
    steps = live.engine.stats().steps
    gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    gone.close()
    wait_idle(live)
    assert live.engine.stats().steps - steps < 440


def test_leaving_in_the_middle_of_the_body_is_no_failure(live, caplog) -> None:
    """Half a body and a reset leave no error in the log."""
    gone = connect(live)
    gone.sendall(request_bytes(live, {}, length=5000))
    gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    gone.close()
    time.sleep(0.2)
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_body_that_never_ends_is_refused_in_time(live) -> None:
    """The message names the limit, and the connection is closed."""
    slow = connect(live)
    slow.sendall(request_bytes(live, {}, length=5000))
    answer = read_all(slow)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"within 0.5 s" in answer
    slow.close()


@pytest.mark.parametrize("size", [2_000_000, 30_000_000])
def test_a_body_too_long_is_refused_with_the_limit(live, size) -> None:
    """A little too long is read to its end to be answered; far too long is answered and closed."""
    try:
        answer = post(live, {"messages": [{"role": "user", "content": "x" * size}]}, timeout=PATIENCE_S)
    except httpx.TransportError:
        assert size > 8_000_000  # closed while it was still sending
        return
    assert answer.status_code == 400
    assert "1048576 bytes" in answer.json()["error"]["message"]


def test_a_prompt_of_a_megabyte_is_refused_while_others_are_served(live) -> None:
    """It is counted off the event loop: small requests go on, and the refusal names tokens and limit."""
    answers: list[httpx.Response] = []
    body = {"messages": [{"role": "user", "content": "hello w" * 145_000}]}
    thread = threading.Thread(target=lambda: answers.append(post(live, body, timeout=PATIENCE_S)))
    thread.start()
    waits = []
    while thread.is_alive():
        start = time.monotonic()
        httpx.get(f"{live.url}/health", timeout=PATIENCE_S)
        waits.append(time.monotonic() - start)
    assert answers[0].status_code == 400
    assert "512 at most" in answers[0].json()["error"]["message"]
    assert len(waits) > 3


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 500_000,
        b'{"model": "tiny", "messages": ' + b'[{"a":' * 100_000,
        b"\xff\xfe",
        b"",
        b"null",
        b"9" * 100_000,
        b'{"model": "tiny", "seed": ' + b"9" * 4000 + b', "prompt": "x"}',
        b'{"model": "\\ud800", "prompt": "x"}',
        b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
        b'{"model": "tiny", "prompt": [99999999999999999999999]}',
        b'{"model": "tiny", "prompt": "x", "response_format": {"type": "json_schema", "json_schema": {"schema": '
        + b'{"items":' * 900
        + b"1"
        + b"}" * 900
        + b"}}}",
        b'{"model": "tiny", "prompt": "x", "response_format": {"type": "json_schema", "json_schema": {"schema": '
        b'{"const":' + b"[" * 900 + b"]" * 900 + b"}}}}",
    ],
    ids=range(12),
)
@pytest.mark.parametrize("path", ["chat/completions", "completions", "score"])
def test_hostile_json_is_a_bad_request(live, data, path) -> None:
    """Nesting, huge numbers, broken Unicode and empty bodies are 400, never 500."""
    answer = httpx.post(f"{live.url}/v1/{path}", content=data, headers={"authorization": f"Bearer {live.key}"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_thousand_connections_leave_the_engine_healthy(live) -> None:
    """All ask at once: a few are served, the others get 429 with Retry-After, none hangs and none gets a 5xx."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = 2 * CONNECTIONS + 256
    if soft < need:
        if hard < need:
            pytest.skip(f"{need} open files are needed, {hard} are allowed")
        resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))
    asked = request_bytes(live, {"max_tokens": 20}).replace(b"host: x\r\n", b"host: x\r\nconnection: close\r\n")

    async def one(gate: asyncio.Event) -> tuple[int, bool]:
        reader, writer = await asyncio.open_connection("127.0.0.1", live.port)
        await gate.wait()
        writer.write(asked)
        answer = await reader.read()
        writer.close()
        return int(answer.split(b" ", 2)[1]), b"retry-after:" in answer.lower()

    async def body() -> Counter[tuple[int, bool]]:
        gate = asyncio.Event()
        tasks = [asyncio.create_task(one(gate)) for _ in range(CONNECTIONS)]
        await asyncio.sleep(1.0)
        gate.set()
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"{live.url}/health", timeout=30)).status_code == 200
        return Counter(await asyncio.wait_for(asyncio.gather(*tasks), 60))

    seen = asyncio.run(body())
    assert set(seen) <= {(200, False), (429, True)}, seen
    assert seen[200, False] >= 8
    assert seen.total() == CONNECTIONS


def test_the_unforeseen_is_a_500_without_its_text(live, caplog, monkeypatch) -> None:
    """A defect answers in OpenAI's shape; neither answer nor log quotes the request."""

    def broken(*args, **options):
        raise KeyError(SECRET)

    monkeypatch.setattr("fedllm.serving.api.tokenize", broken)
    answer = post(live, {"messages": [{"role": "user", "content": SECRET}]})
    monkeypatch.undo()
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    logged = [record for record in caplog.records if record.getMessage() == "request-failed"]
    assert logged[0].fedllm_fields["kind"] == "KeyError"
    assert SECRET not in answer.text + caplog.text + str([record.__dict__ for record in caplog.records])
