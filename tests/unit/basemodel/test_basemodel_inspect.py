"""What opening a base folder promises."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fedllm.basemodel.inspect import RECORD_FILE, open_base, verify
from fedllm.errors import BaseUnsupported, DigestMismatch, NotFound

MakeBase = Callable[..., Path]


def test_shapes_follow_the_config(tmp_path: Path, make_base: MakeBase) -> None:
    """Grouped-query heads make k and v narrower than q; head_dim falls back to hidden / heads."""
    base = open_base(make_base(tmp_path / "b"))
    assert (base.head_dim, base.num_layers, base.context_length, base.tied_embeddings) == (16, 2, 256, True)
    shapes = {m: base.module_shapes(m) for m in ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")}
    assert shapes == {
        "q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64),
        "up_proj": (160, 64), "down_proj": (64, 160),
    }  # fmt: skip
    with pytest.raises(BaseUnsupported, match="'lm_head'"):
        base.module_shapes("lm_head")


def test_wide_heads_make_q_and_o_rectangular(tmp_path: Path, make_base: MakeBase) -> None:
    """An explicit head_dim need not be hidden / heads."""
    base = open_base(make_base(tmp_path / "b", head_dim=32))
    assert base.module_shapes("q_proj") == (128, 64)
    assert base.module_shapes("o_proj") == (64, 128)


def test_digest_is_the_documented_sum(tmp_path: Path, make_base: MakeBase) -> None:
    """The digest can be computed by hand from the module's docstring."""
    folder = make_base(tmp_path / "b")

    def sha(data: bytes) -> str:
        return hashlib.sha256(data).hexdigest()

    config = json.loads((folder / "config.json").read_text())
    del config["transformers_version"]
    lines = (
        f"chat_template {sha(b'{{ messages }}')}\n"
        f"config.json {sha(json.dumps(config, sort_keys=True, separators=(',', ':')).encode())}\n"
        f"model.safetensors {sha(b'weights')}\n"
        f"tokenizer.json {sha(b'{}')}\n"
    )
    assert open_base(folder).digest == sha(lines.encode())


def test_digest_ignores_what_changes_no_token(tmp_path: Path, make_base: MakeBase) -> None:
    """Library version, decoding defaults, a README and where the template is kept do not matter."""
    one = open_base(make_base(tmp_path / "one")).digest
    other = make_base(tmp_path / "other", transformers_version="4.0.0")
    (other / "chat_template.jinja").unlink()
    (other / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    (other / "generation_config.json").write_text("{}")
    (other / "README.md").write_text("hello")
    assert open_base(other).digest == one


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_digest_covers_every_file_that_matters(tmp_path: Path, make_base: MakeBase, name: str) -> None:
    """Weights, tokenizer, template and shape each change the digest."""
    one = open_base(make_base(tmp_path / "one")).digest
    other = make_base(tmp_path / "other")
    text = json.dumps({**json.loads((other / name).read_text()), "rope_theta": 5.0}) if name == "config.json" else "x"
    (other / name).write_text(text)
    assert open_base(other).digest != one


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "not JSON"),
        (lambda f: (f / "config.json").write_text('["llama"]'), "model_type None"),
        (
            lambda f: (f / "config.json").write_text('{"model_type": "gpt2"}'),
            "'gpt2'; allowed: llama, mistral, qwen2, qwen3",
        ),
        (lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), "hidden_size is None"),
        (lambda f: (f / "model.safetensors").unlink(), "no \\*.safetensors"),
        (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json"),
    ],
)
def test_unusable_folder_says_why(tmp_path: Path, make_base: MakeBase, break_it: object, message: str) -> None:
    """Each way in which a folder is not a base is named."""
    folder = make_base(tmp_path / "b")
    break_it(folder)  # type: ignore[operator]
    with pytest.raises(BaseUnsupported, match=message):
        open_base(folder)


def test_quantised_and_odd_heads_are_refused(tmp_path: Path, make_base: MakeBase) -> None:
    """Packed weights cannot be trained on; heads must share key-value heads evenly."""
    with pytest.raises(BaseUnsupported, match="quantised"):
        open_base(make_base(tmp_path / "a", quantization_config={"bits": 4}))
    with pytest.raises(BaseUnsupported, match="4 heads are not a multiple of 3"):
        open_base(make_base(tmp_path / "b", num_key_value_heads=3))


def test_missing_folder_is_not_found(tmp_path: Path) -> None:
    """A wrong path is another mistake than a wrong model."""
    with pytest.raises(NotFound, match="no base model folder"):
        open_base(tmp_path / "nowhere")


def test_verify_wants_a_record(tmp_path: Path, make_base: MakeBase) -> None:
    """Only what fedllm pulled has digests to compare with; a damaged record vouches for nothing."""
    folder = make_base(tmp_path / "b")
    with pytest.raises(NotFound, match=RECORD_FILE):
        verify(folder)
    (folder / RECORD_FILE).write_text("{}")
    with pytest.raises(DigestMismatch, match="not a record"):
        verify(folder)
