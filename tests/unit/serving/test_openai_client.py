"""The contract: calls as apps make them with the official client, and what they get."""

from __future__ import annotations

import builtins
import json
from collections import defaultdict
from collections.abc import Iterator
from types import SimpleNamespace

import httpx
import jsonschema_rs
import openai
import pytest
from unit.serving.live_endpoint import live_endpoint, wait_idle

HELLO = [{"role": "user", "content": "hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["ok", "count"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": SCHEMA}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {"type": "object", "properties": {"day": {"enum": ["mon", "tue"]}}, "required": ["day"]},
        },
    }
    for name in ("weather", "remind")
]


@pytest.fixture(scope="module")
def live(tiny_folder, tmp_path_factory) -> Iterator[SimpleNamespace]:
    """Serve with room for many."""
    tenants = tmp_path_factory.mktemp("tenants") / "tenants.toml"
    with live_endpoint(tiny_folder, tenants) as world:
        yield world


@pytest.fixture(scope="module")
def client(live) -> Iterator[openai.OpenAI]:
    """Return an OpenAI client of tenant acme."""
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key=live.key, max_retries=0) as made:
        yield made


def test_json_schema_is_kept_by_a_random_model(client) -> None:
    """The content parses, is valid and ends by itself, streamed or not, with several continuations."""
    asked = {"model": "tiny", "messages": HELLO, "response_format": FORMAT, "max_tokens": 100}
    answer = client.chat.completions.create(**asked, n=3, seed=4)
    for choice in answer.choices:
        jsonschema_rs.validate(SCHEMA, json.loads(choice.message.content))
        assert choice.finish_reason == "stop"
    chunks = list(client.chat.completions.create(**asked, stream=True))
    jsonschema_rs.validate(SCHEMA, json.loads("".join(c.choices[0].delta.content or "" for c in chunks)))


def test_json_object_is_an_object_or_was_cut(client) -> None:
    """JSON mode gives an object; where max_tokens ends it first, the reason is length."""
    asked = {"model": "tiny", "messages": HELLO, "response_format": {"type": "json_object"}, "max_tokens": 60}
    reasons = set()
    for choice in client.chat.completions.create(**asked, n=8, seed=1, temperature=0.7).choices:
        reasons.add(choice.finish_reason)
        assert choice.message.content.startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)
    assert reasons <= {"stop", "length"}
    text = client.completions.create(
        model="tiny", prompt="x", max_tokens=1, temperature=0, extra_body={"response_format": {"type": "json_object"}}
    )
    assert text.choices[0].finish_reason == "length"


def test_an_adapter_that_says_one_letter_is_held_too(client) -> None:
    """Constraints beat an adapter that would never say anything else."""
    answer = client.chat.completions.create(
        model="acme/tools", messages=HELLO, response_format=FORMAT, max_tokens=100, temperature=0
    )
    jsonschema_rs.validate(SCHEMA, json.loads(answer.choices[0].message.content))


@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", {"weather", "remind"}), ({"type": "function", "function": {"name": "remind"}}, {"remind"})],
)
def test_demanded_calls(client, choice, names) -> None:
    """Required and named give one call, as an object and as deltas, and the reason is tool_calls."""
    asked = {"model": "tiny", "messages": HELLO, "tools": TOOLS, "tool_choice": choice, "max_tokens": 150}
    answer = client.chat.completions.create(**asked, n=2)
    calls = [call for c in answer.choices for call in c.message.tool_calls]
    assert len({call.id for call in calls}) == len(calls) == 2
    for call in calls:
        assert call.function.name in names
        assert json.loads(call.function.arguments)["day"] in ("mon", "tue")
    assert {c.finish_reason for c in answer.choices} == {"tool_calls"}
    assert answer.choices[0].message.content is None
    with client.chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert final.message.tool_calls[0].function.name in names
    assert not final.message.content


def test_auto_and_none_leave_content_alone(client) -> None:
    """An answer that is no call is content; with none, functions are not even shown to the model."""
    asked = {"model": "acme/tools", "messages": HELLO, "tools": TOOLS, "max_tokens": 3, "temperature": 0}
    auto = client.chat.completions.create(**asked)
    none = client.chat.completions.create(**asked, tool_choice="none")
    for answer in (auto, none):
        assert answer.choices[0].message.content == "BBB"
        assert answer.choices[0].message.tool_calls is None
        assert answer.choices[0].finish_reason == "length"
    assert auto.usage.prompt_tokens > none.usage.prompt_tokens


