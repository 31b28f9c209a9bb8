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
    UNIT_MISSING,
    WRONG_SHAPE,
    Example,
    Unit,
    check,
    digest,
    open_dataset,
    read,
)
from fedllm.client.tokenizer import ChatTokenizer
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


def persons(tmp_path: Path, train: Sequence[object], heldout: Sequence[object] = ({"text": "h", "who": "h"},)) -> Path:
    """Write a data folder whose records have a column of persons."""
    write(tmp_path / "train.jsonl", *train)
    write(tmp_path / "heldout.jsonl", *heldout)
    return tmp_path


def test_a_column_groups_records_into_units(tmp_path: Path) -> None:
    """All records of a person are one unit, however they are spread; a number and its digits are one person."""
    rows = [("a", "x"), ("b", 7), ("c", "x"), ("d", "7"), ("e", "y"), ("f", " x ")]
    folder = persons(tmp_path, [{"text": text, "who": who} for text, who in rows])
    data = open_dataset(folder, Letters(), max_tokens=9, unit_column="who")
    texts = [["".join(chr(t) for t in e.input_ids[:-1]) for e in unit.examples] for unit in data.units]
    assert texts == [["a", "c", "f"], ["b", "d"], ["e"]]
    assert [len(e.input_ids) for e in data.train] == [2] * 6
    assert len({unit.key for unit in data.units}) == 3
    alone = open_dataset(folder, Letters(), max_tokens=9)
    assert [len(unit.examples) for unit in alone.units] == [1] * 6
    assert repr(data) == "Dataset(3 units of 6 train, 1 held out)"


@pytest.mark.parametrize("who", [None, "", "  ", True, 1.5, ["x"], {"id": 1}])
def test_a_record_without_a_person_is_named_by_line_only(tmp_path: Path, who: object) -> None:
    """Whoever is left out would be covered by nobody's epsilon; an empty name would make strangers one person."""
    folder = persons(tmp_path, [{"text": "a", "who": "x"}, {"text": "SECRET", "who": who}, {"text": "SECRET"}])
    report = read(folder / "train.jsonl", Letters(), max_tokens=9, unit_column="who")
    assert [(r.line, r.reason) for r in report.rejected] == [(2, UNIT_MISSING), (3, UNIT_MISSING)]
    with pytest.raises(DataError, match=r"2 \(unit-missing\), 3 \(unit-missing\)") as caught:
        open_dataset(folder, Letters(), max_tokens=9, unit_column="who")
    assert "SECRET" not in f"{report!r} {json.dumps(report.to_json())} {caught.value}"


def test_nobody_is_trained_on_and_scored(tmp_path: Path) -> None:
    """Held-out scores are outside epsilon: two persons in both files are two too many, and are not named."""
    train = [{"text": c, "who": c} for c in "abc"]
    folder = persons(tmp_path, train, [{"text": "1", "who": "a"}, {"text": "2", "who": "c"}, {"text": "3", "who": "d"}])
    with pytest.raises(DataError, match="2 persons have records in both") as caught:
        open_dataset(folder, Letters(), max_tokens=9, unit_column="who")
    assert "split the files by who" in str(caught.value.hint)
    assert len(open_dataset(folder, Letters(), max_tokens=9).heldout) == 3, "without a column nobody is known"


def test_long_records_leave_their_unit(tmp_path: Path) -> None:
    """A unit keeps its records that fit; one with none disappears, when read and in a plan with a lower limit."""
    rows = [("aaaa", "x"), ("a" * 50, "x"), ("b" * 50, "y"), ("a", "x"), ("cccc", "z")]
    folder = persons(tmp_path, [{"text": text, "who": who} for text, who in rows])
    report = read(folder / "train.jsonl", Letters(), max_tokens=9, unit_column="who")
    assert [len(unit.examples) for unit in report.units] == [2, 1]
    assert (report.accepted, report.too_long) == (3, 2)
    kept = [unit.within(2) for unit in report.units]
    assert kept[0] is not None
    assert ([len(e.input_ids) for e in kept[0].examples], kept[0].key, kept[1]) == ([2], report.units[0].key, None)


def test_reports_count_units(tmp_path: Path) -> None:
    """What is sampled and declared is units: an owner must see their number."""
    folder = persons(tmp_path, [{"text": c, "who": ord(c) % 2} for c in "abcde"])
    grouped = read(folder / "train.jsonl", Letters(), max_tokens=9, unit_column="who").to_json()
    assert (grouped["accepted"], grouped["units"]) == (5, 2)
    assert read(folder / "train.jsonl", Letters(), max_tokens=9).to_json()["units"] == 5


def test_keys_are_of_the_content(tmp_path: Path) -> None:
    """Same tokens, same key, wherever they stand; other labels or another person, another key; nothing is printed."""
    example = Example((1, 2, 3), (IGNORED, 2, 3))
    assert Unit((example,)).key == Unit((Example((1, 2, 3), (IGNORED, 2, 3)),)).key
    folder = persons(tmp_path, [{"text": "a", "who": "x"}, {"text": "a", "who": "y"}])
    first, second = open_dataset(folder, Letters(), max_tokens=9, unit_column="who").units
    others = [Unit((Example((1, 2, 3), (1, 2, 3)),)), Unit((Example((1, 2), (1, 2)),)), first, second]
    keys = {Unit((example,)).key, *(unit.key for unit in others)}
    assert len(keys) == 5
    assert {len(key) for key in keys} == {32}
    assert repr(first) == "Unit(examples=(Example(2 tokens),))"


def test_half_a_surrogate_pair_is_a_name_like_any_other(tmp_path: Path) -> None:
    """JSON can spell what UTF-8 cannot: that must not end the daemon with the name in a traceback."""
    folder = persons(tmp_path, [b'{"text": "a", "who": "\\ud800"}', {"text": "b", "who": "x"}])
    assert len(open_dataset(folder, Letters(), max_tokens=9, unit_column="who").units) == 2
