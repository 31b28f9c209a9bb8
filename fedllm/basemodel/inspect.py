r"""What a base model folder is: shape, digest, and whether its bytes are still what they were.

No torch here: the coordinator, the command line and the owner's policy check all open a base this way.

The base's digest is the SHA-256 of these lines, sorted by name, ``"{name} {sha256}\n"`` each:

- ``chat_template``: the template's text, from ``chat_template.jinja`` or else from ``tokenizer_config.json``,
  because moving the text between the two changes no prompt;
- ``config.json``: canonical JSON without what names the library that wrote it;
- ``tokenizer.json`` and each ``*.safetensors``: the file's bytes.

That is all that decides which tokens a prompt becomes and which logits follow. Decoding defaults
(``generation_config.json``), README files and fedllm's own record are left out: two parties that differ only
there can train together.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm.errors import BaseUnsupported, DigestMismatch, NotFound
from fedllm.ids import Digest, sha256

RECORD_FILE = "fedllm-base.json"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Values of ``model_type`` that owners train and the endpoint serves."""
_VOLATILE = frozenset({"transformers_version", "_name_or_path"})
_CHUNK = 1 << 20


@dataclass(frozen=True)
class BaseModel:
    """Shape and identity of a Llama-family base model.

    Attributes
    ----------
    path : Path
    digest : Digest
        See the module's docstring for what it covers.
    model_type : str
        One of `FAMILIES`.
    hidden_size, num_layers, num_heads, num_kv_heads, head_dim, intermediate_size, vocab_size : int
    context_length : int
        Positions the model was trained for.
    tied_embeddings : bool
        Whether the output projection is the embedding.
    """

    path: Path
    digest: Digest
    model_type: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    context_length: int
    tied_embeddings: bool

    def module_shapes(self, target_module: str) -> tuple[int, int]:
        """Return a projection's weight shape ``(out, in)``, as `AdapterSpec.modules` wants it.

        Raises
        ------
        BaseUnsupported
            The name is not a linear projection of a Llama layer.
        """
        heads, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        hidden, inner = self.hidden_size, self.intermediate_size
        shapes = {
            "q_proj": (heads, hidden),
            "k_proj": (kv, hidden),
            "v_proj": (kv, hidden),
            "o_proj": (hidden, heads),
            "gate_proj": (inner, hidden),
            "up_proj": (inner, hidden),
            "down_proj": (hidden, inner),
        }
        if target_module not in shapes:
            raise BaseUnsupported(f"no projection {target_module!r} in a layer; allowed: {', '.join(shapes)}")
        return shapes[target_module]


