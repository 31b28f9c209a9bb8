"""The results of `benchmarks.utility` as a small SVG: ``python -m benchmarks.utility_plot RESULTS > PICTURE``."""

from __future__ import annotations

import json
import math
import sys
from argparse import ArgumentParser
from pathlib import Path

from benchmarks.document import Document

Line = tuple[str, int, str]
"""Arm, owners, method."""
_WIDTH, _HEIGHT, _LEFT, _TOP, _PANEL, _GAP = 720, 300, 46, 40, 290, 40
_DEEP = 190
_SMALL = ("utility_no_noise", "utility")
"""Documents of the results file that are about the small model."""
_COLOURS = {
    ("federated", 200): "#1f5fa8",
    ("federated", 20): "#c2571a",
    ("central", 200): "#555",
    ("alone", 1): "#2e8b57",
}
_NAMES = {
    ("federated", 200): "200 owners",
    ("federated", 20): "20 owners",
    ("central", 200): "central",
    ("alone", 1): "alone",
}
_DASHES = {"ffa": "", "fedit": ' stroke-dasharray="5 3"'}


def svg(document: Document) -> str:
    """Return accuracy over epsilon: a panel for each unit, a colour for each arm, ``fedit`` dashed."""
    rows = [row for row in document["rows"] if (row["arm"], row["owners"]) in _COLOURS]
    values = [row["accuracy"]["mean"] for row in rows] + [document["base_accuracy"]]
    low, high = min(values) - 0.02, max(values) + 0.02
    rows.sort(key=lambda row: (float(row["epsilon"]), float(row["clip"]) == math.inf))
    budgets = list(dict.fromkeys(_budget(row) for row in rows))
    size = f'width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" font-size="11"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', '<rect width="100%" height="100%" fill="white"/>']
    for panel, unit in enumerate(("record", "owner")):
        left = _LEFT + panel * (_PANEL + _GAP)
        parts.append(_axes(left, unit, budgets, low, high, document["base_accuracy"]))
        lines: dict[Line, list[tuple[float, float]]] = {}
        for row in (row for row in rows if row["unit"] == unit):
            x = left + _PANEL * (budgets.index(_budget(row)) + 0.5) / len(budgets)
            y = _place(row["accuracy"]["mean"], low, high)
            lines.setdefault((row["arm"], row["owners"], row["method"]), []).append((x, y))
        parts += [_line(line, points) for line, points in lines.items()]
    at = _LEFT
    for key, name in _NAMES.items():
        parts.append(f'<text x="{at}" y="{_HEIGHT - 12}" fill="{_COLOURS[key]}">{name}</text>')
        at += 100
    parts.append(f'<text x="{at}" y="{_HEIGHT - 12}">solid ffa, dashed fedit</text></svg>')
    return "\n".join(parts) + "\n"


def _budget(row: Document) -> str:
    if row["epsilon"] != "inf":
        return f"{row['epsilon']:g}"
    return "no clip" if row["clip"] == "inf" else "no noise"


def _place(value: float, low: float, high: float) -> float:
    return _TOP + _DEEP * (high - value) / (high - low)


def _axes(left: int, unit: str, budgets: list[str], low: float, high: float, base: float) -> str:
    parts = [f'<text x="{left}" y="{_TOP - 14}">held-out accuracy over epsilon per {unit}, delta 1e-5</text>']
    for tenth in range(int(low * 20) + 1, int(high * 20) + 1):
        y = _place(tenth / 20, low, high)
        parts.append(f'<path d="M{left} {y:.1f}h{_PANEL}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tenth / 20:.2f}</text>')
    y = _place(base, low, high)
    parts.append(f'<path d="M{left} {y:.1f}h{_PANEL}" stroke="#999" stroke-dasharray="1 3"/>')
    parts.append(f'<text x="{left + _PANEL}" y="{y - 4:.1f}" text-anchor="end" fill="#777">no adapter</text>')
    for index, name in enumerate(budgets):
        x = left + _PANEL * (index + 0.5) / len(budgets)
        parts.append(f'<text x="{x:.1f}" y="{_TOP + _DEEP + 18}" text-anchor="middle">{name}</text>')
    return "\n".join(parts)


def _line(line: Line, points: list[tuple[float, float]]) -> str:
    arm, owners, method = line
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path d="M{path}" fill="none" stroke="{_COLOURS[arm, owners]}" stroke-width="2"{_DASHES[method]}/>'


def main(argv: list[str] | None = None) -> int:
    """Print the picture of a results file."""
    arguments = ArgumentParser(prog="python -m benchmarks.utility_plot", description=__doc__)
    arguments.add_argument("results", type=Path, help="benchmarks/results/utility.json")
    options = arguments.parse_args(argv)
    documents: dict[str, Document] = json.loads(options.results.read_text(encoding="utf-8"))
    rows = [row for name in _SMALL if name in documents for row in documents[name]["rows"]]
    sys.stdout.write(svg(documents["utility"] | {"rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
