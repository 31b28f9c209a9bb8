"""Text in and out: templates, split characters, stop strings."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.errors import RequestInvalid
from fedllm.serving.text import StopFilter, TextCodec


def test_chat_template_and_split_characters(tiny_folder) -> None:
    """A character of several tokens appears when it is whole."""
    codec = TextCodec(tiny_folder)
    tokens = codec.encode_chat([{"role": "user", "content": "né"}])
    decoder = codec.decoder()
    pieces = [decoder.feed([token]) for token in tokens]
    assert "".join(pieces) == "<|user|>né\n<|assistant|>"
    assert "" in pieces
    assert codec.stop_token_ids == {383}


def test_a_template_cannot_reach_python(tiny_folder, tmp_path) -> None:
    """The template comes with the base model: it runs in a sandbox, and its refusal is the caller's error."""
    (tmp_path / "tokenizer.json").write_bytes((tiny_folder / "tokenizer.json").read_bytes())
    for template in ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ raise_exception('no') }}"):
        (tmp_path / "chat_template.jinja").write_text(template)
        with pytest.raises(RequestInvalid, match="refuses these messages"):
            TextCodec(tmp_path).encode_chat([{"role": "user", "content": "x"}])
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(RequestInvalid, match="no chat template"):
        TextCodec(tmp_path).encode_chat([{"role": "user", "content": "x"}])


@given(st.lists(st.text("ab", max_size=4), max_size=8), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_stop_filter_equals_searching_the_whole_text(pieces: list[str], stops: list[str]) -> None:
    """However the text is cut, what comes out is the text up to the first stop string."""
    whole = "".join(pieces)
    found = [whole.find(stop) for stop in stops if stop in whole]
    stop_filter = StopFilter(stops)
    out = "".join(stop_filter.feed(piece) for piece in pieces) + stop_filter.flush()
    if found:
        # The stop that is complete first wins, which need not be the one that begins first.
        assert stop_filter.hit
        assert whole.startswith(out)
        assert not any(stop in out for stop in stops)
    else:
        assert (out, stop_filter.hit) == (whole, False)