def open_base(path: Path) -> BaseModel:
    """Validate a folder, hash it and return its shape.

    The hash is computed on every call: a cached one would vouch for bytes that nobody looked at.

    Parameters
    ----------
    path : Path
        Hugging Face folder with ``config.json``, ``tokenizer.json`` and at least one ``*.safetensors``.

    Raises
    ------
    NotFound
        No such folder.
    BaseUnsupported
        A file is missing or the architecture is not one of `FAMILIES`.
    """
    config = read_config(path)
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise BaseUnsupported(f"{path} holds no *.safetensors", hint="only safetensors weights are read")
    if not (path / "tokenizer.json").is_file():
        raise BaseUnsupported(f"{path} holds no tokenizer.json")
    shape = {name: _positive(config, key, path) for name, key in _SHAPE.items()}
    heads = shape["num_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    # Qwen3's own code takes 128 where the config is silent
    head_dim = config.get("head_dim") or (128 if config["model_type"] == "qwen3" else shape["hidden_size"] // heads)
    if heads % kv_heads:
        raise BaseUnsupported(f"{path}/config.json: {heads} heads are not a multiple of {kv_heads} key-value heads")
    return BaseModel(
        path=path,
        digest=_digest(path, config, weights),
        model_type=config["model_type"],
        num_kv_heads=int(kv_heads),
        head_dim=int(head_dim),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        **shape,
    )


_SHAPE = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
}


def read_config(path: Path) -> dict[str, Any]:
    """Return ``config.json`` of a base model folder; raise `NotFound` or `BaseUnsupported`."""
    if not path.is_dir():
        raise NotFound(f"no base model folder at {path}", hint="fedllm model pull smollm2-135m")
    file = path / "config.json"
    if not file.is_file():
        raise BaseUnsupported(f"{path} holds no config.json", hint="a base is a Hugging Face model folder")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise BaseUnsupported(f"{file} is not JSON") from None
    found = config.get("model_type") if isinstance(config, dict) else None
    if found not in FAMILIES:
        raise BaseUnsupported(f"{file}: model_type {found!r}; allowed: {', '.join(FAMILIES)}")
    if config.get("quantization_config"):
        raise BaseUnsupported(f"{file}: quantised weights; allowed: dense bf16, fp16 or fp32")
    return dict(config)


def file_digests(path: Path) -> dict[str, Digest]:
    """Return the SHA-256 of every file directly in `path` but fedllm's own record, by name."""
    files = sorted(file for file in path.iterdir() if file.is_file() and file.name != RECORD_FILE)
    return {file.name: hash_file(file) for file in files}


def hash_file(file: Path) -> Digest:
    """Return the SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(_CHUNK):
            digest.update(piece)
    return Digest(digest.hexdigest())


def verify(path: Path) -> BaseModel:
    """Check every file of a pulled folder against the record written when it was pulled.

    Returns
    -------
    BaseModel
        The opened base, its digest equal to the recorded one.

    Raises
    ------
    NotFound
        The folder has no record: it was not pulled by fedllm.
    DigestMismatch
        A file was changed, removed or added; names the file, the digest found and the one allowed.
    """
    record = path / RECORD_FILE
    if not record.is_file():
        raise NotFound(f"{path} has no {RECORD_FILE}", hint="only pulled folders can be verified")
    try:
        pinned = json.loads(record.read_text(encoding="utf-8"))
        allowed, base_digest = dict(pinned["files"]), pinned["digest"]
    except (ValueError, KeyError, TypeError):
        raise DigestMismatch(f"{record} is not a record that fedllm wrote", hint=_AGAIN.format(path)) from None
    found = file_digests(path)
    # A file nobody recorded matters only if a loader would pick it up.
    extra = {name for name in found if name not in allowed and name.endswith((".safetensors", ".json", ".jinja"))}
    for name in sorted(set(allowed) | extra):
        was, now = allowed.get(name, "absent"), found.get(name, "absent")
        if was != now:
            raise DigestMismatch(f"{path / name}: sha256 {now}; allowed: {was}", hint=_AGAIN.format(path))
    base = open_base(path)
    if base.digest != base_digest:
        raise DigestMismatch(f"{path}: base digest {base.digest}; allowed: {base_digest}", hint=_AGAIN.format(path))
    return base


_AGAIN = "remove {} and pull it again"


def _digest(path: Path, config: dict[str, Any], weights: list[Path]) -> Digest:
    kept = {key: value for key, value in config.items() if key not in _VOLATILE}
    lines = {file.name: hash_file(file) for file in [*weights, path / "tokenizer.json"]}
    lines["config.json"] = sha256(json.dumps(kept, sort_keys=True, separators=(",", ":")).encode())
    lines["chat_template"] = sha256(_chat_template(path).encode())
    return sha256("".join(f"{name} {lines[name]}\n" for name in sorted(lines)).encode())


def _chat_template(path: Path) -> str:
    file, settings = path / "chat_template.jinja", path / "tokenizer_config.json"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    if settings.is_file():
        # Some releases hold several named templates as a list; any stable text of them will do here.
        try:
            found = json.loads(settings.read_text(encoding="utf-8")).get("chat_template", "")
        except (ValueError, AttributeError):
            raise BaseUnsupported(f"{settings} is not a JSON object") from None
        return found if isinstance(found, str) else json.dumps(found, sort_keys=True)
    return ""


def _positive(config: dict[str, Any], key: str, path: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or value < 1:
        raise BaseUnsupported(f"{path}/config.json: {key} is {value!r}; allowed: a positive integer")
    return value
