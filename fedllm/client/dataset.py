"""An owner's records: JSON lines in three shapes, read into token ids; text is never printed.

Shapes, one object a line: ``{"messages": [{"role", "content"}, ...]}`` (loss on assistant turns),
``{"prompt", "completion"}`` (loss on the completion), ``{"text"}`` (loss on all of it). A folder holds
``train.jsonl`` and ``heldout.jsonl``. Reports name lines by number and a reason code, never by content.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from fedllm.errors import DataError
from fedllm.ids import Digest, sha256

TRAIN_FILE = "train.jsonl"
HELDOUT_FILE = "heldout.jsonl"
IGNORED = -100
"""Label of tokens without loss."""

MALFORMED_JSON = "malformed-json"
NOT_UTF8 = "not-utf-8"
WRONG_SHAPE = "wrong-shape"
EMPTY_ANSWER = "empty-answer"
REASONS = (MALFORMED_JSON, NOT_UTF8, WRONG_SHAPE, EMPTY_ANSWER)
_ROLES = {"system", "user", "assistant"}
_SHOWN_LINES = 5


class Tokenizer(Protocol):
    """What reading records needs of a tokenizer."""

    def apply_chat(self, messages: Sequence[dict[str, str]]) -> tuple[list[int], list[bool]]:
        """Return token ids of a conversation, and which of them are the assistant's (end of turn included)."""

    def encode(self, text: str) -> list[int]:
        """Return token ids of plain text."""

    @property
    def end(self) -> int:
        """The token that ends an answer."""


@dataclass(frozen=True)
class Example:
    """One record as the model sees it; `labels` is `IGNORED` outside answers. Prints its length only."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    def __repr__(self) -> str:
        return f"Example({len(self.input_ids)} tokens)"

    @property
    def answer_tokens(self) -> int:
        """Number of tokens with loss; the first token of a sequence is never predicted."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass(frozen=True)
class Rejected:
    """A line that is no record: its number (from 1) and a reason of `REASONS`."""

    line: int
    reason: str


@dataclass(frozen=True)
class Report:
    """One file, read."""

    name: str
    examples: tuple[Example, ...]
    rejected: tuple[Rejected, ...]
    too_long: int

    @property
    def accepted(self) -> int:
        """Number of usable records."""
        return len(self.examples)

    @property
    def mean_tokens(self) -> float:
        """Mean length of the usable records, in tokens."""
        return round(sum(len(e.input_ids) for e in self.examples) / max(1, self.accepted), 1)

    @property
    def max_tokens(self) -> int:
        """Length of the longest usable record."""
        return max((len(e.input_ids) for e in self.examples), default=0)

    def to_json(self) -> dict[str, Any]:
        """Return counts and rejected lines, no text."""
        return {
            "file": self.name, "accepted": self.accepted, "too_long": self.too_long,
            "mean_tokens": self.mean_tokens, "max_tokens": self.max_tokens,
            "answer_tokens": sum(e.answer_tokens for e in self.examples),
            "rejected": [asdict(r) for r in self.rejected],
        }  # fmt: skip