def test_n_has_seeds_of_its_own_and_one_prompt(live, client) -> None:
    """Continuations differ, repeat with the seed, and the prompt is counted once; streams say whose each piece is."""
    asked = {
        "model": "tiny",
        "messages": HELLO,
        "n": 4,
        "seed": 11,
        "max_tokens": 12,
        "extra_body": {"ignore_eos": True},
    }
    first, again = client.chat.completions.create(**asked), client.chat.completions.create(**asked)
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) == 4
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    assert first.usage.completion_tokens == 4 * 12
    assert first.usage.prompt_tokens == len("<|user|>hello\n<|assistant|>")
    streamed: defaultdict[int, str] = defaultdict(str)
    for chunk in client.chat.completions.create(**asked, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert [streamed[i] for i in range(4)] == texts
    wait_idle(live)


def test_leaving_cancels_every_continuation(live, client) -> None:
    """A stream of four that is closed after its first piece leaves nothing running."""
    stream = client.chat.completions.create(
        model="acme/tools", messages=HELLO, n=4, max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    steps = live.engine.stats().steps
    wait_idle(live)
    assert live.engine.stats().steps - steps < 380


def test_chat_logprobs(client) -> None:
    """One entry a token, with bytes, likeliest first; forced letters are certain."""
    asked = {"model": "acme/tools", "messages": HELLO, "max_tokens": 3, "temperature": 0, "logprobs": True}
    answer = client.chat.completions.create(**asked, top_logprobs=2)
    entries = answer.choices[0].logprobs.content
    assert [(e.token, e.bytes) for e in entries] == [("B", [66])] * 3
    assert all(len(e.top_logprobs) == 2 and e.top_logprobs[0].token == "B" for e in entries)
    assert all(e.top_logprobs[1].logprob < e.top_logprobs[0].logprob == e.logprob < 0 for e in entries)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert [e.token for c in chunks for e in c.choices[0].logprobs.content] == ["B"] * 3
    plain = client.chat.completions.create(model="acme/tools", messages=HELLO, max_tokens=1)
    assert plain.choices[0].logprobs is None


def test_text_logprobs(client) -> None:
    """The older shape, with offsets that go on from piece to piece."""
    asked = {"model": "acme/tools", "prompt": "hi", "max_tokens": 3, "temperature": 0, "logprobs": 1}
    got = client.completions.create(**asked).choices[0].logprobs
    assert (got.tokens, got.text_offset) == (["B"] * 3, [0, 1, 2])
    assert [list(top) for top in got.top_logprobs] == [["B"]] * 3
    offsets = [c.choices[0].logprobs.text_offset for c in client.completions.create(**asked, stream=True)]
    assert [o for part in offsets for o in part] == [0, 1, 2]


def test_bias_and_stop_token_ids(live, client) -> None:
    """A banned token is not said, and a stop token of the request ends it."""
    ask = client.chat.completions.create
    bias = {str(live.letter): -100}
    banned = ask(model="acme/tools", messages=HELLO, max_tokens=5, temperature=0, logit_bias=bias)
    assert "B" not in banned.choices[0].message.content
    steered = ask(model="tiny", messages=HELLO, max_tokens=5, temperature=0, logit_bias={str(live.letter): 100})
    assert steered.choices[0].message.content == "BBBBB"
    stopped = ask(model="acme/tools", messages=HELLO, temperature=0, extra_body={"stop_token_ids": [live.letter]})
    assert (stopped.choices[0].message.content, stopped.usage.completion_tokens) == ("", 0)
    assert stopped.choices[0].finish_reason == "stop"


def test_usage_comes_last_in_a_stream_of_many(client) -> None:
    """Pieces carry an empty usage; the last event has the sum over continuations."""
    chunks = list(
        client.completions.create(
            model="acme/tools", prompt="hi", n=2, max_tokens=3, stream=True, stream_options={"include_usage": True}
        )
    )
    assert [c.usage for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].usage.completion_tokens == 6


def test_without_xgrammar_only_structured_output_fails(client, monkeypatch) -> None:
    """The error names the extra to install, and says that trying again is no use; others are served."""
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "xgrammar":
            raise ModuleNotFoundError("no", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": "not compiled before"}}}
    with pytest.raises(openai.InternalServerError, match=r"pip install 'fedllm\[serve\]'") as refused:
        client.chat.completions.create(model="tiny", messages=HELLO, response_format=schema)
    assert refused.value.status_code == 501
    assert refused.value.response.headers["x-should-retry"] == "false"
    assert client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=1).choices


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"response_format": {"type": "xml"}}, "response_format must be"),
        ({"response_format": {"type": "json_schema"}}, "response_format must be"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}}, "'not' cannot be"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "1 to 64"),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": FORMAT}, "exclude each other"),
        ({"functions": [{"name": "old"}]}, "functions is not supported"),
        ({"stream": "yes"}, "true or false"),
        ({"best_of": 3}, "best_of"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "not Unicode"),
    ],
)
def test_refusals_are_bad_requests(live, change, words) -> None:
    """Each is a 400 in OpenAI's shape; half a surrogate pair is sent raw, since the client would not."""
    body = json.dumps({"model": "tiny", "messages": HELLO, **change})
    answer = httpx.post(
        f"{live.url}/v1/chat/completions",
        content=body,
        headers={"authorization": f"Bearer {live.key}", "content-type": "application/json"},
    )
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_unknown_paths_and_methods_have_openais_shape(live) -> None:
    """The client can read every error, also those of the router."""
    wrong = openai.OpenAI(base_url=f"{live.url}/v1", api_key=live.key, max_retries=0)
    with wrong as made, pytest.raises(openai.NotFoundError, match="no such path"):
        made.embeddings.create(model="tiny", input="x")
    answer = httpx.get(f"{live.url}/v1/chat/completions")
    assert (answer.status_code, answer.json()["error"]["message"]) == (405, "this path takes another method")
