"""The official OpenAI client, unchanged, against a live server on loopback."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import httpx
import openai
import pytest
from unit.serving.live_endpoint import live_endpoint, wait_idle
from unit.serving.tiny_llama import BASE

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def live(tiny_folder, tmp_path_factory) -> Iterator[SimpleNamespace]:
    """Serve two versions of ``acme/tools`` (the live one always says ``B``) on a free port."""
    tenants = tmp_path_factory.mktemp("tenants") / "tenants.toml"
    with live_endpoint(tiny_folder, tenants, max_running=2, max_waiting=1) as world:
        yield world


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
    raw = client.chat.completions.with_raw_response.create(
        model="acme/tools", messages=HELLO, max_tokens=5, temperature=0
    )
    answer = raw.parse()
    assert answer.choices[0].message.content == "BBBBB"
    assert answer.choices[0].finish_reason == "length"
    assert answer.system_fingerprint == live.new == raw.headers["x-fedllm-version"]
    assert answer.usage.completion_tokens == 5
    assert answer.usage.prompt_tokens == len("<|user|>hello\n<|assistant|>")


def test_an_answer_is_rated_by_who_got_it(live, client) -> None:
    """The version that gave it is credited; a stranger's id is unknown, and a score is 1 or -1."""
    answer = client.chat.completions.create(model="acme/tools", messages=HELLO, max_tokens=2, temperature=0)

    def rate(key: str, **body: object) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"}
        return httpx.post(f"{live.url}/v1/feedback", json={"id": answer.id, "score": -1, **body}, headers=headers)

    good = rate(live.key)
    assert good.status_code == 200
    assert good.json()["system_fingerprint"] == live.new
    assert live.ratings == [(live.new, "acme/tools", False)]
    assert rate(live.key).status_code == 200  # again: once
    stranger = rate(live.poor_key)
    assert (stranger.status_code, stranger.json()["error"]["code"]) == (404, "answer-unknown")
    assert rate(live.key, score=3).status_code == 400
    assert len(live.ratings) == 1


def test_streaming_with_usage(live, client) -> None:
    """Every chunk carries the version; the last one the usage."""
    chunks = list(
        client.chat.completions.create(
            model="acme/tools",
            messages=HELLO,
            max_tokens=4,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "BBBB"
    assert {c.system_fingerprint for c in chunks} == {live.new}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 4
    assert 0 <= chunks[-1].usage.prompt_tokens_details.cached_tokens < chunks[-1].usage.prompt_tokens


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
    stopped = client.completions.create(
        model="acme/tools", prompt=[1, 2, 3], max_tokens=50, stop=["BBB"], temperature=0
    )
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
        ({"n": 17}, openai.BadRequestError, 400, "from 1 to 16"),
        ({"echo": True}, openai.BadRequestError, 400, "echo is not supported"),
        ({"max_tokens": 0}, openai.BadRequestError, 400, "from 1"),
        ({"stop": [""]}, openai.BadRequestError, 400, "at most 4"),
        ({"stop": ["x"] * 10_000}, openai.BadRequestError, 400, "at most 4"),
        ({"stop": "x" * 257}, openai.BadRequestError, 400, "256 characters"),
        ({"top_logprobs": 3}, openai.BadRequestError, 400, "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, openai.BadRequestError, 400, "from 0 to 20"),
        ({"logit_bias": {"xx": 1}}, openai.BadRequestError, 400, "token ids"),
        ({"logit_bias": {"384": 1}}, openai.BadRequestError, 400, "0 to 383"),
        ({"logit_bias": {"1": 101}}, openai.BadRequestError, 400, "-100 to 100"),
        *(
            ({"model": f"acme/tools@{pin}"}, openai.NotFoundError, 404, "does not exist")
            for pin in ("v\u00b2", "v\u0661", "v" + "1" * 5000, "v0000000001", "v", "v-1", "v1\n")
        ),
        *(
            ({name: value}, openai.BadRequestError, 400, f"{name} is not supported")
            for name, value in {
                "min_tokens": 2,
                "guided_json": {},
                "guided_regex": "a",
                "guided_choice": ["a"],
                "guided_grammar": "root ::= 'a'",
                "structured_outputs": {"regex": "a"},
                "allowed_token_ids": [1],
                "bad_words": ["a"],
                "truncate_prompt_tokens": 5,
                "reasoning_effort": "low",
                "prediction": {"type": "content", "content": "a"},
            }.items()
        ),
        ({"messages": [{"role": "user", "content": "x" * 2_000_000}]}, openai.BadRequestError, 400, "1048576 bytes"),
    ],
)
def test_errors_have_openais_shape(client, change, kind, status, words) -> None:
    """The client raises its own typed errors, with the limit in the message."""
    asked = {"model": "acme/tools", "messages": HELLO}
    with pytest.raises(kind, match=words) as raised:
        client.chat.completions.create(**asked, extra_body=change)
    assert raised.value.status_code == status
    assert "xxx" not in str(raised.value)


def test_empty_and_unknown_fields_change_nothing(client) -> None:
    """What asks for nothing is not refused, and a field that nobody knows is ignored."""
    empty = {"min_tokens": 0, "bad_words": [], "allowed_token_ids": None, "guided_json": None, "mood": "good"}
    asked = {"model": "acme/tools", "messages": HELLO, "max_tokens": 2, "temperature": 0}
    assert client.chat.completions.create(**asked, extra_body=empty).choices[0].message.content == "BB"


@pytest.mark.parametrize("path", ["chat/completions", "completions", "score"])
@pytest.mark.parametrize(
    ("encode", "words"),
    [
        (lambda body: body.replace("hello", "\ud800").encode("utf-8", "surrogatepass"), "not UTF-8"),
        (lambda body: body.encode("utf-16"), "not UTF-8"),
        (lambda body: body.replace("hello", "\ud800").encode("utf-16-le", "surrogatepass"), "not UTF-8|not JSON"),
        (lambda body: body.encode("utf-32-be"), "not JSON"),
        (lambda body: body.replace("hello", "\\ud800").encode(), "not Unicode"),
    ],
)
def test_bodies_are_utf_8(live, path, encode, words) -> None:
    """Half a surrogate pair as raw bytes, and encodings that a lenient parser would guess, are the sender's error."""
    body = {"model": "acme/tools", "prompt": "hello", "messages": HELLO, "prompt_token_ids": [1], "token_ids": [2]}
    answer = httpx.post(
        f"{live.url}/v1/{path}", content=encode(json.dumps(body)), headers={"authorization": f"Bearer {live.key}"}
    )
    assert answer.status_code == 400
    assert re.search(words, answer.json()["error"]["message"])


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
    wait_idle(live)
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