@dataclass(frozen=True)
class DatasetReport:
    """Both files of a folder."""

    files: tuple[Report, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the reports of both files, no text."""
        return {"files": [report.to_json() for report in self.files]}


@dataclass(frozen=True)
class Dataset:
    """An owner's usable records and the digest of the files they came from; local to the owner."""

    train: tuple[Example, ...]
    heldout: tuple[Example, ...]
    digest: Digest

    def __repr__(self) -> str:
        return f"Dataset({len(self.train)} train, {len(self.heldout)} held out)"


def read(path: Path, tokenizer: Tokenizer, *, max_tokens: int) -> Report:
    """Read one file of records.

    Parameters
    ----------
    path : Path
    tokenizer : Tokenizer
    max_tokens : int
        Longer records are left out and counted.

    Raises
    ------
    DataError
        If there is no such file.
    """
    if not path.is_file():
        raise DataError(
            f"no {path.name} in {path.parent}",
            hint=f"a data folder holds {TRAIN_FILE} and {HELDOUT_FILE}; keep about a tenth of the records held out",
        )
    examples: list[Example] = []
    rejected: list[Rejected] = []
    too_long = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            made = _example(raw, tokenizer)
            if isinstance(made, str):
                rejected.append(Rejected(number, made))
            elif len(made.input_ids) > max_tokens:
                too_long += 1
            else:
                examples.append(made)
    return Report(path.name, tuple(examples), tuple(rejected), too_long)


def check(folder: Path, base: Path, *, max_tokens: int) -> DatasetReport:
    """Read both files of a data folder with a base model's tokenizer, as training would."""
    tokenizer = ChatTokenizer(base)
    return DatasetReport(tuple(read(folder / name, tokenizer, max_tokens=max_tokens) for name in _FILES))


def open_dataset(folder: Path, tokenizer: Tokenizer, *, max_tokens: int) -> Dataset:
    """Return a folder's records, ready for training.

    Raises
    ------
    DataError
        If a file is missing, a line is no record, or a file has no usable record.
    """
    train, heldout = (read(folder / name, tokenizer, max_tokens=max_tokens) for name in _FILES)
    for report in (train, heldout):
        if report.rejected:
            lines = ", ".join(f"{r.line} ({r.reason})" for r in report.rejected[:_SHOWN_LINES])
            raise DataError(
                f"{report.name} has {len(report.rejected)} lines that are no records: {lines}",
                hint="'fedllm client check' lists them all; mend or remove them",
            )
        if not report.examples:
            raise DataError(
                f"{report.name} has no usable record: {report.too_long} over {max_tokens} tokens",
                hint="add records, or raise max_tokens with the federation's operator",
            )
    both = set(train.examples) & set(heldout.examples)
    if both:
        # Held-out scores leave without noise: a record in both files would be trained under epsilon and leak past it.
        raise DataError(
            f"{len(both)} records are in both {_FILES[0]} and {_FILES[1]}, none may be",
            hint="held-out records must not be trained on; remove them from one of the files",
        )
    return Dataset(train.examples, heldout.examples, digest(folder))


def digest(folder: Path) -> Digest:
    """Return the SHA-256 over both files' SHA-256; for the owner's own ledger only, it would identify the data."""
    return sha256("".join(f"{name} {sha256((folder / name).read_bytes())}\n" for name in _FILES).encode())


_FILES = (TRAIN_FILE, HELDOUT_FILE)


def _example(raw: bytes, tokenizer: Tokenizer) -> Example | str:
    try:
        record = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        return NOT_UTF8
    except (ValueError, RecursionError):
        return MALFORMED_JSON
    if not isinstance(record, dict):
        return WRONG_SHAPE
    if "messages" in record:
        return _chat(record["messages"], tokenizer)
    if {"prompt", "completion"} <= set(record):
        prompt, answer = record["prompt"], record["completion"]
    else:
        prompt, answer = "", record.get("text")
    if not (isinstance(prompt, str) and isinstance(answer, str)):
        return WRONG_SHAPE
    if not answer.strip():
        return EMPTY_ANSWER
    before = tokenizer.encode(prompt) if prompt else []
    after = [*tokenizer.encode(answer), tokenizer.end]
    return Example(tuple(before + after), (*[IGNORED] * len(before), *after))


def _chat(messages: object, tokenizer: Tokenizer) -> Example | str:
    if not isinstance(messages, list) or not all(_is_turn(turn) for turn in messages):
        return WRONG_SHAPE
    answers = [turn["content"] for turn in messages if turn["role"] == "assistant"]
    if not answers or messages[0]["role"] == "assistant":
        return WRONG_SHAPE
    if not all(answer.strip() for answer in answers):
        return EMPTY_ANSWER
    ids, answered = tokenizer.apply_chat([{"role": t["role"], "content": t["content"]} for t in messages])
    return Example(tuple(ids), tuple(i if a else IGNORED for i, a in zip(ids, answered, strict=True)))


def _is_turn(turn: object) -> bool:
    return isinstance(turn, dict) and turn.get("role") in _ROLES and isinstance(turn.get("content"), str)


class ChatTokenizer:
    """A base model's own tokenizer and chat template (``tokenizers`` and ``jinja2``; no torch).

    Each turn is tokenised apart from what comes before it, exactly as serving does: there the prompt ends where
    the assistant's answer begins.

    Parameters
    ----------
    folder : Path
        Base model folder in Hugging Face layout.
    """

    def __init__(self, folder: Path) -> None:
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        from tokenizers import Tokenizer as FastTokenizer

        if not (folder / "tokenizer.json").is_file():
            raise DataError(f"base model folder {folder} has no tokenizer.json", hint="fedllm model pull")
        self._tokenizer = FastTokenizer.from_file(str(folder / "tokenizer.json"))
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        file = folder / "chat_template.jinja"
        source = file.read_text(encoding="utf-8") if file.is_file() else settings.get("chat_template")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        self._template = environment.from_string(source) if isinstance(source, str) else None
        self._special = {k: _text(settings.get(k)) for k in ("bos_token", "eos_token", "pad_token", "unk_token")}
        end = self._tokenizer.token_to_id(self._special["eos_token"] or "")
        if end is None:
            raise DataError(f"base model folder {folder} names no end token in tokenizer_config.json")
        self._end = int(end)

    @property
    def end(self) -> int:
        """The end-of-turn token."""
        return self._end

    def encode(self, text: str) -> list[int]:
        """Return token ids of plain text, no special tokens added."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def apply_chat(self, messages: Sequence[dict[str, str]]) -> tuple[list[int], list[bool]]:
        """Return token ids and the mask of assistant tokens, up to each turn's end token.

        Raises
        ------
        DataError
            If the base model has no chat template, or one that rewrites earlier turns.
        """
        ids: list[int] = []
        mask: list[bool] = []
        done = ""
        for index, turn in enumerate(messages):
            if turn["role"] != "assistant":
                continue
            prompt = self._render(messages[:index], True)
            whole = self._render(messages[: index + 1], False)
            if not (prompt.startswith(done) and whole.startswith(prompt)):
                raise DataError("the base model's chat template rewrites earlier turns; its answers cannot be located")
            before, answer = self.encode(prompt[len(done) :]), self.encode(whole[len(prompt) :])
            # Nothing after the end token is ever generated, so nothing after it is learnt.
            last = answer.index(self._end) + 1 if self._end in answer else len(answer)
            ids += before + answer
            mask += [False] * len(before) + [True] * last + [False] * (len(answer) - last)
            done = whole
        return ids, mask

    def _render(self, messages: Sequence[dict[str, str]], prompt: bool) -> str:
        if self._template is None:
            raise DataError(
                "the base model has no chat template and the data has 'messages' records",
                hint="use prompt/completion records, or a base model with a chat template",
            )
        return str(self._template.render(messages=messages, add_generation_prompt=prompt, **self._special))


def _text(value: object) -> str | None:
    # tokenizer_config.json writes a special token as text or as an object with the text in "content"
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
