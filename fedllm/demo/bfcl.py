"""Records of the Berkeley Function Calling Leaderboard, read from the wheel that publishes them."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedllm.basemodel.catalog import WheelPin
from fedllm.demo.calls import Record
from fedllm.errors import DataError
from fedllm.ids import Digest

WHEEL = WheelPin(
    project="bfcl-eval",
    version="2026.3.23",
    sha256=Digest("3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a"),
    size=1_925_664,
)


@dataclass(frozen=True)
class Family:
    """Two members of the wheel: questions with their tools, and reference calls.

    ``bare_arrays`` is explained at `Record`.
    """

    question: str
    reference: str
    bare_arrays: bool = False


def _family(name: str) -> Family:
    return Family(f"bfcl_eval/data/BFCL_v4_{name}.json", f"bfcl_eval/data/possible_answer/BFCL_v4_{name}.json")


_SQL = Family(
    "bfcl_eval/data/unused_datasets/question/BFCL_v4_sql.json",
    "bfcl_eval/data/unused_datasets/possible_answer/BFCL_v4_sql.json",
    bare_arrays=True,
)
FAMILIES: Mapping[str, tuple[Family, ...]] = {
    "python": (_family("simple_python"), _family("multiple")),
    "java_js": (_family("simple_java"), _family("simple_javascript")),
    "sql": (_SQL,),
    "live": (_family("live_simple"), _family("live_multiple")),
}


def read(archive: zipfile.ZipFile, family: Family) -> Iterator[Record | None]:
    """Yield a family's records; None for one with several messages or without exactly one reference call.

    Raises
    ------
    DataError
        The archive lacks a file.
    """
    references = {row["id"]: row["ground_truth"] for row in _lines(archive, family.reference)}
    for row in _lines(archive, family.question):
        # One family writes a conversation as a list of messages, the others as a list of turns of messages.
        first = row["question"][0]
        messages = first if isinstance(first, list) else row["question"]
        calls = references.get(row["id"], [])
        if len(messages) != 1 or len(calls) != 1:
            yield None
            continue
        ((name, arguments),) = calls[0].items()
        if name not in {function["name"] for function in row["function"]}:
            yield None
            continue
        request = messages[0]["content"].strip()
        yield Record(row["id"], request, tuple(row["function"]), name, arguments, family.bare_arrays)


def _lines(archive: zipfile.ZipFile, member: str) -> list[dict[str, Any]]:
    try:
        text = archive.read(member).decode("utf-8")
    except KeyError:
        raise DataError(f"{Path(archive.filename or '').name} has no member {member!r}") from None
    return [json.loads(line) for line in text.splitlines() if line.strip()]
