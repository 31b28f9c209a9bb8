"""Where Triton's interpreter can run the kernels."""

from __future__ import annotations

from importlib import metadata

import pytest

_VERSION = next((found.version for found in metadata.distributions(name="triton")), "")
with_loops = pytest.mark.skipif(
    _VERSION.startswith("3.6."),
    reason="Triton 3.6's interpreter makes a loop's bound of an array, which NumPy 2.4 refuses (triton #9171)",
)
"""For tests of kernels in the interpreter; newer ones have it mended, and on a GPU nothing is interpreted."""
