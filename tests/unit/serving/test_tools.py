"""Functions in, calls out: what a request may demand, and what counts as a call in a model's answer."""

from __future__ import annotations

import asyncio
import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.errors import RequestInvalid
from fedllm.serving.openai import read_chat
from fedllm.serving.structured import Grammars
from fedllm.serving.text import TextCodec
from fedllm.serving.tools import Call, CallReader, parse_calls, read_tools

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city"],
        },
    },
}
STOP = {"type": "function", "function": {"name": "stop.all"}}
NAMES = frozenset(("weather", "stop.all"))
ONE = (Call("weather", '{"city": "Oslo"}'),)


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('{"name": "weather", "arguments": {"city": "Oslo"}}', ONE),
        (' {"name": "weather", "parameters": {"city": "Oslo"}}\n', ONE),
        ('[{"name": "weather", "arguments": {"city": "Oslo"}}]', ONE),
        ('<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>', ONE),
        ('<tool_call>{"name": "stop.all", "arguments": {}}</tool_call>\n' * 2, (Call("stop.all", "{}"),) * 2),
        ('weather(city="Oslo")', ONE),
        ('weather( city = "Oslo" , days = 3 )', (Call("weather", '{"city": "Oslo", "days": 3}'),)),
        ('weather(city=["Oslo", {"a": [")"]}])', (Call("weather", '{"city": ["Oslo", {"a": [")"]}]}'),)),
        ("stop.all()", (Call("stop.all", "{}"),)),
        ('{"name": "weather", "arguments": {"city": "\\ud800"}}', (Call("weather", '{"city": "\\ud800"}'),)),
        ('{"name": "weather", "arguments": {"city": "Zürich"}}', (Call("weather", '{"city": "Zürich"}'),)),
        ('{"name": "unknown", "arguments": {}}', ()),
        ('{"name": "weather", "arguments": [1]}', ()),
        ('{"name": "weather", "arguments": {"days": 1e999}}', ()),
        ('{"name": "weather", "arguments": {}, "mood": 1}', ()),
        ('{"name": "weather"}', ()),
        ('{"name": "weather", "arguments": {"city"', ()),
        ("[]", ()),
        ("[1]", ()),
        ("{}", ()),
        ('weather(city="Oslo"', ()),
        ('weather(city="Oslo") and more', ()),
        ("weather(Oslo)", ()),
        ("weather", ()),
        ('<tool_call>{"name": "weather", "arguments": {}}', ()),
        ("It is sunny.", ()),
        ("", ()),
        ("[" * 5000, ()),
    ],
)
def test_calls_are_told_from_content(text, calls) -> None:
    """Three forms are calls, as the whole answer; everything else is what the model said."""
    assert parse_calls(text, NAMES) == calls


TEXTS = st.one_of(
    st.text("ab<tol_cawehr({}[\"'=:,) \n", max_size=40),
    st.sampled_from(
        [
            'weather(city="Oslo")',
            '{"name": "weather", "arguments": {"city": "Oslo"}}',
            'Let me see. <tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>',
            "weather is nice",
            "<tool_call> is a tag",
        ]
    ),
)


@given(TEXTS, st.lists(st.integers(0, 80), max_size=6))
def test_however_the_text_is_cut_the_answer_is_the_same(text, cuts) -> None:
    """Nothing is lost or said twice; content comes at once unless it can still become a call."""
    tools = read_tools({"tools": [WEATHER, STOP]})
    borders = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    reader = CallReader(tools)
    out = "".join(reader.feed(text[a:b]) for a, b in itertools.pairwise(borders))
    rest, calls = reader.finish()
    whole = CallReader(tools)
    assert (out + rest, calls) == (whole.feed(text) + (last := whole.finish())[0], last[1])
    if calls:
        assert (out + rest, calls) in (("", ONE), ("Let me see. ", ONE))
    else:
        assert out + rest == text


def test_content_is_not_held_back_longer_than_needed() -> None:
    """The first words that cannot begin a call are delivered at once, and so is all that follows."""
    reader = CallReader(read_tools({"tools": [WEATHER]}))
    assert [reader.feed(piece) for piece in ("we", "ather", " today", " is")] == ["", "", "weather today", " is"]
    assert CallReader(read_tools({})).feed("{") == "{"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tools": "x"}, "at most 64"),
        ({"tools": [WEATHER] * 65}, "at most 64"),
        ({"tools": [WEATHER, WEATHER]}, "different names"),
        ({"tools": [{"type": "retrieval"}]}, "each of tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "1 to 64"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": 1}}]}, "must be a schema"),
        ({"tools": [{"type": "function", "function": {"name": "a", "description": 1}}]}, "must be text"),
        ({"tools": [WEATHER], "tool_choice": "always"}, "tool_choice must be"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice must be"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": []}}}, "tool_choice must be"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": [WEATHER], "parallel_tool_calls": 1}, "true or false"),
        (
            {
                "tool_choice": "required",
                "tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}],
            },
            "type object",
        ),
    ],
)
def test_wrong_tools_are_refused(fields, words) -> None:
    """The message names the field and what it may be."""
    with pytest.raises(RequestInvalid, match=words):
        read_tools(fields)


