"""What several tests of the relay share."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def root() -> Iterator[Path]:
    """Return a folder with a path short enough for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="fd", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
