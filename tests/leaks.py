"""Ways to look for private things in bytes: exact patterns in many forms, and statistics of masked vectors.

Every search here has a control in the tests that use it: what is planted must be found. None of it can see through
encryption by a key the searcher lacks; that is what the list of allowed fields and lengths is for.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import cbor2
import numpy as np
from numpy.typing import NDArray
from scipy import stats

Patterns = dict[bytes, str]
"""Bytes that must not be found, and what they are."""
_WORD = re.compile(r"[^\W_]{5,}")
_PREFIX = 8
_TOKENS = 6
"""Token ids in a row that are taken for a piece of a record."""
_ENTRIES = 4
"""Entries of a vector in a row that are taken for a piece of it."""


def private_texts(folder: Path) -> list[str]:
    """Return what the records of a data folder say: every string in them except roles."""
    lines = [line for file in sorted(folder.glob("*.jsonl")) for line in file.read_text("utf-8").splitlines()]
    return [text for line in lines for text in _strings(json.loads(line))]


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key != "role":
                yield from _strings(item)


def text_patterns(texts: Iterable[str], what: str) -> Patterns:
    """Return every distinct word of five characters or more, and every whole text, in every form."""
    found = {piece for text in texts for piece in (text, *_WORD.findall(text))}
    return {form: f"{what} as {name}" for piece in sorted(found) for name, form in text_forms(piece)}


def text_forms(text: str) -> Iterator[tuple[str, bytes]]:
    """Yield a text's forms; in base64 the part that does not depend on its neighbours, at each alignment."""
    raw = text.encode()
    yield "utf-8", raw
    yield "utf-16-le", text.encode("utf-16-le")
    yield "utf-16-be", text.encode("utf-16-be")
    yield "hex", raw.hex().encode()
    yield "HEX", raw.hex().upper().encode()
    for shift in range(3):
        encoded = base64.b64encode(bytes(shift) + raw)
        stable = encoded[-(-shift * 8 // 6) : (shift + len(raw)) * 8 // 6]
        yield f"base64+{shift}", stable
        yield f"base64url+{shift}", stable.translate(bytes.maketrans(b"+/", b"-_"))


def token_patterns(sequences: Iterable[Sequence[int]], what: str) -> Patterns:
    """Return every run of six token ids as little and big endian words of 2, 4 and 8 bytes, and as CBOR."""
    found: Patterns = {}
    for ids in sequences:
        coded = [cbor2.dumps(int(i)) for i in ids]
        for at in range(len(ids) - _TOKENS + 1):
            found[b"".join(coded[at : at + _TOKENS])] = f"{what} as CBOR token ids"
        for kind in ("<u2", "<i4", "<i8", ">u2", ">i4", ">i8"):
            found |= dict.fromkeys(_runs(np.asarray(ids).astype(kind), _TOKENS), f"{what} as {kind} token ids")
    return found


def vector_patterns(vector: NDArray[np.floating], what: str) -> Patterns:
    """Return every run of four entries as float16, bfloat16, float32 and float64, both byte orders, and as CBOR."""
    found: Patterns = {}
    for order in "<>":
        for kind in ("f2", "f4", "f8"):
            found |= dict.fromkeys(_runs(vector.astype(order + kind), _ENTRIES), f"{what} as {order}{kind}")
        top = (np.asarray(vector, dtype="<f4").view("<u4") >> 16).astype(order + "u2")
        found |= dict.fromkeys(_runs(top, _ENTRIES), f"{what} as {order}bfloat16")
    coded = [cbor2.dumps(float(x), canonical=True) for x in vector]
    runs = (b"".join(coded[at : at + _ENTRIES]) for at in range(len(coded) - _ENTRIES + 1))
    return found | dict.fromkeys(runs, f"{what} as CBOR")


def ring_patterns(values: NDArray[np.uint32], what: str) -> Patterns:
    """Return every run of four ring entries, as words of 4 bytes and packed into 2 and 3."""
    found = {run: f"{what} as {order}u4" for order in "<>" for run in _runs(values.astype(f"{order}u4"), _ENTRIES)}
    lanes = values.astype("<u4").view(np.uint8).reshape(-1, 4)
    for width in (2, 3):
        packed = np.ascontiguousarray(lanes[:, :width]).view(f"V{width}").ravel()
        found |= dict.fromkeys(_runs(packed, _ENTRIES), f"{what} packed in {width} bytes")
    return found


def scalar_patterns(value: float, what: str) -> Patterns:
    """Return one number as float32 and float64 in both byte orders (CBOR writes the big endian one)."""
    return {np.asarray(value, dtype=kind).tobytes(): f"{what} as {kind}" for kind in ("<f8", ">f8")}


def _runs(array: NDArray[np.generic], length: int) -> Iterator[bytes]:
    size, data = array.dtype.itemsize, array.tobytes()
    for at in range(len(array) - length + 1):
        run = data[at * size : (at + length) * size]
        if len({run[i : i + size] for i in range(0, len(run), size)}) > 1:  # equal entries are nobody's secret
            yield run


class Search:
    """Looks for all patterns at once; made once for many haystacks.

    Parameters
    ----------
    patterns : Patterns
    """

    def __init__(self, patterns: Patterns) -> None:
        self.patterns = patterns
        self._short = [p for p in patterns if len(p) < _PREFIX]
        self._by_prefix: dict[int, list[bytes]] = {}
        for pattern in patterns:
            if len(pattern) >= _PREFIX:
                self._by_prefix.setdefault(int.from_bytes(pattern[:_PREFIX], "little"), []).append(pattern)
        self._prefixes = np.array(sorted(self._by_prefix), dtype=np.uint64)

    def find(self, haystacks: Mapping[str, bytes]) -> list[str]:
        """Return where which pattern was found, without repeats; empty when nothing leaks."""
        found = {f"{where}: {self.patterns[p]}" for where, data in haystacks.items() for p in self._found_in(data)}
        return sorted(found)

    def _found_in(self, data: bytes) -> Iterator[bytes]:
        yield from (p for p in self._short if p in data)
        if len(data) < _PREFIX or not len(self._prefixes):
            return
        windows = np.lib.stride_tricks.sliding_window_view(np.frombuffer(data, dtype=np.uint8), _PREFIX)
        words = np.ascontiguousarray(windows).view("<u8").ravel()
        nearest = self._prefixes[np.minimum(np.searchsorted(self._prefixes, words), len(self._prefixes) - 1)]
        for at in np.flatnonzero(nearest == words):
            yield from (p for p in self._by_prefix[int(words[at])] if data.startswith(p, int(at)))


def views(raw: bytes, body: object, parts: Sequence[bytes] = ()) -> dict[str, bytes]:
    """Return the ways to read one message: its bytes, its fields joined, byte planes, and what was compressed.

    The parts that follow it are read as if they were fields of its body.
    """
    fields = [*(value for _, value in leaves(body)), *parts]
    texts = "".join(value for value in fields if isinstance(value, str)).encode()
    binary = b"".join(value for value in fields if isinstance(value, bytes))
    found = {"raw": raw, "texts": texts, "fields": binary}
    for width in (2, 3, 4):
        found |= {f"plane {k} of {width}": binary[k::width] for k in range(width)}
    for index, value in enumerate(value for value in fields if isinstance(value, bytes)):
        for name, bits in (("zlib or gzip", 47), ("deflate", -15)):
            try:
                found[f"field {index} as {name}"] = zlib.decompress(value, bits)
            except zlib.error:
                continue
    return found


def leaves(value: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Yield every field of a body with its path; list items are ``[]``, map entries ``{}``."""
    if dataclasses.is_dataclass(value):
        for f in dataclasses.fields(value):
            yield from leaves(getattr(value, f.name), f"{path}.{f.name}" if path else f.name)
    elif isinstance(value, tuple):
        for item in value:
            yield from leaves(item, f"{path}[]")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield f"{path}{{key}}", key
            yield from leaves(item, f"{path}{{}}")
    else:
        yield path, value


def unpack(chunks: Sequence[bytes], entry_bytes: int) -> NDArray[np.uint32]:
    """Return the ring entries of a masked vector; the plain twin of the packed adder."""
    lanes = np.frombuffer(b"".join(chunks), dtype=np.uint8).reshape(-1, entry_bytes).astype(np.uint32)
    return (lanes << (8 * np.arange(entry_bytes, dtype=np.uint32))).sum(axis=1, dtype=np.uint32)


def centred(values: NDArray[np.uint32], bits: int) -> NDArray[np.float64]:
    """Return ring entries as the signed integers nearest to zero."""
    signed = values.astype(np.int64)
    return np.where(signed >= 1 << (bits - 1), signed - (1 << bits), signed).astype(np.float64)


def correlation(x: NDArray[np.generic], y: NDArray[np.generic]) -> float:
    """Return Pearson's correlation; 0 where one side is constant and so has nothing to hide or to tell."""
    a, b = x.astype(np.float64), y.astype(np.float64)
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norm if norm > 0 else 0.0


def uniformity(data: bytes) -> float:
    """Return the chi-square p-value of bytes being uniform (255 degrees of freedom)."""
    return float(stats.chisquare(np.bincount(np.frombuffer(data, dtype=np.uint8), minlength=256)).pvalue)