def test_choices_demand_what_they_say() -> None:
    """None shows the model no functions; auto holds it to nothing; required and a name hold it to calls."""
    tools = {"tools": [WEATHER, STOP]}
    assert read_tools({**tools, "tool_choice": "none"}).offered == ()
    assert read_tools(tools).shapes == ()
    assert len(read_tools(tools).offered) == 2
    assert [shape.call for shape in read_tools({**tools, "tool_choice": "required"}).shapes] == ["weather", "stop.all"]
    named = {"type": "function", "function": {"name": "stop.all"}}
    assert [shape.call for shape in read_tools({**tools, "tool_choice": named}).shapes] == ["stop.all"]
    single = CallReader(read_tools({**tools, "parallel_tool_calls": False}))
    single.feed('[{"name": "stop.all", "arguments": {}}, {"name": "stop.all", "arguments": {}}]')
    assert len(single.finish()[1]) == 1


def test_a_demanded_call_is_always_one(tiny_folder) -> None:
    """Random walks through the grammar of two functions give calls of both, with valid arguments."""
    codec = TextCodec(tiny_folder)
    tools = read_tools({"tools": [WEATHER, STOP], "tool_choice": "required"})
    grammar = asyncio.run(Grammars(codec).compile(tools.shapes))
    generator, seen = np.random.default_rng(0), set()
    for _ in range(30):
        state, text = grammar.start(), b""
        while True:
            token = int(generator.choice(np.flatnonzero(state.allowed(codec.vocabulary))))
            text += codec.token_bytes(token)
            if state.accept(token):
                break
        (call,) = parse_calls(text.decode(), tools.names)
        arguments = json.loads(call.arguments)
        seen.add(call.name)
        if call.name == "weather":
            assert arguments["city"] in ("Oslo", "Rome")
            assert arguments.keys() <= {"city", "days"}
        else:
            assert arguments == {}
    assert seen == NAMES


def demanded(count: int, properties: dict[str, object]) -> dict[str, object]:
    """Return a request that demands a call of one of several functions."""
    parameters = {"type": "object", "properties": properties}
    tools = [{"type": "function", "function": {"name": f"f{i}", "parameters": parameters}} for i in range(count)]
    return {"model": "m", "messages": [{"role": "user", "content": "x"}], "tools": tools, "tool_choice": "required"}


@pytest.mark.parametrize(
    ("width", "most", "schema", "words"),
    [
        (4, 25, {"type": "string", "pattern": "a"}, "2000 subschemas and 100 patterns together"),
        (40, 48, {"type": "boolean"}, "2000 subschemas and 100 patterns together"),
        (4, 5, {"type": "string", "maxLength": 100}, "more than 2000, which is the budget"),
    ],
)
def test_the_schemas_of_a_request_are_bounded_together(width, most, schema, words) -> None:
    """Limits hold for all functions of a request, not for each; what need not be compiled is not counted."""
    properties = {f"p{i}": schema for i in range(width)}
    fits, over = demanded(most, properties), demanded(most + 1, properties)
    assert len(read_chat(fits, stop_token_ids=frozenset()).shapes) == most
    with pytest.raises(RequestInvalid, match=words):
        read_chat(over, stop_token_ids=frozenset())
    assert read_chat({**over, "tool_choice": "auto"}, stop_token_ids=frozenset()).shapes == ()


def test_many_patterns_cost_the_event_loop_nothing(monkeypatch) -> None:
    """A body of thousands of patterns is refused before the first of them is looked at."""
    monkeypatch.setattr("fedllm.serving.schema.check_pattern", lambda _: pytest.fail("a pattern was looked at"))
    body = demanded(64, {f"p{i}": {"type": "string", "pattern": f"a{i}" * 30} for i in range(62)})
    with pytest.raises(RequestInvalid, match="100 patterns together"):
        read_chat(body, stop_token_ids=frozenset())


def test_conversations_with_calls_reach_both_kinds_of_template(tiny_folder, tmp_path) -> None:
    """A template that knows tools gets them as objects; for another they become text in front."""
    body = {
        "model": "m",
        "tools": [WEATHER],
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Oslo?"}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        ],
    }
    asked = read_chat(body, stop_token_ids=frozenset())
    (tmp_path / "tokenizer.json").write_bytes((tiny_folder / "tokenizer.json").read_bytes())
    template = tmp_path / "chat_template.jinja"

    def rendered(source: str) -> str:
        template.write_text(source)
        codec = TextCodec(tmp_path)
        return codec.decoder().feed(codec.encode_chat(asked.messages, asked.tools.offered))

    knowing = rendered(
        "{{ tools | tojson }}{% for m in messages %}|{{ m.role }}:{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.arguments.city }}{% endfor %}{% endfor %}"
    )
    assert json.loads(knowing[: knowing.index("|")]) == [WEATHER]
    assert knowing.endswith("|system:Be brief.|user:Oslo?|assistant:Oslo|tool:rain")
    plain = rendered("{% for m in messages %}|{{ m.role }}:{{ m.content }}{% endfor %}")
    assert plain.startswith("|system:Be brief.\n\nYou can call these functions.")
    assert '"description": "Weather of a city."' in plain
    assert plain.endswith('|user:Oslo?|assistant:{"name": "weather", "arguments": {"city": "Oslo"}}|tool:rain')


@pytest.mark.parametrize(
    "message",
    [
        "hi",
        {"role": "user"},
        {"role": 1, "content": "x"},
        {"role": "user", "content": []},
        {"role": "user", "content": [{"type": "image_url"}]},
        {"role": "assistant", "content": None, "tool_calls": [{}]},
        {"role": "assistant", "tool_calls": "x"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "[1]"}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "{"}}]},
        {"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": '{"b": "\\ud800"}'}}]},
    ],
)
def test_wrong_messages_are_refused(message) -> None:
    """Every part that a template would get is checked first."""
    with pytest.raises(RequestInvalid, match=r"messages|message|tool_calls"):
        read_chat({"model": "m", "messages": [message]}, stop_token_ids=frozenset())
