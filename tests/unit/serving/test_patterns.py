"""Patterns of strings: no text ends before its own end, in any script."""

from __future__ import annotations

import json

import pytest
from unit.serving.structured_scene import compile_one

from fedllm.serving.patterns import check_pattern, repeats
from fedllm.serving.text import TextCodec


@pytest.fixture(scope="module")
def codec(tiny_folder) -> TextCodec:
    """Return the tiny model's codec."""
    return TextCodec(tiny_folder)


@pytest.mark.parametrize(
    ("pattern", "head"),
    [("é.", "é"), ("[^x]é", ""), ("[é]\\W", "é"), ("é[^a-z]{2}", "é1"), ("a.", "a"), ("😀.b?", "😀"), ("\\Dé?", "")],
)
def test_a_quotation_mark_ends_nothing_early(codec: TextCodec, pattern: str, head: str) -> None:
    """Where any character may stand, neither a bare quotation mark nor a line's end may; a letter may."""
    state = compile_one(codec, {"type": "string", "pattern": pattern}).start()
    for token in codec.encode('"' + head):
        assert state.allowed(codec.vocabulary)[token]
        state.accept(token)
    allowed = state.allowed(codec.vocabulary)
    first = {token: codec.token_bytes(token)[:1] for token in range(codec.vocabulary)}
    assert not any(allowed[token] and first[token] in (b'"', b"\n", b"\x01") for token in first)
    assert any(allowed[token] and first[token] in (b"b", b"#") for token in first)


@pytest.mark.parametrize(
    ("pattern", "text"), [("é{2}", "éé"), ("[à-ü]x", "éx"), ("😀|\u2019", "\u2019"), ("[^é]", "a")]
)
def test_other_scripts_are_taken_at_their_word(codec: TextCodec, pattern: str, text: str) -> None:
    """Counts, ranges, alternatives and negations of characters beyond ASCII hold as they are written."""
    state = compile_one(codec, {"type": "string", "pattern": pattern}).start()
    for token in codec.encode(json.dumps(text, ensure_ascii=False)):
        assert state.allowed(codec.vocabulary)[token]
        done = state.accept(token)
    assert done or any(state.allowed(codec.vocabulary)[token] for token in codec.stop_token_ids)


def test_an_escaped_character_is_no_count() -> None:
    """Its hexadecimal digits cost nothing, though they stand in braces like a count."""
    written = check_pattern({"pattern": "\u2019{3}\U00010000"})
    assert written == "\\u{2019}{3}\\u{10000}"
    assert repeats(written) == repeats("a{3}b") == 3
