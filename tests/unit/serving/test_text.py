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
        assert any((out + stop + stop_filter.after) in whole for stop in stops)
    else:
        assert (out, stop_filter.hit) == (whole, False)


@given(text=st.text(st.characters(codec="utf-8"), max_size=20))
def test_token_bytes_spell_the_text(tiny_folder, text: str) -> None:
    """Whatever the text, the bytes of its tokens in a row are the text's, also amid a character."""
    codec = TextCodec(tiny_folder)
    assert b"".join(codec.token_bytes(token) for token in codec.encode(text)) == text.encode()


def test_special_and_unknown_tokens(tiny_folder) -> None:
    """A special token has a name but adds nothing to the text; an id that is none spells nothing."""
    codec = TextCodec(tiny_folder)
    assert (codec.vocabulary, codec.token_bytes(383), codec.token_bytes(384)) == (384, b"<eos>", b"")
    assert codec.spelled()[383] == b""
    assert len(codec.spelled()) == 384


def test_byte_fallback_vocabularies_spell_bytes(tmp_path) -> None:
    """Llama 2's kind: a bar is a space, and ``<0xE2>`` one byte."""
    from tokenizers import Tokenizer, decoders, models

    vocab = {"<unk>": 0, "\u2581hi": 1, "<0xE2>": 2, "<0x82>": 3, "<0xAC>": 4, "<0xe2>": 5}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    codec = TextCodec(tmp_path)
    assert b"".join(codec.token_bytes(token) for token in (1, 2, 3, 4)) == " hi\u20ac".encode()
    assert codec.token_bytes(5) == b"<0xe2>"


def test_long_texts_get_the_same_tokens(tiny_folder) -> None:
    """The way that lets other threads run gives what the short way gives, special tokens included."""
    codec, piece = TextCodec(tiny_folder), "h\u00e9llo <eos> "
    assert codec.encode(piece * 1000) == codec.encode(piece) * 1000
    assert codec.encode_chat([{"role": "user", "content": piece * 1000}])[-3:] == codec.encode("t|>")
