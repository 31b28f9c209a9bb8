"""Opacus installs a package that is also called ``benchmarks``; ours, at the project's root, goes first."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))
