"""Reading an owner's records: three shapes, answers only, reasons without text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from fedllm.client.dataset import (
    EMPTY_ANSWER,
    IGNORED,
    MALFORMED_JSON,
    NOT_UTF8,
    WRONG_SHAPE,
    ChatTokenizer,
    check,
    digest,
    open_dataset,
    read,
)
from fedllm.errors import DataError


class Letters:
    """A tokenizer whose tokens are characters; 0 ends an answer."""

    end = 0

    def encode(self, text: str) -> list[int]:
        """Return one token a character."""
        return [ord(c) for c in text]

    def apply_chat(self, messages: Sequence[dict[str, str]]) -> tuple[list[int], list[bool]]:
        """Return contents one after the other, the assistant's marked and ended."""
        ids: list[int] = []
        mask: list[bool] = []
        for turn in messages:
            mine = turn["role"] == "assistant"
            part = self.encode(turn["content"]) + [self.end] * mine
            ids += part
            mask += [mine] * len(part)
        return ids, mask


def write(path: Path, *lines: object) -> Path:
    """Write lines, JSON unless they are bytes."""
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


def chat(*turns: tuple[str, str]) -> dict[str, list[dict[str, str]]]:
    """Return a chat record."""
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_three_shapes_and_where_their_loss_is(tmp_path: Path) -> None:
    """Chat: assistant turns; prompt and completion: the completion; text: all of it."""
    path = write(
        tmp_path / "train.jsonl",
        chat(("user", "ab"), ("assistant", "C"), ("user", "d"), ("assistant", "E")),
        {"prompt": "ab", "completion": "C"},
        {"text": "ab"},
    )
    examples = read(path, Letters(), max_tokens=10).examples
    learnt = [[i for i, label in enumerate(e.labels) if label != IGNORED] for e in examples]
    assert learnt == [[2, 3, 5, 6], [2, 3], [0, 1, 2]]
    assert all(label in (IGNORED, token) for e in examples for token, label in zip(e.input_ids, e.labels, strict=True))
    assert examples[2].answer_tokens == 2, "the first token of a sequence is never predicted"


def test_bad_lines_are_named_by_number_and_reason_only(tmp_path: Path) -> None:
    """Every kind of bad line; blank lines count for numbering and nothing else; no text anywhere."""
    path = write(
        tmp_path / "train.jsonl", {"text": "fine"}, b"{not json SECRET", b"", b'{"text": "SECRET \xff"}', [1],
        {"prompt": "SECRET"}, {"text": 5}, chat(("user", "SECRET")), chat(("assistant", "SECRET")),
        {"messages": [{"role": "wizard", "content": "SECRET"}]}, {"messages": []}, {"text": "  "},
        chat(("user", "SECRET"), ("assistant", "")), {"prompt": "SECRET", "completion": " "},
    )  # fmt: skip
    report = read(path, Letters(), max_tokens=100)
    assert [(r.line, r.reason) for r in report.rejected] == [
        (2, MALFORMED_JSON), (4, NOT_UTF8), (5, WRONG_SHAPE), (6, WRONG_SHAPE), (7, WRONG_SHAPE), (8, WRONG_SHAPE),
        (9, WRONG_SHAPE), (10, WRONG_SHAPE), (11, WRONG_SHAPE), (12, EMPTY_ANSWER), (13, EMPTY_ANSWER),
        (14, EMPTY_ANSWER),
    ]  # fmt: skip
    assert report.accepted == 1
    write(tmp_path / "heldout.jsonl", {"text": "fine"})
    with pytest.raises(DataError, match="2 \\(malformed-json\\)") as caught:
        open_dataset(tmp_path, Letters(), max_tokens=100)
    for shown in (json.dumps(report.to_json()), repr(report), str(caught.value)):
        assert "SECRET" not in shown


def test_long_records_are_left_out_and_counted(tmp_path: Path) -> None:
    """Too long is not wrong: the rest is used."""
    report = read(write(tmp_path / "t.jsonl", {"text": "abc"}, {"text": "a" * 50}), Letters(), max_tokens=4)
    assert (report.accepted, report.too_long, report.rejected) == (1, 1, ())
    assert (report.mean_tokens, report.max_tokens) == (4.0, 4)


def test_a_missing_heldout_file_says_what_to_do(tmp_path: Path) -> None:
    """Without held-out records there is no gate."""
    write(tmp_path / "train.jsonl", {"text": "a"})
    with pytest.raises(DataError, match=r"no heldout\.jsonl") as caught:
        open_dataset(tmp_path, Letters(), max_tokens=4)
    assert caught.value.hint is not None
    assert "heldout.jsonl" in caught.value.hint


def test_a_file_without_usable_records_is_refused(tmp_path: Path) -> None:
    """Nothing to train on is an error, not an empty run."""
    for name in ("train.jsonl", "heldout.jsonl"):
        write(tmp_path / name, {"text": "a" * 50})
    with pytest.raises(DataError, match="1 over 4 tokens"):
        open_dataset(tmp_path, Letters(), max_tokens=4)


def test_the_digest_is_of_the_bytes(owners_data: dict[str, Path], tmp_path: Path) -> None:
    """One changed character in either file is another data set."""
    for name in ("train.jsonl", "heldout.jsonl"):
        (tmp_path / name).write_bytes((owners_data["east"] / name).read_bytes())
    assert digest(tmp_path) == digest(owners_data["east"])
    with (tmp_path / "heldout.jsonl").open("a") as file:
        file.write("\n")
    assert digest(tmp_path) != digest(owners_data["east"])


def test_chat_tokens_are_what_serving_sees(tiny_base: Path, owners_data: dict[str, Path]) -> None:
    """The unlearnt prefix is the rendered prompt, the learnt part the answer up to its end token."""
    tokenizer = ChatTokenizer(tiny_base)
    ids, mask = tokenizer.apply_chat([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}])
    prompt = tokenizer.encode("<|user|>hi<eos>\n<|assistant|>")
    assert ids[: len(prompt)] == prompt
    assert [i for i, m in zip(ids, mask, strict=True) if m] == [*tokenizer.encode("yo"), tokenizer.end]
    report = check(owners_data["east"], tiny_base, max_tokens=200)
    assert [f.accepted for f in report.files] == [40, 8]


def test_an_example_does_not_print_its_tokens(tmp_path: Path) -> None:
    """Token ids are the text."""
    (example,) = read(write(tmp_path / "t.jsonl", {"text": "abc"}), Letters(), max_tokens=9).examples
    assert repr(example) == "Example(4 tokens)"


def test_a_record_that_is_trained_on_and_held_out_is_refused(tmp_path: Path) -> None:
    """Held-out scores leave without noise: a record in both files would leak past its epsilon."""
    write(tmp_path / "train.jsonl", {"text": "one"}, {"text": "two"})
    write(tmp_path / "heldout.jsonl", {"text": "two"})
    with pytest.raises(DataError, match=r"1 records are in both train\.jsonl and heldout\.jsonl"):
        open_dataset(tmp_path, Letters(), max_tokens=100)
