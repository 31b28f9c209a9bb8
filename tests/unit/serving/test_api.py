"""The official OpenAI client, unchanged, against a live server on loopback."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import httpx
import openai
import pytest
import uvicorn
from unit.serving.registry_fake import FakeSource, make_version
from unit.serving.tiny_llama import BASE, make_adapter, make_forcing_adapter, running_engine

from fedllm.clock import SystemClock
from fedllm.rng import OsRng
from fedllm.serving.api import Endpoint, create_app
from fedllm.serving.metrics import Counters
from fedllm.serving.tenants import TenantFile, create_tenant
from fedllm.serving.text import TextCodec
from fedllm.serving.versions import Versions
from fedllm.serving.watch import AliasWatcher

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def live(tiny_folder, tmp_path_factory) -> Iterator[SimpleNamespace]:
    """Serve two versions of ``acme/tools`` (the live one always says ``B``) on a free port."""
    path = tmp_path_factory.mktemp("tenants") / "tenants.toml"
    world = SimpleNamespace(
        key=create_tenant(path, "acme", ["acme/tools", "base"]),
        poor_key=create_tenant(path, "poor", []),
        letter=TextCodec(tiny_folder).encode("B")[0],
    )
    listener = socket.create_server(("127.0.0.1", 0))
    world.url = f"http://127.0.0.1:{listener.getsockname()[1]}"

    async def serve() -> None:
        async with running_engine(tiny_folder, max_running=2, max_waiting=1, kv_blocks=256) as engine:
            source, counters = FakeSource(), Counters()
            versions = Versions(engine, source, "tiny")
            watcher = AliasWatcher(source, engine, versions, counters, SystemClock())
            world.old = source.publish("acme/tools", make_version(make_adapter(1), 1))
            forced = make_forcing_adapter(tiny_folder, world.letter)
            world.new = source.publish("acme/tools", make_version(forced, 2))
            await watcher.poll()
            codec = TextCodec(tiny_folder)
            app = create_app(
                Endpoint(engine, versions, watcher, codec, TenantFile(path), counters, SystemClock(), OsRng())
            )
            world.engine = engine
            world.server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", ws="none"))
            await world.server.serve(sockets=[listener])

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    while not hasattr(world, "server") or not world.server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield world
    world.server.should_exit = True
    thread.join(20)


@pytest.fixture
def client(live) -> Iterator[openai.OpenAI]:
    """Return an OpenAI client of tenant acme."""
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key=live.key, max_retries=0) as made:
        yield made


def test_models_are_those_of_the_tenant(live, client) -> None:
    """A tenant sees its aliases with the base as parent, and nothing without an access list."""
    rows = {m.id: m for m in client.models.list().data}
    assert set(rows) == {"tiny", "acme/tools"}
    assert rows["acme/tools"].model_extra["parent"] == "tiny"
    assert rows["acme/tools"].model_extra["version"] == "tools@v2"
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key=live.poor_key) as poor:
        assert poor.models.list().data == []


def test_chat_answers_with_the_alias_version(live, client) -> None:
    """Text, usage, fingerprint and header name the version that answered."""
    raw = client.chat.completions.with_raw_response.create(model="acme/tools", messages=HELLO, max_tokens=5)
    answer = raw.parse()
    assert answer.choices[0].message.content == "BBBBB"
    assert answer.choices[0].finish_reason == "length"
    assert answer.system_fingerprint == live.new == raw.headers["x-fedllm-version"]
    assert answer.usage.completion_tokens == 5
    assert answer.usage.prompt_tokens == len("<|user|>hello\n<|assistant|>")


def test_streaming_with_usage(live, client) -> None:
    """Every chunk carries the version; the last one the usage."""
    chunks = list(
        client.chat.completions.create(
            model="acme/tools", messages=HELLO, max_tokens=4, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "BBBB"
    assert {c.system_fingerprint for c in chunks} == {live.new}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 4


def test_pins_and_base(live, client) -> None:
    """An older version by number or digest, and the base, answer under their own digest."""
    ids = {"acme/tools@v1": live.old, f"acme/tools@{live.old[:8]}": live.old, "tiny": BASE}
    for model, digest in ids.items():
        answer = client.chat.completions.create(model=model, messages=HELLO, max_tokens=2)
        assert answer.system_fingerprint == digest


def test_text_completion_and_stop_strings(client) -> None:
    """A stop string ends the text before it; token prompts are taken as they are."""
    answer = client.completions.create(model="acme/tools", prompt="hi", max_tokens=6, temperature=0)
    assert answer.choices[0].text == "BBBBBB"
    stopped = client.completions.create(model="acme/tools", prompt=[1, 2, 3], max_tokens=50, stop=["BBB"])
    assert stopped.choices[0].text == ""
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage.completion_tokens == 3


def test_token_ids_and_scores_agree(live, client) -> None:
    """The greedy answer of a version has no regret under that version, and some under another."""
    body = {"return_token_ids": True}
    answer = client.chat.completions.create(
        model="acme/tools", messages=HELLO, max_tokens=4, temperature=0, extra_body=body
    )
    tokens = answer.choices[0].model_extra["token_ids"]
    prompt = answer.model_extra["prompt_token_ids"]
    assert tokens == [live.letter] * 4
    regrets = {}
    for model in ("acme/tools", "acme/tools@v1"):
        asked = {"model": model, "prompt_token_ids": prompt, "token_ids": tokens}
        regrets[model] = client.post("/score", body=asked, cast_to=object)["regrets"]
    assert max(regrets["acme/tools"]) < 1e-3
    assert max(regrets["acme/tools@v1"]) > 1.0


@pytest.mark.parametrize(
    ("change", "kind", "status", "words"),
    [
        ({"model": "acme/none"}, openai.NotFoundError, 404, "does not exist"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, openai.BadRequestError, 400, "512 at most"),
        ({"temperature": 3}, openai.BadRequestError, 400, "from 0 to 2"),
        ({"messages": []}, openai.BadRequestError, 400, "non-empty"),
        ({"n": 2}, openai.BadRequestError, 400, "1 is supported"),
        ({"max_tokens": 0}, openai.BadRequestError, 400, "from 1"),
        ({"stop": [""]}, openai.BadRequestError, 400, "at most 4"),
        ({"logprobs": True}, openai.BadRequestError, 400, "logprobs"),
    ],
)
def test_errors_have_openais_shape(client, change, kind, status, words) -> None:
    """The client raises its own typed errors, with the limit in the message."""
    asked = {"model": "acme/tools", "messages": HELLO, **change}
    with pytest.raises(kind, match=words) as raised:
        client.chat.completions.create(**asked)
    assert raised.value.status_code == status
    assert "xxx" not in str(raised.value)


def test_a_bad_key_is_401_and_another_tenants_model_404(live) -> None:
    """Who may not use a model cannot even learn that it exists."""
    wrong = openai.OpenAI(base_url=f"{live.url}/v1", api_key="wrong", max_retries=0)
    with wrong as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key=live.poor_key, max_retries=0) as poor:
        for model in ("acme/tools", "tiny"):
            with pytest.raises(openai.NotFoundError):
                poor.chat.completions.create(model=model, messages=HELLO)


def test_a_full_queue_is_429_and_leaving_makes_room(live, client) -> None:
    """Three streams fill the queue; the fourth gets 429 with Retry-After; closed streams are cancelled."""
    gate = threading.Event()
    live.engine._commands.put(gate.wait)  # the step thread stands still until the test has looked
    streams = [
        client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=400, stream=True) for _ in range(3)
    ]
    try:
        with pytest.raises(openai.RateLimitError, match="3 requests are in flight") as refused:
            client.chat.completions.create(model="acme/tools", messages=HELLO, max_tokens=1)
        assert int(refused.value.response.headers["retry-after"]) >= 1
    finally:
        for stream in streams:
            stream.close()
        gate.set()
    end = time.monotonic() + 10
    while live.engine.stats().running or live.engine._streams:
        assert time.monotonic() < end
        time.sleep(0.02)
    assert client.chat.completions.create(model="acme/tools", messages=HELLO, max_tokens=1).choices


def test_health_and_metrics(live, client) -> None:
    """Anyone learns that it is up; versions, refusals and counters need a key; no text of a request appears."""
    client.chat.completions.create(model="acme/tools", messages=HELLO, max_tokens=1)
    assert set(httpx.get(f"{live.url}/health").json()) == {"status", "base", "epoch"}
    key = {"authorization": f"Bearer {live.key}"}
    health = httpx.get(f"{live.url}/health", headers=key).json()
    assert health["aliases"]["acme/tools"]["digest"] == live.new
    assert httpx.get(f"{live.url}/metrics").status_code == 401
    text = httpx.get(f"{live.url}/metrics", headers=key).text
    line = 'fedllm_requests_total{route="/v1/chat/completions",status="200",tenant="acme"}'
    assert any(row.startswith(line) for row in text.splitlines())
    assert "hello" not in text + json.dumps(health)
