"""The results of `benchmarks.tiers` as a small SVG: ``python -m benchmarks.tiers_plot RESULTS > PICTURE``."""

from __future__ import annotations

import json
import math
import sys
from argparse import ArgumentParser
from pathlib import Path

from benchmarks.document import Document

_WIDTH, _HEIGHT, _TOP, _DEEP = 720, 280, 40, 180
_BAR, _BARS_AT, _CURVES_AT, _PANEL, _GAP = 44, 40, 220, 225, 35
_COLOURS = {"slot": "#2e8b57", "memory": "#1f5fa8", "disk": "#c2571a", "registry": "#8b1a1a"}


def svg(document: Document) -> str:
    """Return each scene's requests by tier as a bar, and its times to the first token by tier as curves."""
    scenes: dict[str, Document] = document["scenes"]
    quantiles = [row["ttft_s_quantiles"] for scene in scenes.values() for row in scene["tiers"].values()]
    seconds = [value for row in quantiles for value in row if value]
    low, high = min(seconds) * 0.9, max(seconds) * 1.1
    size = f'width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" font-size="11"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', '<rect width="100%" height="100%" fill="white"/>']
    parts.append(f'<text x="{_BARS_AT - 25}" y="{_TOP - 14}">share of requests, %</text>')
    for index, (name, scene) in enumerate(scenes.items()):
        parts += _bar(_BARS_AT + index * 2 * _BAR, name, scene)
        left = _CURVES_AT + index * (_PANEL + _GAP)
        title = f"{name}: {scene['streams']} streams; TTFT, s (log)"
        parts += _axes(left, title, low, high)
        for tier, row in scene["tiers"].items():
            points = [
                (left + _PANEL * _along(value, low, high), _TOP + _DEEP * (1 - percent / 100))
                for percent, value in zip(document["quantiles"], row["ttft_s_quantiles"], strict=True)
                if value
            ]
            if points:
                path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
                parts.append(f'<path d="M{path}" fill="none" stroke="{_COLOURS[tier]}" stroke-width="2"/>')
    for index, (tier, colour) in enumerate(_COLOURS.items()):
        parts.append(f'<text x="{_CURVES_AT + 70 * index}" y="{_HEIGHT - 12}" fill="{colour}">{tier}</text>')
    parts.append(f'<text x="{_CURVES_AT + 70 * len(_COLOURS)}" y="{_HEIGHT - 12}">where the version was found</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _along(value: float, low: float, high: float) -> float:
    return math.log(value / low) / math.log(high / low)


def _bar(left: int, name: str, scene: Document) -> list[str]:
    parts, y = [], float(_TOP + _DEEP)
    for tier, row in scene["tiers"].items():
        tall = _DEEP * row["share"]
        y -= tall
        parts.append(f'<rect x="{left}" y="{y:.1f}" width="{_BAR}" height="{tall:.1f}" fill="{_COLOURS[tier]}"/>')
        if row["share"] >= 0.04:
            text = f'y="{y + tall / 2 + 4:.1f}" text-anchor="middle" fill="white"'
            parts.append(f'<text x="{left + _BAR / 2:g}" {text}>{100 * row["share"]:.0f}</text>')
    parts.append(f'<text x="{left + _BAR / 2:g}" y="{_TOP + _DEEP + 16}" text-anchor="middle">{name}</text>')
    return parts


def _axes(left: int, title: str, low: float, high: float) -> list[str]:
    parts = [f'<text x="{left}" y="{_TOP - 14}">{title}</text>']
    for percent in (0, 50, 90, 100):
        y = _TOP + _DEEP * (1 - percent / 100)
        parts.append(f'<path d="M{left} {y:.1f}h{_PANEL}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 4}" y="{y + 4:.1f}" text-anchor="end">{percent}%</text>')
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for value in (digit * 10.0**power for power in powers for digit in (1, 2, 5)):
        if low <= value <= high:
            x = left + _PANEL * _along(value, low, high)
            parts.append(f'<path d="M{x:.1f} {_TOP}v{_DEEP}" stroke="#eee"/>')
            parts.append(f'<text x="{x:.1f}" y="{_TOP + _DEEP + 16}" text-anchor="middle">{value:g}</text>')
    return parts


def main(argv: list[str] | None = None) -> int:
    """Print the picture of a results file."""
    arguments = ArgumentParser(prog="python -m benchmarks.tiers_plot", description=__doc__)
    arguments.add_argument("results", type=Path, help="benchmarks/results/tiers.json")
    options = arguments.parse_args(argv)
    sys.stdout.write(svg(json.loads(options.results.read_text(encoding="utf-8"))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
