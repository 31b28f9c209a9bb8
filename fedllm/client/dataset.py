"""An owner's records: JSON lines in three shapes, read into token ids; text is never printed.

Shapes, one object a line: ``{"messages": [{"role", "content"}, ...]}`` (loss on assistant turns),
``{"prompt", "completion"}`` (loss on the completion), ``{"text"}`` (loss on all of it). A folder holds
``train.jsonl`` and ``heldout.jsonl``. Reports name lines by number and a reason code, never by content.

A record is a privacy unit of its own, or, where the owner names a column, one of all the records of a person.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fedllm.client.tokenizer import ChatTokenizer, Tokenizer
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
UNIT_MISSING = "unit-missing"
"""The unit column is not there, or is no integer and no text."""
REASONS = (MALFORMED_JSON, NOT_UTF8, WRONG_SHAPE, EMPTY_ANSWER, UNIT_MISSING)
_ROLES = {"system", "user", "assistant"}
_SHOWN_LINES = 5


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
class Unit:
    """What one noisy step samples, clips and hides as a whole: a record, or all records of one person.

    Attributes
    ----------
    examples : tuple[Example, ...]
        At least one. The unit's gradient is the mean of theirs.
    person : bytes or None
        SHA-256 of the person's name; None for a record that is a unit of its own.
    """

    examples: tuple[Example, ...]
    person: bytes | None = field(default=None, repr=False)

    @property
    def key(self) -> bytes:
        """Stable digest of what the unit is, 32 bytes: the person's name, or else the record's tokens."""
        if self.person is not None:
            return self.person
        (example,) = self.examples
        tokens = np.array([example.input_ids, example.labels], dtype="<i8")
        return hashlib.sha256(b"fedllm/unit/record/" + tokens.tobytes()).digest()

    def within(self, max_tokens: int) -> Unit | None:
        """Return the unit with its records of at most `max_tokens`; None if it has none."""
        kept = tuple(e for e in self.examples if len(e.input_ids) <= max_tokens)
        return Unit(kept, self.person) if kept else None


@dataclass(frozen=True)
class Rejected:
    """A line that is no record: its number (from 1) and a reason of `REASONS`."""

    line: int
    reason: str


@dataclass(frozen=True)
class Report:
    """One file, read; units in the order of their first records."""

    name: str
    units: tuple[Unit, ...]
    rejected: tuple[Rejected, ...]
    too_long: int

    @cached_property
    def examples(self) -> tuple[Example, ...]:
        """The usable records, unit by unit."""
        return tuple(example for unit in self.units for example in unit.examples)

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
            "file": self.name, "accepted": self.accepted, "units": len(self.units), "too_long": self.too_long,
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
    """An owner's usable records and the digest of the files they came from; local to the owner.

    Attributes
    ----------
    units : tuple[Unit, ...]
        To train on.
    heldout : tuple[Example, ...]
        To score on; of no person who is trained on.
    digest : Digest
    """

    units: tuple[Unit, ...]
    heldout: tuple[Example, ...]
    digest: Digest

    def __repr__(self) -> str:
        return f"Dataset({len(self.units)} units of {len(self.train)} train, {len(self.heldout)} held out)"

    @cached_property
    def train(self) -> tuple[Example, ...]:
        """The records to train on, unit by unit."""
        return tuple(example for unit in self.units for example in unit.examples)


def read(path: Path, tokenizer: Tokenizer, *, max_tokens: int, unit_column: str = "") -> Report:
    """Read one file of records.

    Parameters
    ----------
    path : Path
    tokenizer : Tokenizer
    max_tokens : int
        Longer records are left out and counted.
    unit_column : str
        Key of every record that names its person, by a string or an integer (7 and ``"7"`` are one person). Empty:
        each record is a unit.

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
    grouped: dict[bytes | int, list[Example]] = {}
    rejected: list[Rejected] = []
    too_long = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            record = _record(raw)
            made = record if isinstance(record, str) else _example(record, tokenizer)
            if isinstance(record, str) or isinstance(made, str):
                rejected.append(Rejected(number, str(made)))
                continue
            person = _person(record.get(unit_column)) if unit_column else number
            if person is None:
                rejected.append(Rejected(number, UNIT_MISSING))
            elif len(made.input_ids) > max_tokens:
                too_long += 1
            else:
                grouped.setdefault(person, []).append(made)
    units = (Unit(tuple(found), who if isinstance(who, bytes) else None) for who, found in grouped.items())
    return Report(path.name, tuple(units), tuple(rejected), too_long)


def check(folder: Path, base: Path, *, max_tokens: int, unit_column: str = "") -> DatasetReport:
    """Read both files of a data folder with a base model's tokenizer, as training would."""
    tokenizer = ChatTokenizer(base)
    return DatasetReport(
        tuple(read(folder / name, tokenizer, max_tokens=max_tokens, unit_column=unit_column) for name in _FILES)
    )


def open_dataset(folder: Path, tokenizer: Tokenizer, *, max_tokens: int, unit_column: str = "") -> Dataset:
    """Return a folder's records, ready for training.

    Raises
    ------
    DataError
        If a file is missing, a line is no record, a file has no usable record, or a record or a person is in both.
    """
    train, heldout = (read(folder / name, tokenizer, max_tokens=max_tokens, unit_column=unit_column) for name in _FILES)
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
    persons = {unit.person for unit in train.units if unit.person} & {unit.person for unit in heldout.units}
    if persons:
        raise DataError(
            f"{len(persons)} persons have records in both {_FILES[0]} and {_FILES[1]}, none may",
            hint=f"they would be trained on under epsilon and scored outside it: split the files by {unit_column}",
        )
    return Dataset(train.units, heldout.examples, digest(folder))


def digest(folder: Path) -> Digest:
    """Return the SHA-256 over both files' SHA-256; for the owner's own ledger only, it would identify the data."""
    return sha256("".join(f"{name} {sha256((folder / name).read_bytes())}\n" for name in _FILES).encode())


_FILES = (TRAIN_FILE, HELDOUT_FILE)


def _record(raw: bytes) -> dict[str, Any] | str:
    try:
        record = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        return NOT_UTF8
    except (ValueError, RecursionError):
        return MALFORMED_JSON
    return record if isinstance(record, dict) else WRONG_SHAPE


def _person(name: object) -> bytes | None:
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        return None
    text = str(name).strip()
    # An empty name is none: all who have none would be one person. JSON may hold half a surrogate pair.
    return hashlib.sha256(b"fedllm/unit/person/" + text.encode(errors="surrogatepass")).digest() if text else None


def _example(record: dict[str, Any], tokenizer: Tokenizer) -> Example | str:
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
