"""Which regular expressions an output can be held to, and what they cost. Pure Python."""

from __future__ import annotations

import math
import re
from typing import Any

from fedllm.errors import RequestInvalid

MAX_COUNT = 1000
MAX_PATTERN = 200

# No quotation marks or backslashes as such, look-around, references or boundaries.
_PATTERN = re.compile(r"(?:\\[dwsDWS.+*?()\[\]{}|^$/-]|\(\?:|\((?!\?)|[^\\\"(\x00-\x1f])*")
_ATOM = re.compile(r"\\.|\[[^\]]*\]")
_DOUBLE = re.compile(r"[*+?}][*+?{]")
_REPEAT = re.compile(r"\{([0-9]+)(?:,([0-9]*))?\}")
_PIECE = re.compile(r"\\u\{[0-9a-f]+\}|\\.|\[(?:\\.|[^\]\\])*\]|\{([0-9]+)(?:,([0-9]*))?\}|.", re.DOTALL)


def repeats(pattern: str) -> int:
    """Return the sum of the counts in a pattern, those of groups multiplied with what they have inside."""
    groups, last = [0], 0
    for piece in _PIECE.finditer(pattern):
        if piece[0] == "(":
            groups.append(0)
            last = 0
        elif piece[0] == ")" and len(groups) > 1:
            last = groups.pop()
            groups[-1] += last
        elif piece[1]:
            groups[-1] += max(last, int(piece[2] or piece[1]) * max(1, last)) - last
            last = 0
        else:
            last = 0
    return sum(groups)


def check_pattern(made: dict[str, Any]) -> str:
    """Return a string schema's pattern as the compiler takes it: in ASCII.

    xgrammar reads a pattern with any other character by an older way, in which ``.`` stands for a quotation mark as
    well: the text would end before its end.

    Raises
    ------
    RequestInvalid
        If it says something that cannot be enforced; the message never repeats it.
    """
    pattern = made["pattern"]
    if not isinstance(pattern, str) or len(pattern) > MAX_PATTERN or any(n in made for n in ("minLength", "maxLength")):
        raise RequestInvalid(
            f"'pattern' must be a text of at most {MAX_PATTERN} characters, without 'minLength' or 'maxLength'"
        )
    counts = [int(high or low) for low, high in _REPEAT.findall(pattern)]
    bare = _ATOM.sub("x", pattern).removeprefix("^").removesuffix("$")
    # The compiler takes "{1, 9}" and digits of other scripts for counts, or for none: neither is let through.
    plain = _PATTERN.fullmatch(pattern) and not set("^$") & set(bare) and not _DOUBLE.search(bare)
    plain = plain and "{" not in _REPEAT.sub("", bare)
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        plain = None
    if not plain or math.prod(counts) > MAX_COUNT or "format" in made:
        raise RequestInvalid(
            f"'pattern' has a construct that cannot be enforced here, or counts whose product is above {MAX_COUNT}",
            hint="letters, classes, groups, alternatives and counts are supported, anchors at both ends only",
        )
    return "".join(c if c.isascii() else f"\\u{{{ord(c):x}}}" for c in pattern)
